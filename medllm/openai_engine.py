"""Models behind an OpenAI-compatible server (``--engine openai``): they answer exams, they are not trained here.

``model.path`` is the model's name on the server. The server is ``OPENAI_BASE_URL`` (OpenAI's own when unset), the key
``OPENAI_API_KEY``; servers that need no key (vLLM, llama.cpp) take any word.

A conversation goes to ``/chat/completions``. A text to continue goes to ``/completions``, which base models are served
with; wrapping it into a user's turn would change what is measured, so a server without that endpoint is an error that
says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import openai

from medllm.engine import Generation
from medllm.errors import UserError
from medllm.model.tokenizer import Prompt

if TYPE_CHECKING:
    from medllm.config import ModelConfig, Sampling

_RETRIES = 5  # the client backs off exponentially on 408, 409, 429 and 5xx
_TIMEOUT_SECONDS = 600.0  # a long explanation by a large model on a busy server
_MOST_REQUESTS = 32
_MOST_STOPS = 4  # what the API takes; the rest is cut here
_SEEDS_A_PROMPT = 1 << 16


@dataclass(frozen=True)
class Reply:
    """What a server answered to one request.

    Attributes:
        text: The text, as it came.
        finish: Why it ended, in the server's word.
        prompt_tokens: How many tokens the server made of the prompt; None where it does not say.
        thought: What it wrote before the answer and keeps apart from it (``reasoning_content``).
    """

    text: str
    finish: str | None
    prompt_tokens: int | None = None
    thought: str = ""


class OpenAIEngine:
    """Text generation through an OpenAI-compatible API.

    Args:
        model: Its ``path`` is the model's name on the server.
        url: The server, in place of ``OPENAI_BASE_URL``; one without keys needs none then.

    Raises:
        UserError: no key in the environment, or a setting that only a local model can have.
    """

    name = "openai"

    def __init__(self, model: ModelConfig, url: str | None = None):
        if model.adapter is not None:
            raise UserError("engine 'openai' cannot apply --model.adapter; serve the merged model, named by --model.path")
        self._key = os.environ.get("OPENAI_API_KEY", "") or ("none" if url else "")
        if not self._key:
            raise UserError("engine 'openai' needs OPENAI_API_KEY in the environment (any word for a server without keys)")
        self._model = model.path
        self._client = openai.OpenAI(api_key=self._key, base_url=url, max_retries=_RETRIES, timeout=_TIMEOUT_SECONDS)
        # OpenAI renamed the limit for chats and refuses the old name for new models; other servers know only the old one.
        server = urlsplit(str(self._client.base_url))
        self._chat_limit = "max_completion_tokens" if server.hostname == "api.openai.com" else "max_tokens"
        # Rebuilt for messages: the address as given may carry a password.
        self._where = f"model '{model.path}' at {server.scheme}://{server.netloc.rpartition('@')[2]}{server.path}"

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Generation]]:
        """``sampling.samples`` continuations for each prompt, in the order of the prompts, one request each.

        At most ``batch_size`` requests (and never more than 32) are under way. ``Generation.tokens`` is empty: the API gives
        text. The seed sent depends on ``sampling.seed`` and the sample's number; whether it is honoured is the server's affair.

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
        pool = ThreadPoolExecutor(max(1, min(batch_size, _MOST_REQUESTS)))
        try:
            futures = [
                [pool.submit(self._reply, prompt, sampling, sample) for sample in range(sampling.samples)] for prompt in prompts
            ]
            replies = []
            for done, of_prompt in enumerate(futures, 1):
                replies.append([future.result() for future in of_prompt])
                if progress:
                    progress(done, len(futures))
            return replies
        finally:
            pool.shutdown(cancel_futures=True)

    def _reply(self, prompt: Prompt, sampling: Sampling, sample: int) -> Reply:
        settings: dict[str, Any] = {"model": self._model, "temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.stop:
            settings["stop"] = list(sampling.stop[:_MOST_STOPS])
        if sampling.temperature > 0:
            settings["seed"] = sampling.seed * _SEEDS_A_PROMPT + sample
        if sampling.top_k:
            settings["extra_body"] = {"top_k": sampling.top_k}
        try:
            return self._ask(prompt, settings, sampling.max_new_tokens)
        except openai.APIError as error:
            # The cause is not chained: a traceback of the client may show the request, and the key with it.
            raise UserError(self._explain(error, prompt)) from None

    def _ask(self, prompt: Prompt, settings: dict[str, Any], limit: int) -> Reply:
        reply: Any
        if isinstance(prompt, str):
            reply = self._client.completions.create(prompt=prompt, max_tokens=limit, **settings)
        else:
            turns: Any = [message.to_json() for message in prompt]
            settings[self._chat_limit] = limit
            reply = self._client.chat.completions.create(messages=turns, **settings)
        if not reply.choices:
            raise UserError(f"{self._where}: the reply holds no text (no choices); is this an OpenAI-compatible server?")
        choice = reply.choices[0]
        text = choice.text if isinstance(prompt, str) else choice.message.content
        thought = "" if isinstance(prompt, str) else getattr(choice.message, "reasoning_content", None)
        used = reply.usage.prompt_tokens if reply.usage else None
        return Reply(text or "", choice.finish_reason, used, thought or "")

    def _explain(self, error: openai.APIError, prompt: Prompt) -> str:
        if isinstance(error, openai.APIConnectionError):
            return f"{self._where}: no answer ({type(error).__name__}); check OPENAI_BASE_URL and that the server runs"
        said = " ".join(error.message.split()).replace(self._key, "***")[:300]
        status = error.status_code if isinstance(error, openai.APIStatusError) else type(error).__name__
        advice = "check OPENAI_BASE_URL, OPENAI_API_KEY and --model.path"
        if isinstance(error, openai.NotFoundError) and isinstance(prompt, str):
            advice = "a server without /completions needs --format chat; otherwise check the model's name (--model.path)"
        elif isinstance(error, openai.BadRequestError):
            advice = "the model may not take this prompt's length or one of the --sampling settings"
        return f"{self._where}: refused ({status}: {said}); {advice}"


def _generation(reply: Reply, stops: Sequence[str]) -> Generation:
    cuts = sorted((reply.text.index(stop), stop) for stop in stops if stop in reply.text)
    if cuts:
        return Generation(reply.text[: cuts[0][0]], (), "stop", cuts[0][1])
    if reply.finish == "length":  # it may have come inside a character
        return Generation(reply.text.rstrip("\N{REPLACEMENT CHARACTER}"), (), "length")
    return Generation(reply.text, (), "stop")
