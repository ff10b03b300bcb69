"""Problems are answered in parts that are kept whole, and the parts that are kept are not asked for again."""

import json

import pytest

from medllm.config import Sampling
from medllm.engine import Generation
from medllm.errors import PromptError, UserError
from medllm.exam.answering import answered
from medllm.exam.problem import Problem
from medllm.journal import JOURNAL, Journal

PROBLEMS = [Problem(f"p{n}", f"問{n}", ("一", "二"), ("a",), source=f"p.jsonl:{n + 1}") for n in range(7)]
SAMPLING = Sampling(temperature=1.0, samples=2)


class Engine:
    """Its texts tell what was asked for together with them: another batch, another text."""

    name = "scripted"

    def __init__(self, folder, fails_at=None):
        self.folder, self.fails_at, self.calls, self.before = folder, fails_at, [], []

    def generate(self, prompts, sampling, batch_size=32, progress=None):
        if self.fails_at in prompts:
            raise PromptError(prompts.index(self.fails_at), "too long")
        self.before.append(len(lines(self.folder)))
        self.calls.append(list(prompts))
        return [[Generation(f"{prompt}/{n} of {prompts}", (1,), "stop") for n in range(sampling.samples)] for prompt in prompts]


def lines(folder):
    file = folder / JOURNAL
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def ask(engine, folder):
    journal = Journal(folder / JOURNAL)
    asked = answered(engine, PROBLEMS, lambda one: one.text, SAMPLING, batch_size=2, at_a_time=3, journal=journal)
    return [(problem.problem_id, prompt, [said.text for said in generations]) for problem, prompt, generations in asked]


def test_each_part_is_kept_before_the_next_is_asked_for(tmp_path):
    engine = Engine(tmp_path)
    found = ask(engine, tmp_path)
    assert [one[0] for one in found] == [problem.problem_id for problem in PROBLEMS]
    assert [len(call) for call in engine.calls] == [3, 3, 1]
    assert engine.before == [0, 6, 12]
    assert [(line["problem_id"], line["sample"]) for line in lines(tmp_path)] == [(f"p{n // 2}", n % 2) for n in range(14)]


@pytest.mark.parametrize("kept", range(15))
def test_a_run_that_goes_on_has_the_texts_of_one_that_was_never_stopped(tmp_path, kept, capsys):
    """Wherever its journal ends, within a part too, which is then asked for again as a whole."""
    whole = ask(Engine(tmp_path), tmp_path)
    file = tmp_path / JOURNAL
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:kept]))
    capsys.readouterr()
    engine = Engine(tmp_path)
    assert ask(engine, tmp_path) == whole
    assert [len(call) for call in engine.calls] == [3, 3, 1][kept // 6 if kept < 14 else 3 :]
    said = f"medllm: going on at {kept // 2} of 7 problems\n" if kept > 1 else ""
    assert capsys.readouterr().err == said


def test_a_prompt_that_is_refused_is_named_and_what_is_kept_is_said(tmp_path):
    with pytest.raises(
        UserError, match=r"^p\.jsonl:5: problem p4: too long; 3 of 7 problems are kept, the same command goes on"
    ):
        ask(Engine(tmp_path, fails_at="問4"), tmp_path)
    with pytest.raises(UserError, match=r"^p\.jsonl:1: problem p0: too long$"):
        ask(Engine(tmp_path / "other", fails_at="問0"), tmp_path / "other")
