"""The report's tables as Markdown, LaTeX and CSV, with the published rows beside ours; and the study's answer in a sentence."""

from __future__ import annotations

import csv
import dataclasses
import io
import re

import pytest

from medllm.cli import main
from medllm.exam.scoring import ProblemResult
from medllm.report import formats, tables, wording
from medllm.report.results import Cell, build_table
from medllm.report.statistics import Bootstrap, Estimate
from medllm.report.study import ReportInput
from tests.written_study import write_study

PLAIN, EXPLAINED = "3-shot", "3-shot with explanation"
DRAW = Bootstrap(resamples=200)


def cell(model: str, setting: str, right: int, problems: int = 40) -> Cell:
    results = tuple(ProblemResult(f"q{i}", i < right, 1, "a") for i in range(problems))
    return Cell(model, setting, results, by_year={"2018": (right, problems)})


def study(**models: tuple[int, int]) -> list[Cell]:
    return [cell(model, *one) for model, pair in models.items() for one in zip((PLAIN, EXPLAINED), pair, strict=True)]


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    named = study(base=(24, 10), other=(30, 30))
    return [dataclasses.replace(one, model={"other": "=a_1 & <b>|"}.get(one.model, one.model)) for one in named]


@pytest.fixture(scope="module")
def table(cells):
    return build_table(cells, draw=DRAW)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    return [str(folder) for folder in write_study(tmp_path_factory.mktemp("study"))[3:5]]


def rows_of(text: str) -> list[list[str]]:
    return [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]


def test_markdown_has_our_rows_and_the_papers_beside_them(cells, table):
    scores, years = formats.markdown(formats.sheets(table, cells, None)).split("## Points by exam year")
    head, base, other, paper = rows_of(scores)
    assert head == ["model", PLAIN, EXPLAINED, "stability"]
    assert [one.split()[0] for one in base[1:]] == ["0.600", "0.250", "−0.350"]
    assert other[0] == r"=a\_1 & \<b\>\|"
    assert paper == ["Qwen2.5-72B (published)", "0.802", "0.710", "−0.092"]
    assert rows_of(years)[1] == ["base, 3-shot", "24/40", "0.600"]
    assert rows_of(years)[-1] == ["Qwen2.5-72B (published), 3-shot", "412", "0.802"]


def test_latex_is_a_table_of_booktabs_whose_signs_are_set_as_they_are(cells, table):
    text = formats.latex(formats.sheets(table, cells, None))
    assert r"=a\_1 \& <b>| & 0.750" in text
    assert r"Qwen2.5-72B (published) & 0.802 & 0.710 & $-$0.092 \\" in text
    assert text.count(r"\begin{tabular}{lrrr}") == text.count(r"\begin{tabular}{lrr}") == 1
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\end{table}") == 2
    assert text.isascii()


def test_csv_has_every_figure_unrounded_and_nothing_that_a_spreadsheet_would_run(cells, table):
    rows = list(csv.DictReader(io.StringIO(formats.csv_text(table, cells, None))))
    base = table.rows[0]
    (stability,) = (row for row in rows if row["measure"] == "stability" and row["model"] == "base")
    assert [float(stability[name]) for name in ("value", "low", "high")] == list(dataclasses.astuple(base.stability))
    assert float(stability["published"]) == pytest.approx(-0.092)
    years = {(row["model"], row["setting"]): (row["value"], row["published"]) for row in rows if row["table"] == "years"}
    assert years["base", PLAIN] == ("24", "412")
    assert years["base", EXPLAINED] == ("10", "")
    assert {row["model"] for row in rows} == {"base", "'=a_1 & <b>|"}


@pytest.mark.parametrize(("format", "ending"), [("markdown", "md"), ("latex", "tex"), ("csv", "csv")])
def test_the_command_writes_the_tables_alone(folders, tmp_path, monkeypatch, format, ending):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *folders, "--format", format]) == 0
    assert [file.name for file in tmp_path.iterdir()] == [f"report.{ending}"]
    assert "0.802" in (tmp_path / f"report.{ending}").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("models", "begins", "says"),
    [
        ({"base": (24, 10), "CPT": (32, 31)}, "CPT was not seen to lose score", "while base lost 0.350"),
        ({"base": (30, 10), "CPT": (32, 20)}, "CPT lost score when it explained itself: −0.300", "better of the two (0.500)"),
        ({"base": (10, 24), "CPT": (20, 38), "RPO": (9, 9)}, "CPT gained score", "best of all (0.950)"),
    ],
)
def test_the_answer_is_of_the_model_that_does_best_with_an_explanation(models, begins, says):
    made = ReportInput("", "", {}, tuple(study(**models)), draw=DRAW)
    sentence = wording.verdict(made.table(), made.equivalences())
    assert sentence.startswith(begins)
    assert says in sentence


def test_a_score_is_kept_where_its_interval_lies_within_the_margin():
    cells = [cell("base", PLAIN, 300, 500), cell("base", EXPLAINED, 300, 500)]
    made = ReportInput("", "", {}, tuple(cells), draw=DRAW)
    found = made.equivalences()["base"]
    assert (found.margin, found.holds) == (0.02, True)
    assert wording.verdict(made.table(), {"base": found}).startswith(
        "base kept its score within 0.020 when it explained itself: 0.000"
    )
    few = ReportInput("", "", {}, tuple(study(base=(30, 30))), draw=DRAW)
    assert not few.equivalences()["base"].holds
    assert "a loss of up to" in wording.verdict(few.table(), few.equivalences())


def test_every_change_has_its_p_alone_and_among_all_of_the_table(table):
    for row in table.rows[1:]:
        for comparison in (*row.against_previous.values(), row.stability_change):
            assert comparison.adjusted_p >= comparison.p_value
            assert tables.change(comparison).endswith(f"Holm\u00a0{tables.p_value(comparison.adjusted_p)}")


def test_without_two_settings_there_is_no_answer():
    assert wording.verdict(build_table([cell("base", PLAIN, 3)], draw=DRAW), {}) == ""


@pytest.mark.parametrize(("low", "said"), [(-0.05, True), (-0.0006, True), (-0.0004, False), (0.0, False)])
def test_a_loss_that_rounds_to_nothing_is_not_spoken_of(low, said):
    assert ("not excluded" in wording.kept_score(Estimate(0.04, low, 0.089), None)) is said
