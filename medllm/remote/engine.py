"""Models behind an OpenAI-compatible server (``--engine openai``): they answer exams, they are not trained here.

``model.path`` is the model's name on the server. The server is ``OPENAI_BASE_URL`` (OpenAI's own when unset), the key
``OPENAI_API_KEY``; servers that need no key (vLLM, llama.cpp) take any word.

A conversation goes to ``/chat/completions``. A text to continue goes to ``/completions``, which base models are served
with; wrapping it into a user's turn would change what is measured, so a server without that endpoint is an error that
says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from medllm.config import MeshConfig, ModelConfig, Sampling
from medllm.engine import Answer, Generation, Wanted
from medllm.errors import UserError
from medllm.model.tokenizer import Prompt
from medllm.remote.client import Client, Reply, Response, SeveralRefused
from medllm.remote.pace import Pace
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
        UserError: no key in the environment, or a setting that only a local model can have.
    """

    name = "openai"

    def __init__(self, model: ModelConfig, stage: MeshConfig | None = None, url: str | None = None):
        if model.adapter is not None:
            raise UserError("engine 'openai' cannot apply --model.adapter; serve the merged model, named by --model.path")
        self._settings: ServerConfig = getattr(stage, "server", ServerConfig())
        self._client = Client(model.path, url, self._settings)
        self._takes_several = True

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
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
        progress: Callable[[int, int], None] | None = None,
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

    def account(self, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See :func:`medllm.remote.spending.account`."""
        return account(self._client.url, facts, self._settings)

    def _ask_all(self, wanted: Iterable[Wanted], sampling: Sampling, at_most: int) -> Iterator[list[tuple[Wanted, Response]]]:
        """What was asked and the responses, as they come; those samples that came of it, where it is not all."""
        at_most = max(1, min(at_most, self._settings.concurrency))
        source, again = iter(wanted), deque[Wanted]()
        pending: dict[Future[Response | None], Wanted] = {}
        failed: BaseException | None = None
        pace = Pace(self._settings)
        with ThreadPoolExecutor(at_most) as pool:
            try:
                while True:
                    while failed is None and len(pending) < at_most and (one := self._next(source, again)):
                        pending[pool.submit(self._ask, pace, one, sampling)] = one
                    if not pending:
                        break
                    came: list[tuple[Wanted, Response]] = []
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        asked = pending.pop(future)
                        try:
                            response = future.result()
                        except SeveralRefused:
                            self._takes_several = False
                            again.append(asked)
                        except UserError as error:
                            failed = failed or error
                        else:
                            came += self._received(asked, response, again)
                    if came:
                        yield came
            finally:
                pace.close()
        if failed:
            raise failed

    def _next(self, source: Iterator[Wanted], again: deque[Wanted]) -> Wanted | None:
        """The next request: of one sample, where the server does not take several."""
        one = again.popleft() if again else next(source, None)
        if one is None or self._takes_several or len(one.samples) == 1:
            return one
        again.extendleft(Wanted(one.number, one.prompt, (sample,)) for sample in reversed(one.samples[1:]))
        return Wanted(one.number, one.prompt, one.samples[:1])

    def _received(self, asked: Wanted, response: Response | None, again: deque[Wanted]) -> Iterator[tuple[Wanted, Response]]:
        """What came; samples that did not come with it are asked for again, one by one."""
        if response is None:  # the client was closed before it went
            return
        count = min(len(asked.samples), len(response.replies))
        if count < len(asked.samples):
            self._takes_several = False
            again.append(Wanted(asked.number, asked.prompt, asked.samples[count:]))
        yield Wanted(asked.number, asked.prompt, asked.samples[:count]), Response(response.replies[:count], response.facts)

    def _ask(self, pace: Pace, asked: Wanted, sampling: Sampling) -> Response | None:
        settings: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if len(asked.samples) > 1:
            settings["n"] = len(asked.samples)
        if sampling.stop:
            settings["stop"] = list(sampling.stop[:_MOST_STOPS])
        if sampling.temperature > 0:
            settings["seed"] = sampling.seed * _SEEDS_A_PROMPT + asked.samples[0]
        if sampling.top_k:
            settings["extra_body"] = {"top_k": sampling.top_k}
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
