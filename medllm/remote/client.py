"""Requests to an OpenAI-compatible server: each is answered, or sent again, or refused with what to do.

The key is in no message and no log.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import partial
from time import time
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import openai

from medllm.errors import PromptError, UserError
from medllm.facts import known_facts
from medllm.model.tokenizer import Prompt
from medllm.remote.pace import Pace
from medllm.remote.spending import estimated_tokens
from medllm.stage_config import ServerConfig

_USED_UP = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_FILTERED = {"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"}
_SENT_AGAIN = {408, 409, 425}
_NOT_TAKEN = re.compile("echo|validation error")  # what llama.cpp and llama-cpp-python say with a 500, as if they were ill
_LEAST, _ROUNDED = -1e30, 1e-3
"""Log-probabilities lie between: fp32 holds them, and none is above zero but by rounding."""
_NO_SCORES = "it does not score what it is given (vLLM does; OpenAI, llama.cpp and llama-cpp-python do not)"


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
    """What came of one request: its texts, and what is recorded of it (:func:`medllm.remote.spending.account`).

    No text: the server does not take several (``n``).
    """

    replies: tuple[Reply, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """Log-probabilities (natural) of the tokens that a server was given; None for the first, which follows nothing."""

    logprobs: tuple[float | None, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


class _SeveralRefused(Exception):
    """A server does not take ``n``."""


class _Filtered(Exception):
    """Its content filter refused a request."""


class _Lost(Exception):
    """A request without an answer: why, for how long the server asks to wait, and whether it is only too busy."""

    def __init__(self, why: str, advice: str, wait: float | None = None, busy: bool = False):
        super().__init__(why)
        self.why, self.advice, self.wait, self.busy = why, advice, wait, busy


_Answer = TypeVar("_Answer", Response, Scored)


@dataclass(frozen=True)
class _Request(Generic[_Answer]):
    """A call of the client that lacks the model's name, and what its reply is read as. ``number`` is the prompt's.

    ``scores``: it asks for log-probabilities of given tokens.
    """

    number: int
    create: Callable[..., Any]
    read: Callable[[Any], _Answer]
    is_text: bool
    several: int = 1
    scores: bool = False


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
            UserError: the request is refused, or the server gives no answer.
        """
        several, is_text = settings.get("n", 1), isinstance(prompt, str)
        body = {**(self._settings.fields or {}), **settings}
        if isinstance(prompt, str):
            create: Any = partial(self._client.completions.create, prompt=prompt, max_tokens=limit)
        else:
            turns: Any = [message.to_json() for message in prompt]
            limits: dict[str, Any] = {self.chat_limit: limit}
            create = partial(self._client.chat.completions.create, messages=turns, **limits)
        request = _Request(number, partial(create, extra_body=body), partial(_response, is_text=is_text), is_text, several)
        try:
            return self._answered(pace, estimated_tokens(prompt) + limit * several, request)
        except _Filtered:
            return Response((Reply("", "content_filter", filtered=True),) * several, {"filtered": True})
        except _SeveralRefused:
            return Response(())

    def score(self, pace: Pace, number: int, tokens: Sequence[int], says: str) -> Scored | None:
        """How likely the server finds given tokens, each after those before it. None once ``pace`` is closed.

        It is asked to give them back (``echo``) and to write one more, as vLLM does not take fewer.

        Args:
            pace: As for :meth:`ask`.
            number: Of the text, for errors.
            tokens: Its token ids.
            says: What the last of them say: a server that makes another text of them has another tokenizer.

        Raises:
            UserError: as for :meth:`ask`, or the server gives no log-probabilities of what it is given, or of other tokens.
        """
        body = {**(self._settings.fields or {}), "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0.0}
        create: Any = partial(self._client.completions.create, prompt=list(tokens), extra_body=body)
        request = _Request(number, create, partial(self._scored, tokens=tokens, says=says), is_text=True, scores=True)
        try:
            return self._answered(pace, len(tokens) + 1, request)
        except _Filtered:
            raise PromptError(number, f"{self._where}: its content filter refuses it") from None

    def _scored(self, reply: Any, tokens: Sequence[int], says: str) -> Scored:
        (choice,) = reply.choices
        found = getattr(choice.logprobs, "token_logprobs", None) or ()
        if not all(one is None or (type(one) in (int, float) and _LEAST < one <= _ROUNDED) for one in found):
            raise TypeError("log-probabilities that are none")
        if len(found) not in (len(tokens), len(tokens) + 1) or None in found[1 : len(tokens)]:
            raise UserError(
                f"{self._where}: gives {len(found)} log-probabilities for {len(tokens)} tokens: {_NO_SCORES}, or "
                "--server.tokenizer is another model's"
            )
        if _squeezed(says) not in _squeezed(choice.text):
            raise UserError(
                f"{self._where}: reads other words in the tokens of '{self._plain(says)}'; --server.tokenizer must be "
                "the served model's own"
            )
        return Scored(tuple(found[: len(tokens)]), _facts(reply))

    def _answered(self, pace: Pace, tokens: float, request: _Request[_Answer]) -> _Answer | None:
        """The answer to a request, with the number of times that it was sent again among its facts."""
        tries = faults = 0
        while (began := pace.begin(tokens)) is not None:
            tries += 1
            try:
                answer = self._send(request)
            except _Lost as lost:
                faults += not lost.busy  # one that is too busy for this request answers others, or none
                again = pace.failed(began, lost.wait)
                if not again or faults > self._settings.retries or (lost.wait or 0) > self._settings.timeout:
                    pace.close()
                    raise UserError(f"{self._where}: {lost.why}; tried {tries} times; {lost.advice}") from None
            except UserError:
                pace.close()
                raise
            except (_SeveralRefused, _Filtered):
                pace.answered()
                raise
            else:
                pace.answered()
                return replace(answer, facts={**answer.facts, **({"retries": tries - 1} if tries > 1 else {})})
        return None

    def _send(self, request: _Request[_Answer]) -> _Answer:
        # No cause is chained: a traceback of the client may show the request, and the key with it.
        try:
            reply = request.create(model=self._model)
        except openai.APIConnectionError as error:
            advice = "check OPENAI_BASE_URL and that the server runs"
            raise _Lost(f"no answer ({type(error).__name__})", advice) from None
        except openai.APIStatusError as error:
            raise self._refused(error, request) from None
        except (openai.APIError, ValueError, RecursionError) as error:
            raise _Lost(f"a reply that is broken ({type(error).__name__})", "is this an OpenAI-compatible server?") from None
        try:
            return request.read(reply)
        except (AttributeError, TypeError, ValueError):
            said = self._plain(reply if isinstance(reply, str) else json.dumps(reply, default=_fields))
            raise _Lost(f"the reply holds no text: {said}", "is this an OpenAI-compatible server?") from None

    def _refused(self, error: openai.APIStatusError, request: _Request[Any]) -> Exception:
        """What a refusal comes to."""
        status, codes = error.status_code, _codes(error.body)
        said = f"({status}: {self._plain(error.message)})"
        if codes & _FILTERED:
            return _Filtered()
        if codes & _USED_UP:
            return UserError(f"{self._where}: the quota is used up {said}; top it up, then go on")
        if status == 429:
            advice = "lower --server.concurrency, --server.requests_per_minute or --server.tokens_per_minute"
            return _Lost(f"too many requests {said}", advice, _asked_wait(error.response.headers), busy=True)
        if request.scores and (status in (400, 413, 422) or (status >= 500 and _NOT_TAKEN.search(error.message))):
            return PromptError(request.number, f"{self._where}: refused {said}; {_NO_SCORES}, or the text is too long for it")
        if status in _SENT_AGAIN or status >= 500:
            return _Lost(f"failed {said}", "see the server's log", _asked_wait(error.response.headers))
        if status in (400, 413, 422) and request.several > 1:
            return _SeveralRefused()
        if status in (400, 413, 422):
            advice = "the model may not take this prompt's length or one of the --sampling settings"
            return PromptError(request.number, f"{self._where}: refused {said}; {advice}")
        advice = "check OPENAI_BASE_URL, OPENAI_API_KEY and --model.path"
        if status == 404 and request.is_text:
            advice = "a server without /completions needs --format chat; otherwise check the model's name (--model.path)"
        return UserError(f"{self._where}: refused {said}; {advice}")

    def _plain(self, text: str) -> str:
        for secret in filter(None, (self._key, self._password)):
            text = text.replace(secret, "***")
        return " ".join(text.split())[:300]


def _response(reply: Any, is_text: bool) -> Response:
    """A reply of the client, read. An attribute or type error where it is none."""
    facts, replies = _facts(reply), []
    for choice in reply.choices:
        text = choice.text if is_text else choice.message.content
        thought = "" if is_text else getattr(choice.message, "reasoning_content", None)
        refusal = None if is_text else getattr(choice.message, "refusal", None)
        nothing = text is None and choice.finish_reason != "length"
        filtered = choice.finish_reason == "content_filter" or bool(refusal) or nothing
        text, thought = ("" if words is None else _whole(words) for words in (text, thought))
        replies.append(Reply(text, choice.finish_reason, facts.get("prompt_tokens"), thought, filtered))
    if not replies:
        raise TypeError("no choices")
    return Response(tuple(replies), facts)


def _facts(reply: Any) -> dict[str, Any]:
    """What is recorded of a request."""
    usage = reply.usage
    said = {
        "model": reply.model,
        "system_fingerprint": getattr(reply, "system_fingerprint", None),
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
    }
    return known_facts(said)


def _whole(text: str) -> str:
    """A text without halves of characters, which JSON can hold (a reply cut in an emoji) and no file can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _squeezed(text: str) -> str:
    """A text without spaces and halves of characters, of which servers make different ones."""
    return "".join(text.replace("\N{REPLACEMENT CHARACTER}", "").split())


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
