"""What damaged replies have found: each is left out, or the reply refused in a line."""

from __future__ import annotations

import json

import pytest

from medllm.errors import UserError
from medllm.journal import Journal
from tests.fuzz.formats import FORMATS


def asked(folder, name, change):
    kind = FORMATS[name]
    kind.example(folder)
    file = folder / kind.file
    reply = json.loads(file.read_text(encoding="utf-8"))
    change(reply)
    file.write_text(json.dumps(reply))
    kind.read(folder)


@pytest.mark.parametrize("name", ["server, a text", "server, a conversation"])
@pytest.mark.parametrize(
    ("fact", "wrong"),
    [
        ("model", ["m"]),
        ("model", "\ud83d"),
        ("system_fingerprint", {"f": 1}),
        ("prompt_tokens", "three"),
        ("prompt_tokens", 2.5),
        ("completion_tokens", [2]),
        ("completion_tokens", -1),
        ("completion_tokens", 10**400),
    ],
)
def test_what_a_server_says_of_a_request_is_left_out_where_it_is_none(tmp_path, name, fact, wrong):
    asked(tmp_path, name, lambda reply: (reply if fact in reply else reply["usage"]).update({fact: wrong}))
    (facts,) = Journal(tmp_path / "answers.journal").facts
    assert facts == {
        said: value
        for said, value in {"model": "m", "system_fingerprint": "f", "prompt_tokens": 3, "completion_tokens": 2}.items()
        if said != fact
    }


@pytest.mark.parametrize("wrong", ["f", [-1.5], {"a": 1}, True, float("nan"), float("inf"), -1e300, 2.5])
def test_log_probabilities_that_are_none_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="the reply holds no text"):
        asked(
            tmp_path,
            "server, log-probabilities",
            lambda reply: reply["choices"][0]["logprobs"]["token_logprobs"].__setitem__(1, wrong),
        )


@pytest.mark.parametrize("wrong", [False, 7, [], {"text": "甲"}])
def test_a_text_that_is_none_is_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="the reply holds no text"):
        asked(tmp_path, "server, a text", lambda reply: reply["choices"][0].update(text=wrong))


@pytest.mark.parametrize("facts", [{"model": ["m"]}, {"prompt_tokens": -1}, {"cost": 3}, [1]])
def test_a_journal_whose_facts_were_changed_is_refused(tmp_path, facts):
    asked(tmp_path, "server, a text", lambda reply: None)
    kept = tmp_path / "answers.journal"
    line = json.loads(kept.read_text(encoding="utf-8"))
    kept.write_text(f"{json.dumps(line | {'facts': facts})}\n{json.dumps(line)}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"answers\.journal:1: is no line of"):
        Journal(kept)
