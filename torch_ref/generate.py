"""Continuations and their log-probabilities with transformers' own ``generate``: left padding, a key-value cache, batches.

Sampling is made independent of the batch: each continuation draws from a generator of its own, seeded by (seed, prompt, sample
number). ``argmax(log p + Gumbel noise)`` is an exact draw from p, so transformers' warpers and greedy search do the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from medllm.config import Sampling
from medllm.engine import Continuation, Generation, whole_characters
from medllm.errors import PromptError, UserError
from medllm.host.progress import Progress
from medllm.model.endings import Endings
from medllm.model.tokenizer import Prompt, decode, encode_prompt
from torch_ref.shares import made_of


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    endings: Endings,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[list[Generation]]:
    """``sampling.samples`` continuations for each prompt, in the order of the prompts; processes of a launch share the batches.

    Args:
        model: A causal language model or a ``PeftModel`` around one, in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Texts or conversations.
        sampling: Length, temperature, filters, seed and stop strings.
        endings: What the model's own folder ends a continuation with.
        batch_size: Continuations generated at a time.
        progress: Called with (continuations done, continuations in all), as far as this process can tell.

    Raises:
        UserError: a prompt and its continuation do not fit the model's context, or a stop string no text can show.
    """
    endings = endings.with_stops(tokenizer, sampling.stop)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    _check_context(model, encoded, sampling.max_new_tokens)
    # Prompts of like length share a batch, the longest first: little padding, and memory runs out at once or never.
    jobs = sorted(
        ((number, sample) for number in range(len(encoded)) for sample in range(sampling.samples)),
        key=lambda job: (-len(encoded[job[0]]), job),
    )
    batches = list(_batches(jobs, batch_size))

    def continued(batch: Sequence[tuple[int, int]]) -> list[Generation]:
        given, samples = [encoded[number] for number, _ in batch], [sample for _, sample in batch]
        rows = _continue(model, tokenizer, given, samples, sampling, endings)
        return [_generation(tokenizer, row, sampling.max_new_tokens, endings) for row in rows]

    def told(done: int) -> None:
        if progress:
            progress(min(len(jobs), done * batch_size), len(jobs))

    made = made_of(batches, continued, told)
    results = dict(zip(jobs, (one for batch in made for one in batch), strict=True))
    return [[results[number, sample] for sample in range(sampling.samples)] for number in range(len(encoded))]


@torch.no_grad()
def logprobs(model: Any, tokenizer: Any, continuations: Sequence[Continuation], batch_size: int = 32) -> list[np.ndarray]:
    """Natural-log probability (fp32) of each token of each completion given everything before it.

    Raises:
        UserError: a prompt is empty, or prompt and completion do not fit the model's context.
    """
    if any(not one.prompt for one in continuations):
        raise UserError("a prompt is empty: the first token of a completion needs one before it")
    sequences = [[*one.prompt, *one.completion] for one in continuations]
    _check_context(model, sequences, 0)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))

    def scored(batch: Sequence[int]) -> list[np.ndarray]:
        tokens, mask = _pad([sequences[i] for i in batch], tokenizer.pad_token_id, "right", model.device)
        hidden = causal.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        found = []
        for row, i in enumerate(batch):
            start, end = len(continuations[i].prompt), len(sequences[i])
            # The head runs over one completion at a time: the logits of a whole batch would be gigabytes.
            logits = causal.lm_head(hidden[row, start - 1 : end - 1]).float()
            targets = tokens[row, start:end, None]
            found.append(logits.log_softmax(-1).gather(-1, targets)[:, 0].cpu().numpy())
        return found

    made = made_of(list(_batches(order, batch_size)), scored)
    results = dict(zip(order, (one for batch in made for one in batch), strict=True))
    return [results[i] for i in range(len(sequences))]


class _SeededGumbel(LogitsProcessor):
    """Adds Gumbel noise from one generator a row, so that the largest score is a draw from the softmax of the scores."""

    def __init__(self, generators: Sequence[torch.Generator]):
        self._generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.stack(
            [
                torch.empty(scores.shape[-1], device=scores.device).exponential_(generator=generator)
                for generator in self._generators
            ]
        )
        return scores.float() - noise.log()


class _StopAtStrings(StoppingCriteria):
    """Ends a row once a stop string appears in its continuation.

    The last tokens are decoded and searched: a token holds at least one byte, so as many tokens as the longest stop string
    has bytes cover it, and a few more complete a character whose bytes are spread over tokens.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_width: int):
        self._tokenizer, self._stop, self._prompt_width = tokenizer, stop, prompt_width
        self._tail = max(len(text.encode()) for text in stop) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        generated = input_ids[:, self._prompt_width :][:, -self._tail :]
        texts = [decode(self._tokenizer, row) for row in generated.tolist()]
        return torch.tensor([any(stop in text for stop in self._stop) for text in texts], device=input_ids.device)


@torch.no_grad()
def _continue(
    model: Any, tokenizer: Any, prompts: list[list[int]], samples: list[int], sampling: Sampling, endings: Endings
) -> list[list[int]]:
    """New tokens of one batch, end and padding tokens included; one more than asked for, to see whether it is the end."""
    tokens, mask = _pad(prompts, tokenizer.pad_token_id, "left", model.device)
    width = tokens.shape[1]
    # The model folder's own generation defaults (a repetition penalty, a top_k) must not colour the answers.
    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens + 1,  # the end token is not counted
        do_sample=False,
        eos_token_id=list(endings.ids),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        generators = [_generator(sampling.seed, *job, model.device) for job in zip(prompts, samples, strict=True)]
        processors.append(_SeededGumbel(generators))
    criteria = [_StopAtStrings(tokenizer, endings.strings, width)] if endings.strings else []
    output = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList(criteria),
    )
    return output[:, width:].tolist()


def _generator(seed: int, prompt: list[int], sample: int, device: torch.device) -> torch.Generator:
    key = hashlib.blake2b(repr((seed, sample, prompt)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key, "little") >> 1)


def _generation(tokenizer: Any, row: list[int], most: int, endings: Endings) -> Generation:
    """Cut a row at its first end token and its text at the first stop string."""
    whole = list(takewhile(lambda token: token not in endings.ids, row))
    ended, tokens = len(whole) < len(row), whole[:most]
    text = decode(tokenizer, tokens)
    cuts = sorted((text.index(stop), stop) for stop in endings.strings if stop in text)
    if cuts and not ended:
        # A row that stopped at a string is filled up with padding until the longest row of its batch is done.
        tokens = _without_padding(tokens, tokenizer.pad_token_id)
    generation = Generation(
        text=text[: cuts[0][0]] if cuts else text,
        tokens=tuple(tokens),
        finish="stop" if ended or cuts else "length",
        stopped=cuts[0][1] if cuts else "",
    )
    return whole_characters(tokenizer, generation)


def _without_padding(tokens: list[int], pad: int) -> list[int]:
    while tokens and tokens[-1] == pad:
        tokens = tokens[:-1]
    return tokens


def _pad(rows: Sequence[Sequence[int]], pad: int, side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask ``[b, s]`` of rows padded on one side."""
    width = max(map(len, rows))
    tokens, mask = torch.full((len(rows), width), pad), torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return tokens.to(device), mask.to(device)


def _check_context(model: Any, rows: Sequence[Sequence[int]], new_tokens: int) -> None:
    limit = model.config.max_position_embeddings
    for number, row in enumerate(rows):
        if len(row) + new_tokens > limit:
            raise PromptError(
                number,
                f"{len(row)} tokens and {new_tokens} new ones exceed the model's context of {limit}: "
                "shorten it, use fewer shots, or lower --sampling.max_new_tokens",
            )


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
