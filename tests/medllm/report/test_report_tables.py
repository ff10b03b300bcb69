"""The study's table: what stands in it, how it is printed, and that the paper's figures are the paper's."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from medllm.errors import UserError
from medllm.exam.scoring import ProblemResult
from medllm.report import page, paper, tables, wording
from medllm.report.results import Cell, breakdown, build_table
from medllm.report.statistics import Bootstrap, holm
from medllm.report.study import ReportInput

PLAIN, EXPLAINED = "3-shot", "3-shot with explanation"
DRAW = Bootstrap(resamples=500)
MODELS = ("base", "CPT", "RPO", "CPT + DPO", "CPT + RPO")


def cell(model: str, setting: str, right: str, points: str | None = None) -> Cell:
    """``right`` and ``points`` have a digit a problem."""
    worth = points or "1" * len(right)
    rows = enumerate(zip(right, worth, strict=True))
    return Cell(model, setting, tuple(ProblemResult(f"q{i}", mark == "1", int(point), "a") for i, (mark, point) in rows))


@pytest.fixture(scope="module")
def five_by_two() -> list[Cell]:
    rng = np.random.default_rng(0)
    chances = {"base": (0.6, 0.4), "CPT": (0.8, 0.7), "RPO": (0.65, 0.6), "CPT + DPO": (0.8, 0.75), "CPT + RPO": (0.8, 0.8)}
    return [
        cell(model, setting, "".join("1" if value < chance else "0" for value in rng.random(60)), "112" * 20)
        for model in MODELS
        for setting, chance in zip((PLAIN, EXPLAINED), chances[model], strict=True)
    ]


def test_scores_points_and_differences_are_counted_right():
    table = build_table(
        [
            cell("base", PLAIN, "1100", "1131"),
            cell("base", EXPLAINED, "1000", "1131"),
            cell("CPT", PLAIN, "1110", "1131"),
            cell("CPT", EXPLAINED, "0110", "1131"),
        ],
        draw=DRAW,
    )
    base, cpt = table.rows
    assert (base.scores[PLAIN].earned, base.scores[PLAIN].possible) == (2, 6)
    assert cpt.scores[PLAIN].score.value == pytest.approx(5 / 6)
    assert cpt.scores[PLAIN].accuracy.value == pytest.approx(3 / 4)
    assert base.stability.value == pytest.approx(-1 / 6)
    assert cpt.stability.value == pytest.approx(-1 / 6)
    assert base.previous is None
    assert not base.against_previous
    assert cpt.previous == "base"
    assert cpt.against_previous[PLAIN].difference.value == pytest.approx(3 / 6)
    assert (cpt.against_previous[EXPLAINED].gained, cpt.against_previous[EXPLAINED].lost) == (2, 1)
    assert cpt.stability_change.difference.value == pytest.approx(0.0)


def test_each_row_is_compared_with_the_stage_it_is_said_to_start_from(five_by_two):
    previous = {"CPT": "base", "RPO": "base", "CPT + DPO": "CPT", "CPT + RPO": "CPT"}
    rows = {row.model: row for row in build_table(five_by_two, previous=previous, draw=DRAW).rows}
    assert {model: row.previous for model, row in rows.items()} == {"base": None, **previous}
    for model, before in previous.items():
        apart = rows[model].scores[PLAIN].score.value - rows[before].scores[PLAIN].score.value
        assert rows[model].against_previous[PLAIN].difference.value == pytest.approx(apart)


def test_every_test_of_a_table_stands_beside_all_others(five_by_two):
    table = build_table(five_by_two, draw=DRAW)
    tests = [test for row in table.rows for test in (*row.against_previous.values(), row.stability_change) if test]
    assert len(tests) == 4 * 3
    assert [test.adjusted_p for test in tests] == pytest.approx(holm([test.p_value for test in tests]))
    smallest = min(tests, key=lambda test: test.p_value)
    assert smallest.adjusted_p == pytest.approx(min(1.0, 12 * smallest.p_value))
    (row,) = tables.to_json(build_table(five_by_two[:4], draw=DRAW))["rows"][1:]
    assert row["stability_change"]["adjusted_p"] >= row["stability_change"]["p_value"]


def test_problems_are_matched_by_id_not_by_place():
    shuffled = cell("CPT", PLAIN, "1100")
    shuffled = Cell(shuffled.model, shuffled.setting, shuffled.results[::-1])
    table = build_table([cell("base", PLAIN, "1100"), shuffled], draw=DRAW)
    comparison = table.rows[1].against_previous[PLAIN]
    assert (comparison.gained, comparison.lost) == (0, 0)


def test_columns_without_explanation_come_first_and_a_missing_cell_stays_empty():
    table = build_table([cell("base", EXPLAINED, "10"), cell("base", PLAIN, "11"), cell("CPT", PLAIN, "11")], draw=DRAW)
    assert table.settings == (PLAIN, EXPLAINED)
    assert table.rows[1].stability is None
    assert tables.lines(table, table.rows[1])[2:] == [("–",), ("–",)]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([], "at least one evaluated model"),
        ([cell("base", PLAIN, "10"), cell("base", PLAIN, "11")], "'base', setting '3-shot': given twice"),
        ([cell("base", PLAIN, "10"), cell("CPT", PLAIN, "101")], "'CPT', setting '3-shot': not the same problems.*q2"),
        ([cell("base", PLAIN, "10", "11"), cell("CPT", PLAIN, "10", "13")], "q1 is worth 3 points here and 1 for 'base'"),
        ([Cell("base", PLAIN, cell("base", PLAIN, "1").results * 2)], "problem_id appears twice"),
    ],
)
def test_cells_that_cannot_be_compared_are_refused(cells, message):
    with pytest.raises(UserError, match=message):
        build_table(cells, draw=DRAW)


def test_an_unknown_previous_stage_is_refused():
    with pytest.raises(UserError, match=r"'CTP'.*evaluated are: base, CPT"):
        build_table([cell("base", PLAIN, "1"), cell("CPT", PLAIN, "1")], previous={"CPT": "CTP"}, draw=DRAW)


def test_the_terminal_table_shows_every_score_and_interval(five_by_two):
    table = build_table(five_by_two, draw=DRAW)
    console = Console(file=io.StringIO(), width=120)
    console.print(tables.terminal_table(table, published=True))
    text = console.file.getvalue()
    for row in table.rows:
        assert row.model in text
        for score in row.scores.values():
            assert tables.number(score.score.value) in text
            assert tables.interval(score.score) in text
        assert tables.interval(row.stability, True) in text
    assert "0.868 / 0.868 (0.000)" in text
    assert "0.802 / 0.710 (−0.092)" in text


def test_the_terminal_table_fits_eighty_columns(five_by_two):
    console = Console(file=io.StringIO(), width=80)
    table = build_table(five_by_two, draw=DRAW)
    console.print(tables.terminal_table(table))
    for row in table.rows:
        assert tables.interval(row.stability, True) in console.file.getvalue()
        assert tables.interval(row.scores[EXPLAINED].score) in console.file.getvalue()


def test_json_carries_every_figure_unrounded_and_survives_a_round_trip(five_by_two):
    table = build_table(five_by_two, draw=DRAW)
    plain = json.loads(json.dumps(tables.to_json(table)))
    assert plain["settings"] == [PLAIN, EXPLAINED]
    assert plain["bootstrap"] == {"resamples": 500, "confidence": 0.95, "seed": 0, "method": "BCa"}
    last = plain["rows"][-1]
    assert last["scores"][EXPLAINED]["score"]["low"] == table.rows[-1].scores[EXPLAINED].score.low
    assert last["stability"]["value"] == table.rows[-1].stability.value
    assert last["published"]["explained"] == 0.868


def test_numbers_have_a_real_minus_sign_and_no_negative_zero():
    assert tables.number(-0.0341, True) == "−0.034"
    assert tables.number(0.0341, True) == "+0.034"
    assert tables.number(-0.0001, True) == "0.000"
    assert tables.p_value(0.0002) == "p\u00a0<\u00a00.001"
    assert tables.p_value(0.0421) == "p\u00a0=\u00a00.042"


def test_sentences_follow_the_intervals_not_the_values():
    flips = cell("CPT", EXPLAINED, "10" * 40)
    steady = build_table([cell("CPT", PLAIN, "01" * 20 + "10" * 20), flips], draw=DRAW)
    assert "show no difference" in wording.findings(steady)[0]
    falling = build_table([cell("CPT", PLAIN, "1" * 80), flips], draw=DRAW)
    assert wording.findings(falling)[0].startswith("CPT loses 0.500 by explaining first")
    rising = build_table([cell("CPT", PLAIN, "0" * 70 + "1" * 10), cell("CPT", EXPLAINED, "1" * 80)], draw=DRAW)
    assert wording.findings(rising)[0].startswith("CPT gains 0.875 by explaining first")


def test_a_breakdown_adds_up_to_the_whole():
    cells = [cell("base", PLAIN, "11001", "11131")]
    found = breakdown(cells, {"q0": "A", "q1": "B", "q2": "B", "q3": "B"})
    assert found == {"A": {("base", PLAIN): 1.0}, "B": {("base", PLAIN): pytest.approx(1 / 5)}}


def test_published_figures_agree_with_each_other():
    assert paper.published("CPT + RPO").stability == 0
    assert paper.published("Qwen2.5-72B").stability == pytest.approx(-0.092)
    assert paper.published("no such model") is None
    assert len({row.model for row in paper.IGAKUQA}) == len(paper.IGAKUQA) == 15


def test_every_name_leads_to_one_published_row():
    for row in paper.IGAKUQA:
        for label in (row.model, *row.labels):
            assert paper.published(label) is row
            assert paper.published(label.upper().replace(" + ", "+")) is row


def test_the_papers_figures_are_found_by_model_setting_and_set():
    value = paper.published_value
    assert [value("GPT-4o", setting) for setting in (PLAIN, EXPLAINED, "zero-shot")] == [0.866, 0.881, None]
    assert (value("GPT-4", PLAIN), value("GPT-4", EXPLAINED), value("mine", PLAIN)) == (0.782, None, None)
    by_letters = [value("Qwen2.5-72B-Instruct", "zero-shot letters", name) for name in paper.SETS]
    assert by_letters == [0.795, 0.626, 0.601, 0.714]
    assert value("Qwen2.5-72B", PLAIN, "MedQA") is value("Qwen2.5-72B", "zero-shot options", "sky") is None


def test_the_papers_means_are_those_of_its_sets_and_years():
    means = {row.model: sum(row.sets) / len(paper.SETS) for row in paper.IGAKUQA if row.sets}
    assert {model: round(mean, 3) for model, mean in means.items()} == pytest.approx(
        {"Preferred-MedLLM-Qwen-72B (CPT+RPO)": 0.716, "CPT": 0.710, "Qwen2.5-72B": 0.705, "Qwen2.5-72B-Instruct": 0.684},
        abs=6e-4,
    )
    for row in paper.IGAKUQA:
        assert not row.years or sum(row.years) / 2485 == pytest.approx(row.plain, abs=6e-4)


def test_points_by_year_stand_beside_the_papers():
    cells = [
        dataclasses.replace(cell(model, setting, "1"), by_year={"2018": (400, 499), "2022": (300, 500)})
        for model, setting in (("Qwen2.5-72B", PLAIN), ("Qwen2.5-72B", EXPLAINED), ("GPT-4", PLAIN))
    ]
    rows = tables.years_to_json([*cells, cell("no years", PLAIN, "1")])
    assert [row["published"] for row in rows] == [{"2018": 412, "2022": 399}, None, None]
    assert [row["mean"] for row in rows] == [pytest.approx((400 / 499 + 300 / 500) / 2)] * 3
    text = page.render(ReportInput("title", "jax", {}, tuple(cells), draw=DRAW))
    rows = text[text.index("Points by exam year") :].split("</tbody>")[0]
    assert re.search(r"published, 3-shot</td>\s*<td[^>]*>412</td><td[^>]*>399</td>\s*<td[^>]*>0\.802", rows)
    assert "400/499" in rows
