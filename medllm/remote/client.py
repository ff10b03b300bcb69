"""Requests to an OpenAI-compatible server: each is answered, or sent again, or refused with what to do.

The key is in no message and no log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import urlsplit

import openai

from medllm.errors import PromptError, UserError
from medllm.model.tokenizer import Prompt
from medllm.remote.pace import Pace
from medllm.remote.spending import estimated_tokens
from medllm.stage_config import ServerConfig

_USED_UP = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_FILTERED = {"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"}
_SENT_AGAIN = {408, 409, 425}


@dataclass(frozen=True)
class Reply:
    """One text that a server answered with.

    Attributes:
        text: The text, as it came.
        finish: Why it ended, in the server's word.
        prompt_tokens: How many tokens the server made of the prompt; None where it does not say.
        thought: What it wrote before the answer and keeps apart from it (``reasoning_content``).
        filtered: It held back the text, or the rest of it: its content filter, a refusal, or null in place of a text.
    """

    text: str
    finish: str | None
    prompt_tokens: int | None = None
    thought: str = ""
    filtered: bool = False


@dataclass(frozen=True)
class Response:
    """What came of one request: its texts, and what is recorded of it (:func:`medllm.remote.spending.account`)."""

    replies: tuple[Reply, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


class SeveralRefused(Exception):
    """A server does not take ``n``."""


class _Lost(Exception):
    """A request without an answer: why, for how long the server asks to wait, and whether it is only too busy."""

    def __init__(self, why: str, advice: str, wait: float | None = None, busy: bool = False):
        super().__init__(why)
        self.why, self.advice, self.wait, self.busy = why, advice, wait, busy


class Client:
    """One model on one server.

    Args:
        model: Its name there.
        url: The server, in place of ``OPENAI_BASE_URL``; one without keys needs none then.
        settings: Pace, patience and prices.

    Raises:
        UserError: no key in the environment.
    """

    def __init__(self, model: str, url: str | None, settings: ServerConfig):
        self._key = os.environ.get("OPENAI_API_KEY", "") or ("none" if url else "")
        if not self._key:
            raise UserError("engine 'openai' needs OPENAI_API_KEY in the environment (any word for a server without keys)")
        self._model, self._settings = model, settings
        self._client = openai.OpenAI(api_key=self._key, base_url=url, max_retries=0, timeout=settings.timeout)
        # OpenAI renamed the limit for chats and refuses the old name for new models; other servers know only the old one.
        server = urlsplit(str(self._client.base_url))
        self._password = server.password or ""
        self.chat_limit = "max_completion_tokens" if server.hostname == "api.openai.com" else "max_tokens"
        # Rebuilt for messages: the address as given may carry a password.
        self.url = f"{server.scheme}://{server.netloc.rpartition('@')[2]}{server.path}"
        self._where = f"model '{model}' at {self.url}"

    def ask(self, pace: Pace, number: int, prompt: Prompt, limit: int, settings: Mapping[str, Any]) -> Response | None:
        """The answer to one prompt; sent again as often as the settings have it. None once ``pace`` is closed.

        Args:
            pace: Of all requests that are asked together. It is closed when one of them fails for good.
            number: Of the prompt, for errors.
            prompt: A text, which goes to ``/completions``, or a conversation, to ``/chat/completions``.
            limit: Most tokens of a text.
            settings: Other fields of the request; ``n`` among them.

        Raises:
            SeveralRefused: ``n`` is more than 1, and the request is refused.
            UserError: the request is refused, or the server gives no answer.
        """
        tokens = estimated_tokens(prompt) + limit * settings.get("n", 1)
        tries = faults = 0
        while (began := pace.begin(tokens)) is not None:
            tries += 1
            try:
                response = self._send(number, prompt, limit, settings)
            except _Lost as lost:
                faults += not lost.busy  # one that is too busy for this request answers others, or none
                again = pace.failed(began, lost.wait)
                if not again or faults > self._settings.retries or (lost.wait or 0) > self._settings.timeout:
                    pace.close()
                    raise UserError(f"{self._where}: {lost.why}; tried {tries} times; {lost.advice}") from None
            except UserError:
                pace.close()
                raise
            except SeveralRefused:
                pace.answered()
                raise
            else:
                pace.answered()
                return Response(response.replies, {**response.facts, **({"retries": tries - 1} if tries > 1 else {})})
        return None

    def _send(self, number: int, prompt: Prompt, limit: int, settings: Mapping[str, Any]) -> Response:
        # No cause is chained: a traceback of the client may show the request, and the key with it.
        try:
            reply: Any
            if isinstance(prompt, str):
                reply = self._client.completions.create(model=self._model, prompt=prompt, max_tokens=limit, **settings)
            else:
                turns: Any = [message.to_json() for message in prompt]
                limits: dict[str, Any] = {self.chat_limit: limit}
                reply = self._client.chat.completions.create(model=self._model, messages=turns, **limits, **settings)
        except openai.APIConnectionError as error:
            advice = "check OPENAI_BASE_URL and that the server runs"
            raise _Lost(f"no answer ({type(error).__name__})", advice) from None
        except openai.APIStatusError as error:
            return self._refused(error, number, prompt, settings.get("n", 1))
        except (openai.APIError, ValueError) as error:
            raise _Lost(f"a reply that is broken ({type(error).__name__})", "is this an OpenAI-compatible server?") from None
        try:
            return _response(reply, isinstance(prompt, str))
        except (AttributeError, TypeError):
            said = self._plain(reply if isinstance(reply, str) else json.dumps(reply, default=_fields))
            raise _Lost(f"the reply holds no text: {said}", "is this an OpenAI-compatible server?") from None

    def _refused(self, error: openai.APIStatusError, number: int, prompt: Prompt, several: int) -> Response:
        status, codes = error.status_code, _codes(error.body)
        said = f"({status}: {self._plain(error.message)})"
        if codes & _FILTERED:
            return Response((Reply("", "content_filter", filtered=True),) * several, {"filtered": True})
        if codes & _USED_UP:
            raise UserError(f"{self._where}: the quota is used up {said}; top it up, then go on") from None
        if status == 429:
            advice = "lower --server.concurrency, --server.requests_per_minute or --server.tokens_per_minute"
            raise _Lost(f"too many requests {said}", advice, _asked_wait(error.response.headers), busy=True) from None
        if status in _SENT_AGAIN or status >= 500:
            raise _Lost(f"failed {said}", "see the server's log", _asked_wait(error.response.headers)) from None
        if status in (400, 413, 422) and several > 1:
            raise SeveralRefused from None
        if status in (400, 413, 422):
            advice = "the model may not take this prompt's length or one of the --sampling settings"
            raise PromptError(number, f"{self._where}: refused {said}; {advice}") from None
        advice = "check OPENAI_BASE_URL, OPENAI_API_KEY and --model.path"
        if status == 404 and isinstance(prompt, str):
            advice = "a server without /completions needs --format chat; otherwise check the model's name (--model.path)"
        raise UserError(f"{self._where}: refused {said}; {advice}") from None

    def _plain(self, text: str) -> str:
        for secret in filter(None, (self._key, self._password)):
            text = text.replace(secret, "***")
        return " ".join(text.split())[:300]


def _response(reply: Any, is_text: bool) -> Response:
    """A reply of the client, read. An attribute or type error where it is none."""
    usage = reply.usage
    used = usage.prompt_tokens if usage else None
    replies = []
    for choice in reply.choices:
        text = choice.text if is_text else choice.message.content
        thought = "" if is_text else getattr(choice.message, "reasoning_content", None)
        refusal = None if is_text else getattr(choice.message, "refusal", None)
        nothing = text is None and choice.finish_reason != "length"
        filtered = choice.finish_reason == "content_filter" or bool(refusal) or nothing
        replies.append(Reply(_whole(text or ""), choice.finish_reason, used, thought or "", filtered))
    if not replies:
        raise TypeError("no choices")
    facts = {
        "model": reply.model,
        "system_fingerprint": getattr(reply, "system_fingerprint", None),
        "prompt_tokens": used,
        "completion_tokens": usage.completion_tokens if usage else None,
    }
    return Response(tuple(replies), {name: value for name, value in facts.items() if value is not None})


def _whole(text: str) -> str:
    """A text without halves of characters, which JSON can hold (a reply cut in an emoji) and no file can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _fields(model: Any) -> Any:
    return model.to_dict(warnings=False)


def _codes(body: Any) -> set[str]:
    """What an error calls itself, in the places where servers say it."""
    if not isinstance(body, dict):
        return set()
    own = {value for name in ("code", "type") if isinstance(value := body.get(name), str)}
    return own.union(*(_codes(body.get(name)) for name in ("error", "innererror")))


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, as a number or as a date."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        said = headers.get(name, "")
        try:
            return max(0.0, float(said) / unit)
        except ValueError:
            continue
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time())
    except ValueError:
        return None
