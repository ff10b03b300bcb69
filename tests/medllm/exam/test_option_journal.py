"""Options are scored in parts that are kept whole, and a run that goes on has the numbers of one that was never stopped."""

import json

import numpy as np
import pytest

from medllm.errors import UserError
from medllm.exam.option_journal import OPTION_JOURNAL, OptionJournal
from medllm.exam.option_scores import score_options
from medllm.exam.problem import Problem

PROBLEMS = [Problem(f"p{n}", f"問{n}", ("一", "二", "三")[: 2 + n % 2], ("a",), source=f"p.jsonl:{n + 1}") for n in range(5)]
OPTIONS = 12


class Characters:
    """A token a character."""

    def __call__(self, texts, add_special_tokens, verbose):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


class Engine:
    """Its numbers tell what was asked for together: another batch, another number."""

    name = "scripted"

    def __init__(self):
        self.calls = []

    def logprobs(self, continuations, batch_size=32):
        self.calls.append(len(continuations))
        together = sum(sum(one.prompt) for one in continuations)
        return [
            np.full(len(one.completion), -1 / (1 + (together + sum(one.completion)) % 97), np.float32) for one in continuations
        ]


def score(engine, folder, problems=PROBLEMS):
    journal = OptionJournal(folder / OPTION_JOURNAL)
    return score_options(engine, Characters(), problems, batch_size=2, journal=journal).results


def test_every_part_is_kept(tmp_path):
    engine = Engine()
    results = score(engine, tmp_path)
    assert engine.calls == [5, 5, 2]
    rows = [json.loads(line) for line in (tmp_path / OPTION_JOURNAL).read_text().splitlines()]
    assert [(row["problem_id"], row["option"], row["nll"]) for row in rows] == [
        (one.problem_id, option, nll) for one in results for option, nll in enumerate(one.nll)
    ]
    assert not any("facts" in row for row in rows)


@pytest.mark.parametrize("kept", range(OPTIONS + 1))
def test_a_run_that_goes_on_has_the_numbers_of_one_that_was_never_stopped(tmp_path, kept):
    whole = score(Engine(), tmp_path)
    file = tmp_path / OPTION_JOURNAL
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:kept]) + "".join(lines[kept : kept + 1])[:-3])  # the next one is torn
    engine = Engine()
    assert score(engine, tmp_path) == whole
    assert engine.calls == [5, 5, 2][(kept >= 5) + (kept >= 10) + (kept == 12) :]
    assert score(Engine(), tmp_path) == whole


def test_an_option_that_reads_otherwise_is_refused(tmp_path):
    score(Engine(), tmp_path)
    changed = [*PROBLEMS[:4], Problem("p4", "問4", ("一", "弐"), ("a",))]
    with pytest.raises(UserError, match="option 1 of problem p4 was scored under another prompt, or as another text") as error:
        score(Engine(), tmp_path, changed)
    assert str(tmp_path) in str(error.value)


def test_a_line_that_is_none_is_named(tmp_path):
    score(Engine(), tmp_path)
    file = tmp_path / OPTION_JOURNAL
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], '{"problem_id": "p0"}\n', *lines[1:]]))
    with pytest.raises(UserError, match=r"options\.journal:2: is no line of a journal"):
        score(Engine(), tmp_path)
