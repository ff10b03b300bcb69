"""A study's table: means, intervals, changes and causes, of runs whose every answer is known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medllm.ablation.design import Design, RowDesign
from medllm.ablation.evidence import gather
from medllm.ablation.jobs import Sitting, plan
from medllm.ablation.report import conclude
from medllm.config import ModelConfig
from medllm.engine import Generation
from medllm.errors import UserError
from medllm.exam.loaders import write_problems
from medllm.exam.problem import Problem
from medllm.report.statistics import Bootstrap
from medllm.stages.evaluate import sit_exam

DRAW = Bootstrap(resamples=2000)
ROWS = {
    "base": RowDesign(),
    "CPT": RowDesign(start="base", cpt={}),
    "CPT+RPO": RowDesign(start="CPT", rpo={}, against=("RPO alone",)),
    "RPO alone": RowDesign(start="base", rpo={}),
}
PROBLEMS = tuple(
    Problem(f"{year}A{number:03d}", f"問い{year}の{number}番", tuple("甲乙丙丁戊"), ("a",), year=year, points=1 + number % 2)
    for year in (2018, 2019)
    for number in range(20)
)
RIGHT = {"base": (0.5, 0.2), "CPT": (0.8, 0.7), "CPT+RPO": (0.9, 0.9), "RPO alone": (0.5, 0.5)}
"""The share of problems that each row's trainings get right, without and with explanation."""


def is_right(row, training, explained, number):
    """Fixed, different for each training, and so often as RIGHT says."""
    draw = np.random.default_rng([list(RIGHT).index(row), training, explained]).permutation(len(PROBLEMS))
    return bool(draw[number] < RIGHT[row][explained] * len(PROBLEMS))


class Scripted:
    """Answers the problems in order, with a text whose cause is known where it is wrong."""

    name = "jax"

    def __init__(self, row, training, explained):
        self.mine = row, training, explained

    def generate(self, prompts, sampling, batch_size=32, progress=None):
        numbers = [next(n for n, problem in enumerate(PROBLEMS) if problem.text in prompt) for prompt in prompts]
        return [[self.one(number)] for number in numbers]

    def one(self, number):
        if is_right(*self.mine, number):
            return Generation("よって甲である。\nAnswer: a", (), "stop")
        if number % 4 == 0:
            return Generation("わからない話が続く、", (), "length")
        return Generation("考えた。\nAnswer: b", (), "stop")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("ablation") / "study"
    exam = out.parent / "exam.jsonl"
    write_problems(exam, PROBLEMS)
    design = Design(
        model=ModelConfig("base"),
        rows=ROWS,
        exams={"exam": {"problems": [str(exam)], "shot_count": 0}},
        seeds=3,
        curate={"problems": [str(exam)], "shot_count": 0},
        evaluate={"template": "curation"},
        opened="adapter",
    )
    planned = plan(design, out)
    configs = {Path(config.run): config for job in planned.jobs if isinstance(job, Sitting) for config in job.exams}
    for sat in planned.sat:
        for training, run in enumerate(sat.runs):
            sit_exam(Scripted(sat.row, training, sat.explained), PROBLEMS, (), configs[run])
    return design, planned, gather(design, planned, DRAW)


def shares(row, explained, trainings):
    points = np.array([problem.points for problem in PROBLEMS])
    right = [[is_right(row, training, explained, n) for n in range(len(PROBLEMS))] for training in range(trainings)]
    return (np.array(right) * points).sum(1) / points.sum()


def test_scores_are_means_over_trainings_with_that_of_each(study):
    _, _, rows = study
    assert [(row.model, row.seeds, row.over) for row in rows] == [
        ("base", 1, "problems"),
        ("CPT", 3, "both"),
        ("CPT+RPO", 3, "both"),
        ("RPO alone", 3, "both"),
    ]
    for row in rows:
        assert list(row.scores) == ["zero-shot", "zero-shot with explanation"]
        for explained, measured in enumerate(row.scores.values()):
            expected = shares(row.model, explained, row.seeds)
            np.testing.assert_allclose(measured.trainings, expected, rtol=1e-12)
            assert measured.estimate.value == pytest.approx(expected.mean(), rel=1e-12)
            assert measured.estimate.low < expected.mean() < measured.estimate.high


def test_stability_and_changes_are_differences_of_these(study):
    _, _, rows = study
    by_model = {row.model: row for row in rows}
    for row in rows:
        plain, explained = (shares(row.model, way, row.seeds) for way in (0, 1))
        np.testing.assert_allclose(row.stability.trainings, explained - plain, atol=1e-12)
        for other, changes in row.changes.items():
            before = by_model[other]
            for name, change in changes.items():
                mine, its = (
                    (row.stability, before.stability) if name == "stability" else (row.scores[name], before.scores[name])
                )
                assert change.difference.value == pytest.approx(mine.estimate.value - its.estimate.value, abs=1e-12)
            assert list(changes) == [*row.scores, "stability"]
    compared = {row.model: list(row.changes) for row in rows}
    assert compared == {"base": [], "CPT": ["base"], "CPT+RPO": ["CPT", "RPO alone"], "RPO alone": ["base"]}


def test_p_is_adjusted_over_the_whole_table(study):
    _, _, rows = study
    tests = [test for row in rows for changes in row.changes.values() for test in changes.values()]
    assert len(tests) == 12
    least = min(tests, key=lambda test: test.p_value)
    assert least.adjusted_p == pytest.approx(min(1.0, 12 * least.p_value))
    assert all(test.adjusted_p >= test.p_value for test in tests)


def test_flips_are_counted_over_all_trainings_by_their_cause(study):
    _, _, rows = study
    for row in rows:
        expected = {"lost": {}, "gained": {}}
        for training in range(row.seeds):
            for number in range(len(PROBLEMS)):
                plain, explained = (is_right(row.model, training, way, number) for way in (False, True))
                if plain != explained:
                    cause = "cut_off" if number % 4 == 0 else "reasoning"
                    counts = expected["lost" if plain else "gained"]
                    counts[cause] = counts.get(cause, 0) + 1
        assert (dict(row.lost), dict(row.gained)) == (expected["lost"], expected["gained"])


def test_a_score_is_kept_where_the_margin_holds_the_whole_interval(study):
    design, planned, rows = study
    assert not any(row.kept.holds for row in rows)
    wide = gather(replace(design, margin=0.9), planned, DRAW)
    assert all(row.kept.holds for row in wide)


def test_a_study_ends_with_its_table_a_page_and_a_file(study, tmp_path, monkeypatch):
    design, planned, rows = study
    monkeypatch.setattr(type(planned), "first_runs", lambda self, exam: tuple(one.runs[0] for one in self.sat))
    said = []
    figures = conclude(design, planned, rows, "jax", tmp_path, said.append)
    assert json.loads((tmp_path / "result.json").read_text()) == figures
    page = (tmp_path / "report.html").read_text()
    for row, plain in zip(rows, figures["rows"], strict=True):
        assert plain["model"] == row.model
        assert plain["seeds"] == row.seeds
        assert plain["causes"] == {"lost": dict(row.lost), "gained": dict(row.gained)}
        setting = plain["settings"]["zero-shot with explanation"]
        assert setting["interval"][0] < setting["score"] < setting["interval"][1]
        assert f"{row.model}</th>" in page
    assert said[-2].startswith("CPT+RPO ")
    assert said[-2] in page.replace("&#43;", "+")
    for heading in (
        "exam: points earned / points possible, 40 problems, 3 trainings",
        "Problems lost and gained by explaining",
    ):
        assert heading in page
        assert any(heading.split(",")[0] in text for text in said)


def test_an_exam_in_another_order_is_paired_by_its_problems_and_another_exam_is_refused(study, tmp_path):
    design, planned, rows = study
    run = planned.sat[-1].runs[-1]
    file = run / "result.json"
    before = file.read_text()
    result = json.loads(before)
    result["score"]["results"].reverse()
    file.write_text(json.dumps(result))
    assert gather(design, planned, DRAW) == rows
    result["score"]["results"].pop()
    file.write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"not the same problems as in the study's first run: 1 differ, e\.g\. 2018A000"):
        gather(design, planned, DRAW)
    file.write_text(before)
