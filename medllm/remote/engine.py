"""Models behind an OpenAI-compatible server (``--engine openai``): they answer and score, and are not trained here.

``model.path`` is the model's name on the server. The server is ``OPENAI_BASE_URL`` (OpenAI's own when unset), the key
``OPENAI_API_KEY``; servers that need no key (vLLM, llama.cpp) take any word.

A conversation goes to ``/chat/completions``. A text to continue goes to ``/completions``, which base models are served
with; wrapping it into a user's turn would change what is measured, so a server without that endpoint is an error that
says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medllm.config import MeshConfig, ModelConfig, Sampling
from medllm.engine import Answer, Continuation, Generation, Likelihood, Wanted
from medllm.errors import UserError
from medllm.host.processes import process_count
from medllm.host.progress import Progress
from medllm.model.tokenizer import Prompt, decode, load_tokenizer
from medllm.remote.client import Client, Reply, Response
from medllm.remote.pace import Pace
from medllm.remote.pool import as_they_come
from medllm.remote.spending import account
from medllm.stage_config import ServerConfig

_MOST_STOPS = 4  # what the API takes; the rest is cut here
_SEEDS_A_PROMPT = 1 << 16


class OpenAIEngine:
    """Text generation through an OpenAI-compatible API.

    Args:
        model: Its ``path`` is the model's name on the server.
        stage: The stage that asks, whose ``server`` says how.
        url: The server, in place of ``OPENAI_BASE_URL``; one without keys needs none then.

    Raises:
        UserError: no key in the environment, several processes, or a setting that only a local model can have.
    """

    name = "openai"

    def __init__(self, model: ModelConfig, stage: MeshConfig | None = None, url: str | None = None):
        if model.adapter is not None:
            raise UserError("engine 'openai' cannot apply --model.adapter; serve the merged model, named by --model.path")
        if process_count() > 1:
            raise UserError(
                "engine 'openai' asks from one process: start it without torchrun or accelerate (--server.concurrency)"
            )
        self._settings: ServerConfig = getattr(stage, "server", ServerConfig())
        self._client = Client(model.path, url, self._settings)
        self._takes_several = True
        if self._settings.tokenizer is not None:
            self.tokenizer = load_tokenizer(self._settings.tokenizer)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> list[list[Generation]]:
        """``sampling.samples`` continuations for each prompt, in the order of the prompts.

        At most ``batch_size`` requests (and never more than ``server.concurrency``) are under way. ``Generation.tokens`` is
        empty: the API gives text. The seed sent depends on ``sampling.seed`` and the sample's number; whether it is honoured is
        the server's affair.

        Raises:
            UserError: the server cannot be reached or refuses a request. The key is never part of the message.
        """
        replies = self.replies(prompts, sampling, batch_size, progress)
        return [[_generation(reply, sampling.stop) for reply in of_prompt] for of_prompt in replies]

    def replies(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> list[list[Reply]]:
        """What :meth:`generate` is made of: the server's own words.

        Raises:
            UserError: as there.
        """
        found: list[dict[int, Reply]] = [{} for _ in prompts]
        wanted = (Wanted(number, prompt, tuple(range(sampling.samples))) for number, prompt in enumerate(prompts))
        for came in self._ask_all(wanted, sampling, batch_size):
            for asked, response in came:
                found[asked.number] |= zip(asked.samples, response.replies, strict=True)
            if progress:
                progress(sum(len(one) == sampling.samples for one in found), len(found))
        return [[of_prompt[sample] for sample in range(sampling.samples)] for of_prompt in found]

    def answers(self, wanted: Iterable[Wanted], sampling: Sampling) -> Iterator[list[Answer]]:
        """See :class:`medllm.engine.AnswersSingly`. A prompt's samples are one request where the server takes that.

        Raises:
            UserError: as for :meth:`generate`, when the requests under way have ended.
        """
        for came in self._ask_all(wanted, sampling, self._settings.concurrency):
            yield [
                Answer(asked.number, sample, _generation(reply, sampling.stop), response.facts if first == 0 else {})
                for asked, response in came
                for first, (sample, reply) in enumerate(zip(asked.samples, response.replies, strict=True))
            ]

    def logprobs(self, continuations: Sequence[Continuation], batch_size: int = 32) -> list[np.ndarray]:
        """Per-token log-probabilities (natural) of each completion given its prompt; ``batch_size`` is an engine's here.

        Raises:
            UserError: as for :meth:`scored`.
        """
        found = {one.number: one.logprobs for came in self.scored(continuations) for one in came}
        return [found[number] for number in range(len(continuations))]

    def scored(self, continuations: Sequence[Continuation]) -> Iterator[list[Likelihood]]:
        """See :class:`medllm.engine.ScoresSingly`. Each is a request.

        Raises:
            UserError: a prompt is empty, its tokens are not the server's, or the server gives no log-probabilities of
                what it is given, cannot be reached, or refuses.
        """
        if not all(one.prompt for one in continuations):
            raise UserError("a prompt is empty: its first token follows nothing")
        pace, numbered = Pace(self._settings), iter(enumerate(continuations))

        def ask(one: tuple[int, Continuation]) -> Likelihood | None:
            number, asked = one
            text = decode(self.tokenizer, asked.completion)
            said = self._client.score(pace, number, (*asked.prompt, *asked.completion), text)
            if said is None:
                return None
            return Likelihood(number, np.asarray(said.logprobs[len(asked.prompt) :], np.float32), said.facts)

        for came in as_they_come(lambda: next(numbered, None), ask, self._settings.concurrency, pace):
            yield [said for _, said in came]

    def account(self, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See :func:`medllm.remote.spending.account`."""
        return account(self._client.url, facts, self._settings)

    def _ask_all(self, wanted: Iterable[Wanted], sampling: Sampling, at_most: int) -> Iterator[list[tuple[Wanted, Response]]]:
        """What was asked and the responses, as they come; those samples that came of it, where it is not all."""
        source, again = iter(wanted), deque[Wanted]()
        pace = Pace(self._settings)
        asking = as_they_come(
            lambda: self._next(source, again),
            lambda one: self._ask(pace, one, sampling),
            max(1, min(at_most, self._settings.concurrency)),
            pace,
        )
        for came in asking:
            yield [self._received(asked, response, again) for asked, response in came]

    def _next(self, source: Iterator[Wanted], again: deque[Wanted]) -> Wanted | None:
        """The next request: of one sample, where the server does not take several."""
        one = again.popleft() if again else next(source, None)
        if one is None or self._takes_several or len(one.samples) == 1:
            return one
        again.extendleft(Wanted(one.number, one.prompt, (sample,)) for sample in reversed(one.samples[1:]))
        return Wanted(one.number, one.prompt, one.samples[:1])

    def _received(self, asked: Wanted, response: Response, again: deque[Wanted]) -> tuple[Wanted, Response]:
        """What came; samples that did not come with it are asked for again, one by one."""
        count = min(len(asked.samples), len(response.replies))
        if count < len(asked.samples):
            self._takes_several = False
            again.append(Wanted(asked.number, asked.prompt, asked.samples[count:]))
        return Wanted(asked.number, asked.prompt, asked.samples[:count]), Response(response.replies[:count], response.facts)

    def _ask(self, pace: Pace, asked: Wanted, sampling: Sampling) -> Response | None:
        settings: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if len(asked.samples) > 1:
            settings["n"] = len(asked.samples)
        if sampling.stop:
            settings["stop"] = list(sampling.stop[:_MOST_STOPS])
        if sampling.temperature > 0:
            settings["seed"] = sampling.seed * _SEEDS_A_PROMPT + asked.samples[0]
        if sampling.top_k:
            settings["top_k"] = sampling.top_k
        return self._client.ask(pace, asked.number, asked.prompt, sampling.max_new_tokens, settings)


def _generation(reply: Reply, stops: Sequence[str]) -> Generation:
    if reply.filtered:
        return Generation(reply.text, (), "filtered")
    cuts = sorted((reply.text.index(stop), stop) for stop in stops if stop in reply.text)
    if cuts:
        return Generation(reply.text[: cuts[0][0]], (), "stop", cuts[0][1])
    if reply.finish == "length":  # it may have come inside a character
        return Generation(reply.text.rstrip("\N{REPLACEMENT CHARACTER}"), (), "length")
    return Generation(reply.text, (), "stop")
