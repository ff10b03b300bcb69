"""Zero-shot sets in their own table of the report, and predictions that were published, beside the paper's figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from medllm.cli import main
from medllm.errors import UserError
from medllm.exam.option_scores import OptionResult, OptionScores
from medllm.exam.predictions import Prediction, write_predictions
from medllm.exam.scoring import score
from medllm.report.page import render
from medllm.report.runs import report_from_runs
from medllm.run import Run
from medllm.stage_config import EvaluateConfig
from medllm.stages.evaluate import OptionsResult
from tests.written_study import DRAW, MODEL, problems, write_study


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    return write_study(tmp_path_factory.mktemp("study"))


SKY = ("anatomy", "genetics")


def options_run(path: Path, right: str, model: str = "Qwen2.5-72B", problem_set: str = "MedQA", **changes) -> Path:
    """A run by likelihood as its stage writes it; ``right`` has a digit a problem, and subjects take turns."""
    results = tuple(
        OptionResult(f"q{i}", ("a",), (1.0, 2.0) if digit == "1" else (2.0, 1.0), (1, 1), SKY[i % 2])
        for i, digit in enumerate(right)
    )
    scores = OptionScores(right.count("1") / len(right), 0.5, results, {})
    with Run(path, EvaluateConfig(MODEL, str(path), ("exam.jsonl",), method="options")) as run:
        run.finish(OptionsResult("jax", model, "zero-shot options", 1.5, {}, scores, problem_set).to_json() | changes)
    return path


def test_zero_shot_sets_stand_in_a_table_of_their_own(folders, tmp_path):
    runs = [
        options_run(tmp_path / "a", "1110" * 10),
        options_run(tmp_path / "b", "10" * 10, problem_set="MMMLU"),
        options_run(tmp_path / "c", "1000" * 10, "<b>", problem_set="MedQA"),
    ]
    table = report_from_runs(runs, draw=DRAW).sets_table()
    assert table.sets == ("MMMLU", "MedQA")
    base, other = table.rows
    assert [(share.right, share.problems, share.published) for share in base.shares.values()] == [
        (10, 20, 0.797),
        (30, 40, 0.652),
    ]
    assert base.mean == pytest.approx((0.5 + 0.75) / 2)
    assert base.published_mean == pytest.approx((0.797 + 0.652) / 2)
    assert {name: share.accuracy.value for name, share in base.subjects["MedQA"].items()} == {"anatomy": 1.0, "genetics": 0.5}
    assert (other.mean, other.published_mean, other.shares["MedQA"].published) == (None, None, None)
    # Wilson's interval of 30 in 40, from a table.
    assert (base.shares["MedQA"].accuracy.low, base.shares["MedQA"].accuracy.high) == pytest.approx((0.5981, 0.8581), abs=1e-4)
    alone, beside = (render(report_from_runs(paths, draw=DRAW)) for paths in (runs, [*folders[3:5], *runs]))
    for text in (alone, beside):
        section = text[text.index('<section id="sets">') :].split("</section>")[0]
        assert "published 0.652" in section
        assert "30/40" in section
        assert "MedQA by subject" in section
        assert "&lt;b&gt;" in section
    assert 'id="scores"' not in alone
    assert 'id="scores"' in beside


def test_a_set_asked_in_words_stands_among_the_sets_and_not_in_the_exams_table(folders, tmp_path):
    asked = problems()[:4]
    sheet = score(asked, [Prediction(one.problem_id, answer) for one, answer in zip(asked, "aaab", strict=True)]).to_json()
    config = EvaluateConfig(MODEL, "words", ("exam.jsonl",), shot_count=0, problem_set="MedQA")
    with Run(tmp_path / "words", config) as run:
        named = {"stage": "evaluate", "model": "CPT", "setting": "zero-shot", "problem_set": "MedQA"}
        run.finish({**named, "engine": "jax", "score": sheet})
    study = report_from_runs([folders[3], tmp_path / "words"], draw=DRAW)
    (row,) = study.sets_table().rows
    assert (row.setting, row.shares["MedQA"].right, row.shares["MedQA"].problems) == ("zero-shot", 3, 4)
    assert row.shares["MedQA"].published == 0.669
    assert [cell.model for cell in study.cells] == ["base"]


def test_sets_that_cannot_be_compared_are_refused(tmp_path):
    first = options_run(tmp_path / "a", "10")
    for second, message in (
        (options_run(tmp_path / "b", "10"), "set 'MedQA', model 'Qwen2.5-72B', setting 'zero-shot options': given twice"),
        (options_run(tmp_path / "c", "100", "other"), "set 'MedQA': models were asked 2 and 3 problems of it"),
    ):
        with pytest.raises(UserError, match=message):
            report_from_runs([first, second]).sets_table()
    for change, message in (
        ({"problem_set": 3}, "'problem_set' is missing or no text"),
        ({"results": []}, "'results' holds no"),
    ):
        (odd,) = (options_run(tmp_path / str(next(iter(change))), "10", **change),)
        with pytest.raises(UserError, match=message):
            report_from_runs([odd])


def test_published_predictions_stand_beside_the_runs_with_their_points_by_year(folders, tmp_path, capsys):
    answers = [Prediction(problem.problem_id, "a") for problem in problems()]
    write_predictions(tmp_path / "gpt4.jsonl", answers)
    scored, figures = tmp_path / "gpt4.json", tmp_path / "figures.json"
    said = ["--problems", str(folders[0].parent / "exam.jsonl"), "--predictions", str(tmp_path / "gpt4.jsonl")]
    assert main(["score", *said, "--label", "GPT-4", "--json", str(scored)]) == 0
    page = tmp_path / "report.html"
    assert main(["report", str(folders[3]), str(scored), "--out", str(page), "--json", str(figures)]) == 0
    assert re.search(r"GPT-4.*1\.000.*0\.782", capsys.readouterr().out)
    found = json.loads(figures.read_text())
    assert [(row["model"], row["published"]["plain"]) for row in found["scores"]["rows"]] == [("base", 0.802), ("GPT-4", 0.782)]
    assert found["sets"] is None
    points = sum(problem.points for problem in problems())
    assert found["years"][1]["years"] == {"2024": [points, points]}
    assert f"{points}/{points}" in page.read_text(encoding="utf-8")
    scored.write_text(json.dumps({"stage": "plan"}))
    with pytest.raises(UserError, match=r"gpt4\.json: a report takes run folders, and what 'medllm score --json' wrote"):
        report_from_runs([scored])
