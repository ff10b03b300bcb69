"""The journal of a run's answers: written at once, read back, torn at any byte."""

import json
import os

import pytest

from medllm.engine import Generation
from medllm.errors import UserError
from medllm.journal import JOURNAL, Journal, Kept, digest
from medllm.model.tokenizer import Message

PROMPT = "Question: 空は何色か。\n Explanation:"
TEXTS = ("青い。\n Answer:a", 'He said "no" \\ \u2028', "", "最後🤔")


def kept(problem="p0", samples=range(4), prompt=PROMPT):
    return [Kept(problem, n, digest(prompt), Generation(TEXTS[n], (5, 6, 7), "stop", "\n\n")) for n in samples]


def texts(journal, problem="p0", prompt=PROMPT):
    return {sample: said.text for sample, said in journal.answers(problem, prompt).items()}


def test_what_is_written_is_read_again(tmp_path):
    Journal(tmp_path / JOURNAL).add(kept())
    read = Journal(tmp_path / JOURNAL)
    assert texts(read) == dict(enumerate(TEXTS))
    assert read.answers("p0", PROMPT)[0] == Generation(TEXTS[0], (), "stop", "\n\n")
    assert read.count("p0") == 4
    assert read.take("p0", PROMPT)[0] == Generation(TEXTS[0], (5, 6, 7), "stop", "\n\n")
    assert (dict(read.answers("p1", PROMPT)), read.count("p1")) == ({}, 0)
    first = json.loads((tmp_path / JOURNAL).read_text(encoding="utf-8").split("\n")[0])
    assert first.pop("prompt") == digest(PROMPT)
    assert first == {
        "problem_id": "p0",
        "sample": 0,
        "text": TEXTS[0],
        "tokens": [5, 6, 7],
        "finish": "stop",
        "stopped": "\n\n",
    }


def test_a_journal_torn_at_any_byte_loses_its_last_answer_alone(tmp_path):
    file = tmp_path / JOURNAL
    Journal(file).add(kept())
    whole = file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for torn in range(len(whole) + 1):
        file.write_bytes(whole[:torn])
        there = sum(end <= torn for end in ends)
        journal = Journal(file)
        assert texts(journal) == dict(enumerate(TEXTS[:there]))
        journal.add(kept(samples=range(there, 4)))
        assert file.read_bytes() == whole


def test_what_a_failing_disk_left_in_the_last_line_is_dropped_and_before_it_named(tmp_path):
    file = tmp_path / JOURNAL
    Journal(file).add(kept(samples=[0, 1]))
    good = file.read_bytes()
    file.write_bytes(good + b"\0\0\0\0\n")
    assert texts(Journal(file)) == dict(enumerate(TEXTS[:2]))
    assert file.read_bytes() == good
    file.write_bytes(b"\0\0\n" + good)
    with pytest.raises(UserError, match=rf"{JOURNAL}:1: is no line of a journal"):
        Journal(file)
    assert file.read_bytes() == b"\0\0\n" + good


def test_of_two_lines_for_an_answer_the_later_counts(tmp_path):
    file = tmp_path / JOURNAL
    Journal(file).add(kept(samples=[0]))
    Journal(file).add([Kept("p0", 0, digest(PROMPT), Generation("anew", (), "length"))])
    assert texts(Journal(file)) == {0: "anew"}
    assert Journal(file).count("p0") == 1


def test_answers_to_another_prompt_are_refused(tmp_path):
    Journal(tmp_path / JOURNAL).add(kept())
    said = ""
    try:
        Journal(tmp_path / JOURNAL).answers("p0", PROMPT.replace("空", "海"))
    except UserError as error:
        said = str(error)
    assert "problem p0 was answered under another prompt" in said


def test_a_digest_tells_prompts_apart():
    turns = (Message("system", "解く"), Message("user", "問"))
    prompts = (PROMPT, PROMPT + " ", "", turns, turns[::-1], turns[1:], (Message("user", "解く"), Message("user", "問")))
    assert len({digest(prompt) for prompt in prompts}) == len(prompts)


def test_answers_are_on_the_disk_when_they_are_said_to_be(tmp_path, monkeypatch):
    """Data first, with the folder that has the new name; one wait for all that came together."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    journal = Journal(tmp_path / JOURNAL)
    journal.add(kept())
    assert synced == [str(tmp_path / JOURNAL), str(tmp_path)]
    journal.add(kept("p1"))
    assert synced[2:] == [str(tmp_path / JOURNAL)]


def test_only_the_primary_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    journal = Journal(tmp_path / JOURNAL)
    journal.add(kept())
    assert texts(journal) == dict(enumerate(TEXTS))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(UserError, match=rf"{JOURNAL}: cannot be written \(No space left on device\)"):
        Journal(tmp_path / JOURNAL).add(kept())
