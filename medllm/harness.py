"""Models of this project in EleutherAI's lm-evaluation-harness (the extra ``lm-eval``), on any of the engines.

``python -m medllm.harness`` is the harness's own command, which then knows the model ``medllm``::

    python -m medllm.harness run --model medllm --model_args path=Qwen2.5-7B,engine=jax --tasks lambada_openai

In Python, importing this module registers it. Tokens are split between context and continuation by the harness's own rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from medllm.config import MeshConfig, ModelConfig, Sampling
from medllm.engine import Continuation
from medllm.engines import EngineName, TrainerName, open_engine, open_scorer
from medllm.errors import UserError
from medllm.model.tokenizer import Message, encode, end_token, written_out

_LONGEST_ANSWER = 256  # the harness's own default for tasks that name no length


@dataclass(frozen=True)
class _Pair:
    """A text to continue, with the tokens of it and of the continuation whose likelihood is asked for."""

    text: str
    tokens: Continuation


@register_model("medllm")
class HarnessModel(TemplateLM):
    """A model as the harness asks it: likelihoods, rolling likelihoods, text.

    Args:
        path: Model folder, or its name on a server (``engine=openai``, which gives text alone).
        engine: Which engine holds it.
        adapter: PEFT adapter folders, joined by ``+`` where there are several.
        tokenizer: Folder of the tokenizer; the model's when unset.
        quantization: How its weights are stored.
        dtype: Type of the computation.
        mesh: Over which devices, on the JAX engine.
        batch_size: Requests at a time.
        max_length: Longest text in tokens; a longer one loses its beginning. What the model takes when unset.
        greedy: Also say whether a continuation is the likeliest text, which few tasks ask for (LAMBADA). It takes a generation
            where the likelihood alone does not tell; without it the answer is no.

    Raises:
        UserError: the model cannot be opened.
    """

    def __init__(
        self,
        path: str,
        engine: EngineName = "jax",
        adapter: str | None = None,
        tokenizer: str | None = None,
        quantization: Any = "none",
        dtype: Any = "bfloat16",
        mesh: str = "",
        batch_size: int | str = 32,
        max_length: int | None = None,
        greedy: bool = True,
        **_: Any,  # device and max_batch_size, which the harness gives every model
    ):
        super().__init__()
        adapters = tuple(adapter.split("+")) if adapter else None
        model = ModelConfig(path, adapters, tokenizer, quantization, dtype)
        self._scores = engine in get_args(TrainerName)
        opened: Any = open_scorer if self._scores else open_engine
        self._engine = opened(engine, model, MeshConfig(mesh=mesh))
        self._batch_size = int(batch_size) if str(batch_size).isdigit() else 32
        # The engine counts the last token, which the harness does not.
        self.max_length = max_length or (self._engine.context - 1 if self._scores else 0)
        self._greedy = greedy
        self._path = path

    @property
    def tokenizer(self) -> Any:
        """The model's own; none on a server."""
        return self._engine.tokenizer if self._scores else None

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps cached requests apart by."""
        return self._path.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return end_token(self._tokenizer())

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without context begins after: BOS where there is one."""
        tokenizer = self._tokenizer()
        return self.eot_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; a beginning that is already written out is not put there again."""
        tokenizer = self._tokenizer()
        if add_special_tokens is False:
            return tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        return encode(tokenizer, self._unbegun(string))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it."""
        if not add_generation_prompt:
            raise UserError(
                "an assistant's turn that is begun for the model is not supported; leave out --fewshot_as_multiturn"
            )
        return written_out(self._tokenizer(), tuple(Message(turn["role"], turn["content"]) for turn in chat_history))

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-likelihood (nats) of each whole text, in windows of ``max_length`` that share one token."""
        windows: list[Continuation] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                prompt, completion = make_disjoint_window(window)
                windows.append(Continuation(tuple(prompt), tuple(completion)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, logprobs in zip(owners, self._engine.logprobs(windows, self._batch_size), strict=True):
            sums[number] += float(logprobs.sum())
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = []
        for (context, _continuation), prompt, completion in requests:
            kept = max(self.max_length + 1 - len(completion), 1)
            # The harness moves spaces at the end of a context to the continuation.
            text = context.rstrip() if context else self._tokenizer().decode(prompt)
            pairs.append(_Pair(text, Continuation(tuple(prompt[-kept:]), tuple(completion))))
        logprobs = self._engine.logprobs([pair.tokens for pair in pairs], self._batch_size)
        likeliest = [all(logprob > -math.log(2) for logprob in one) for one in logprobs]
        if self._greedy:
            # Above one half nothing is likelier; below, only the model's own text tells.
            open_ones = [number for number, known in enumerate(likeliest) if not known]
            for number, found in zip(open_ones, self._are_greedy([pairs[number] for number in open_ones]), strict=True):
                likeliest[number] = found
        return [(float(one.sum()), found) for one, found in zip(logprobs, likeliest, strict=True)]

    def _are_greedy(self, pairs: Sequence[_Pair]) -> list[bool]:
        if not pairs:
            return []
        longest = max(len(pair.tokens.completion) for pair in pairs)
        texts = [self._unbegun(pair.text) for pair in pairs]
        written = self._engine.generate(texts, Sampling(max_new_tokens=longest), self._batch_size)
        return [
            one.tokens[: len(pair.tokens.completion)] == pair.tokens.completion
            for pair, (one,) in zip(pairs, written, strict=True)
        ]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """The text that follows each context, up to one of its stop strings."""
        settings = [self._sampling(request.args[1]) for request in requests]
        answers = [""] * len(requests)
        for sampling in dict.fromkeys(settings):
            mine = [number for number, one in enumerate(settings) if one == sampling]
            texts = [self._unbegun(requests[number].args[0]) for number in mine]
            for number, (generation,) in zip(mine, self._engine.generate(texts, sampling, self._batch_size), strict=True):
                answers[number] = generation.text
        return answers

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        known = normalize_gen_kwargs(given, _LONGEST_ANSWER)
        until = known.get("until") or ()
        return Sampling(
            max_new_tokens=known["max_gen_toks"],
            temperature=known.get("temperature") or 0.0,
            top_p=known.get("top_p") or 1.0,
            top_k=known.get("top_k") or 0,
            stop=tuple(stop for stop in ((until,) if isinstance(until, str) else until) if stop),
        )

    def _tokenizer(self) -> Any:
        if not self._scores:
            raise UserError("engine 'openai' gives no likelihoods here; use engine=jax or engine=torch, or tasks that generate")
        return self._engine.tokenizer

    def _unbegun(self, text: str) -> str:
        """``text`` without a BOS token that a chat template has written: the tokenizer puts its own there."""
        begins = self.tokenizer.bos_token if self._scores else None
        return text.removeprefix(begins) if begins and encode(self.tokenizer, "")[:1] == [self.tokenizer.bos_token_id] else text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
