"""What a server may answer, in place of a file: read by the client that every stage asks through."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import openai

from medllm.config import ModelConfig, Sampling
from medllm.engine import Continuation, Wanted
from medllm.exam.option_journal import KeptOption, OptionJournal
from medllm.journal import Journal, Kept
from medllm.mini.study import BASE
from medllm.model.tokenizer import Message, Prompt, load_tokenizer
from medllm.remote.engine import OpenAIEngine
from medllm.stage_config import ServerConfig
from tests.fuzz.format import Format
from tests.fuzz.mutations import damaged_json

REPLY = "reply.json"
_SETTINGS = ServerConfig(concurrency=1, retries=0, input_price=1.0, output_price=2.0, tokenizer=str(BASE))
_USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
_ABOUT = {"id": "1", "created": 0, "model": "m", "system_fingerprint": "f", "usage": _USAGE}
_SAID = "甲。\nAnswer:a"


def _completion(**choice: Any) -> dict[str, Any]:
    choices = [{"index": 0, "text": _SAID, "finish_reason": "stop", "logprobs": None} | choice]
    return {**_ABOUT, "object": "text_completion", "choices": choices}


def _chat() -> dict[str, Any]:
    message = {"role": "assistant", "content": _SAID, "reasoning_content": "考える", "refusal": None}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {**_ABOUT, "object": "chat.completion", "choices": choices}


@cache
def _scored() -> Continuation:
    tokens = load_tokenizer(BASE).encode("甲乙。")
    return Continuation(tuple(tokens[:1]), tuple(tokens[1:]))


def _scores() -> dict[str, Any]:
    count = len(_scored().prompt) + len(_scored().completion)
    found = [None, *[-1.5] * count]
    logprobs = {"tokens": ["甲"] * (count + 1), "token_logprobs": found, "top_logprobs": None, "text_offset": [0] * (count + 1)}
    return _completion(text="甲乙。甲", logprobs=logprobs)


_REFUSAL = {"error": {"message": "no", "type": "invalid_request_error", "code": "bad", "innererror": {"code": "ill"}}}


def _write(reply: dict[str, Any], folder: Path) -> None:
    (folder / REPLY).write_text(json.dumps(reply, ensure_ascii=False), encoding="utf-8")


@cache
def _engine(folder: Path, status: int) -> OpenAIEngine:
    """The engine before a server that answers everything with the file."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, content=(folder / REPLY).read_bytes(), headers={"content-type": "application/json"})

    stage: Any = SimpleNamespace(server=_SETTINGS)
    engine = OpenAIEngine(ModelConfig("m"), stage, "http://server/v1")
    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    engine._client._client = openai.OpenAI(api_key="none", base_url="http://server/v1", max_retries=0, http_client=http)
    return engine


def _asked(prompt: Prompt, status: int, folder: Path) -> None:
    """As a stage does: what it said goes into the run's journal, is read again, and is added up."""
    sampling = Sampling(max_new_tokens=8, stop=("。\n\n",))
    kept = folder / "answers.journal"
    kept.unlink(missing_ok=True)
    engine = _engine(folder, status)
    for came in engine.answers([Wanted(0, prompt, (0,))], sampling):
        Journal(kept).add(Kept("p", one.sample, "5b1c", one.said, one.facts) for one in came)
    engine.account(Journal(kept).facts)


def _asked_for_scores(status: int, folder: Path) -> None:
    engine = _engine(folder, status)
    for came in engine.scored([_scored()]):
        kept = [KeptOption("p", 0, "5b1c", -float(one.logprobs.sum()), len(one.logprobs), one.facts) for one in came]
        OptionJournal().add(kept)
        engine.account([one.facts for one in kept])


def _replies(reply: dict[str, Any], read: Callable[[Path], object], *, refused: bool = False) -> Format:
    return Format(partial(_write, reply), REPLY, read, (damaged_json,), refused=refused)


TALK = (Message("user", "どれか。"),)
REPLIES = {
    "server, a text": _replies(_completion(), partial(_asked, "どれか。", 200)),
    "server, a conversation": _replies(_chat(), partial(_asked, TALK, 200)),
    "server, log-probabilities": _replies(_scores(), partial(_asked_for_scores, 200)),
    "server, a refusal": _replies(_REFUSAL, partial(_asked, TALK, 400), refused=True),
    "server, a refusal to score": _replies(_REFUSAL, partial(_asked_for_scores, 400), refused=True),
}
