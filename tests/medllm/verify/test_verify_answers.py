"""Runs that asked a model: every text is read and scored anew, and what was edited is named by its problem."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from medllm.cli import main
from medllm.config import ModelConfig, Sampling
from medllm.engine import Generation
from medllm.exam.loaders import write_problems
from medllm.journal import JOURNAL
from medllm.mini.problems import exam_problems, shot_problems, train_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world
from medllm.model.tokenizer import load_tokenizer
from medllm.preferences import curation
from medllm.provenance import PROVENANCE, output_digests
from medllm.stage_config import CurateConfig, EvaluateConfig
from medllm.stages import evaluate
from medllm.stages.curate import build_preferences
from medllm.stages.evaluate import sit_exam
from medllm.stages.problems import read_problems, read_shots
from medllm.verify.verifying import VerifyConfig, verify


class Rule:
    """Answers ``a`` to every other prompt and ``b`` to the rest, and runs on in some."""

    name = "openai"

    def generate(self, prompts, sampling, batch_size=32, progress=None):
        def one(number):
            cut = number % 5 == 4
            return Generation(f"text {number}\n Answer:{'ab'[number % 2]}", (), "length" if cut else "stop")

        return [[one(number + sample) for sample in range(sampling.samples)] for number in range(len(prompts))]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder, world = tmp_path_factory.mktemp("given"), make_world()
    write_problems(folder / "exam.jsonl", exam_problems(world, 2)[:6])
    write_problems(folder / "train.jsonl", train_problems(world, 1)[:5])
    write_problems(folder / "shots.jsonl", shot_problems(world, 3))
    return folder


@pytest.fixture(scope="module")
def exam(given, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "exam"
    files = (str(given / "exam.jsonl"),), str(given / "shots.jsonl")
    config = EvaluateConfig(ModelConfig("rule"), str(run), *files, explanation=True, template="curation")
    sit_exam(Rule(), read_problems(files[0], config)[0], read_shots(files[1], 3, config), config)
    return run


def curated(given, run, file="train.jsonl"):
    problems = (str(given / file),)
    config = CurateConfig(ModelConfig("rule"), str(run), problems, shot_count=1, sampling=Sampling(temperature=1.0, samples=3))
    build_preferences(Rule(), read_problems(problems, config)[0], (), config)
    return run


def refuted(run, **asked):
    certificate = verify(VerifyConfig(str(run), **asked))
    assert certificate.verdict == "refuted", certificate.headline()
    return [one.words for one in certificate.of("refuted")]


def copy_of(run, folder):
    return Path(shutil.copytree(run, folder / run.name))


def edit(file, change):
    """Change the row of a JSONL file that ``change`` wants changed."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        change(row)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def hide_changes(run):
    made = json.loads((run / PROVENANCE).read_text())
    (run / PROVENANCE).write_text(json.dumps({**made, "outputs": output_digests(run)}))


def test_honest_answers_are_proved_without_a_model(given, exam, tmp_path, capsys):
    before = {file: file.read_bytes() for file in exam.rglob("*") if file.is_file()}
    assert main(["verify", str(exam), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "predictions.jsonl: the answers: 6 texts read anew" in said.out
    assert "result.json: the score: 6 problems scored anew" in said.out
    assert "going on" not in said.err
    assert before == {file: file.read_bytes() for file in exam.rglob("*") if file.is_file()}
    certificate = verify(VerifyConfig(str(curated(given, tmp_path / "curated"))))
    assert certificate.verdict == "proved", certificate.headline()
    assert any(one.said == "15 texts read and ranked anew" for one in certificate.of("proved"))


def test_an_answer_edited_is_named_by_its_problem(exam, tmp_path):
    run = copy_of(exam, tmp_path)
    problem = json.loads((run / "predictions.jsonl").read_text().splitlines()[2])["problem_id"]

    def change(row):
        if row["problem_id"] == problem:
            row["prediction"] = "c"

    edit(run / "predictions.jsonl", change)
    assert "predictions.jsonl: the files it left: is not what it was" in refuted(run)
    hide_changes(run)
    assert refuted(run) == [f"predictions.jsonl: the answers: problem {problem}: its text says 'a', 'c' is recorded"]

    def change_text(row):
        if row["problem_id"] == problem:
            row["explanation"] = row["explanation"].replace("Answer:a", "Answer:c")

    edit(run / "predictions.jsonl", change_text)
    hide_changes(run)
    assert refuted(run) == [f"predictions.jsonl: the answers: problem {problem}: its text is not the one that was given"]
    # The journal too: then it is the score that is no longer what was recorded.
    edit(
        run / JOURNAL, lambda row: row["problem_id"] == problem and row.update(text=row["text"].replace("Answer:a", "Answer:c"))
    )
    hide_changes(run)
    assert any(one.startswith("result.json: the score: ") for one in refuted(run))


def test_a_score_edited_is_named(exam, tmp_path):
    run = copy_of(exam, tmp_path)
    result = json.loads((run / "result.json").read_text())
    result["score"]["points"] += 1
    (run / "result.json").write_text(json.dumps(result))
    points = result["score"]["points"]
    assert refuted(run) == [f"result.json: the score: score.points: {points} is recorded, it comes to {points - 1}"]


def test_a_choice_by_likelihood_is_made_anew(given, tmp_path, monkeypatch):
    class Likelihoods:
        name, tokenizer = "jax", load_tokenizer(str(BASE))

        def logprobs(self, continuations, batch_size=32):
            return [np.full(len(one.completion), -1.0 - number) for number, one in enumerate(continuations)]

    monkeypatch.setattr(evaluate, "open_scorer", lambda *_: Likelihoods())
    files = (str(given / "exam.jsonl"),)
    evaluate.run_evaluate(
        EvaluateConfig(ModelConfig(str(BASE)), str(tmp_path / "run"), files, method="options", on_bad_row="skip")
    )
    certificate = verify(VerifyConfig(str(tmp_path / "run")))
    assert certificate.verdict == "proved", certificate.headline()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    edited = copy.deepcopy(result)
    edited["results"][0]["nll"][-1] += 0.5  # which changes no choice
    (tmp_path / "run" / "result.json").write_text(json.dumps(edited))
    (said,) = refuted(tmp_path / "run")
    assert re.fullmatch(r"options\.journal: the likelihoods: problem \S+: the likelihood of option \d is not .* given", said)
    result["results"][0]["prediction"] = "e"
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    problem = result["results"][0]["problem_id"]
    assert refuted(tmp_path / "run") == [f"result.json: the score: problem {problem}: the likeliest option is a, e is recorded"]
    (tmp_path / "run" / "result.json").write_text("{}")
    assert refuted(tmp_path / "run") == ["result.json: the score: is not what such an exam leaves (KeyError)"]


def test_a_problem_that_was_changed_since_is_named(given, exam, tmp_path):
    mine = tmp_path / "exam.jsonl"
    shutil.copyfile(given / "exam.jsonl", mine)
    edit(mine, lambda row: row.update(choices=row["choices"][::-1]))
    run = copy_of(exam, tmp_path)
    settings = (run / "config.yaml").read_text().replace(str(given / "exam.jsonl"), str(mine))
    (run / "config.yaml").write_text(settings)
    said = refuted(run)
    assert "problems: the files it was made from: exam.jsonl is not what it was" in said
    assert any("was answered under another prompt" in one for one in said)


def test_a_leak_admitted_is_named_by_its_problem(given, tmp_path, monkeypatch):
    held_out = dataclasses.replace(train_problems(make_world(), 1)[0], problem_id="112A9", year=2018)
    write_problems(given / "late.jsonl", [*train_problems(make_world(), 1)[1:4], held_out])
    monkeypatch.setattr(curation, "refuse_held_out", lambda *_: None)
    run = curated(given, tmp_path / "run", "late.jsonl")
    monkeypatch.undo()
    (said,) = refuted(run)
    assert "problem 112A9 is of 2018, but only exams up to 2017 may enter training" in said


def test_a_sample_edited_in_the_preferences_is_named_by_its_problem(given, tmp_path):
    run = curated(given, tmp_path / "run")
    problem = json.loads((run / "preferences.jsonl").read_text().splitlines()[1])["problem_id"]
    edit(run / "preferences.jsonl", lambda row: row["problem_id"] == problem and row["rejected"].pop())
    hide_changes(run)
    (said,) = refuted(run)
    assert said.startswith(f"preferences.jsonl: the answers: problem {problem}: its responses are not those that were given")


def test_where_no_answer_can_be_read_anew_nothing_is_proved(exam, tmp_path, capsys):
    run = copy_of(exam, tmp_path)
    (run / JOURNAL).unlink()
    (run / PROVENANCE).unlink()
    assert main(["verify", str(run)]) == 1
    assert "nothing proved: the answers, the score could not be checked" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 2
