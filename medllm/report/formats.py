"""The report's tables for a README, a paper or a spreadsheet: Markdown, LaTeX and CSV, the published rows beside ours."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from medllm.report import paper
from medllm.report.results import Cell, Row, StudyTable
from medllm.report.sets import SetsTable
from medllm.report.statistics import Estimate
from medllm.report.tables import interval, number

Format = Literal["html", "markdown", "latex", "csv"]
SUFFIX: Mapping[Format, str] = {"html": ".html", "markdown": ".md", "latex": ".tex", "csv": ".csv"}
_NONE = "–"
_MARKED, _ESCAPED = re.compile(r"([\\`*_{}<>#|])"), r"\\\1"
_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_LATEX |= {"−": "$-$", "–": "--", "Δ": r"$\Delta$", "\u00a0": "~"}


@dataclass(frozen=True)
class Sheet:
    """A table of text: the first column names the row, the others are figures."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sheets(table: StudyTable | None, cells: Sequence[Cell], sets: SetsTable | None) -> list[Sheet]:
    """Scores, points by exam year and zero-shot sets, those that there are; published figures in rows of their own."""
    made = [_scores(table)] if table else []
    made += [_years(cells)] if any(cell.by_year for cell in cells) else []
    return made + ([_sets(sets)] if sets else [])


def markdown(made: Sequence[Sheet]) -> str:
    """Pipe tables under headings; a sign of Markdown's own in a model's name is escaped."""
    return "\n".join(_markdown(sheet) for sheet in made)


def latex(made: Sequence[Sheet]) -> str:
    """Tables of the package booktabs."""
    return "% \\usepackage{booktabs}\n" + "\n".join(_latex(sheet) for sheet in made)


def csv_text(table: StudyTable | None, cells: Sequence[Cell], sets: SetsTable | None) -> str:
    """A row a figure, unrounded: ``table,model,setting,measure,value,low,high,published``; empty where there is none.

    A cell that a spreadsheet would take for a formula begins with an apostrophe.
    """
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    rows.writerow(("table", "model", "setting", "measure", "value", "low", "high", "published"))
    for figure in _figures(table, cells, sets):
        rows.writerow(_harmless(cell) for cell in figure)
    return written.getvalue()


def _scores(table: StudyTable) -> Sheet:
    stability = ("stability",) if table.stability_settings else ()

    def ours(row: Row) -> tuple[str, ...]:
        scores = [_estimate(row.scores[setting].score if setting in row.scores else None) for setting in table.settings]
        return (row.model, *scores, *([_estimate(row.stability, True)] if stability else []))

    def theirs(known: paper.Published) -> tuple[str, ...]:
        values = [_value(known.value(setting)) for setting in table.settings]
        return (f"{known.model} (published)", *values, *([_value(known.stability, True)] if stability else []))

    rows = tuple(map(ours, table.rows)) + tuple(map(theirs, _known([row.model for row in table.rows])))
    title = f"Points earned / points possible, {table.draw.confidence:.0%} intervals"
    return Sheet(title, ("model", *table.settings, *stability), rows)


def _years(cells: Sequence[Cell]) -> Sheet:
    years = sorted({year for cell in cells for year in cell.by_year})
    rows = [
        (
            f"{cell.model}, {cell.setting}",
            *("/".join(map(str, cell.by_year[year])) if year in cell.by_year else _NONE for year in years),
            number(cell.mean_of_years),
        )
        for cell in cells
        if cell.by_year
    ]
    rows += [
        (
            f"{known.model} (published), {paper.PLAIN}",
            *(str(known.points(year) or _NONE) for year in years),
            number(known.plain),
        )
        for known in _known([cell.model for cell in cells])
        if known.years
    ]
    return Sheet("Points by exam year", ("model", *years, "mean share"), tuple(rows))


def _sets(sets: SetsTable) -> Sheet:
    rows: list[tuple[str, ...]] = []
    for row in sets.rows:
        shares = [_estimate(row.shares[name].accuracy if name in row.shares else None) for name in sets.sets]
        rows.append((f"{row.model}, {row.setting}", *shares, _value(row.mean)))
        published = [share.published if (share := row.shares.get(name)) else None for name in sets.sets]
        if any(value is not None for value in published):
            rows.append((f"{row.model} (published)", *map(_value, published), _value(row.published_mean)))
    return Sheet("Zero-shot: share of problems right", ("model", *sets.sets, "mean"), tuple(rows))


def _figures(table: StudyTable | None, cells: Sequence[Cell], sets: SetsTable | None) -> Iterator[tuple[object, ...]]:
    for row in table.rows if table else ():
        known = paper.published(row.model)
        for setting, score in row.scores.items():
            yield ("scores", row.model, setting, "score", *_bounds(score.score), known.value(setting) if known else None)
            yield ("scores", row.model, setting, "accuracy", *_bounds(score.accuracy), None)
        if row.stability:
            yield ("scores", row.model, "", "stability", *_bounds(row.stability), known.stability if known else None)
    for cell in cells:
        known = paper.published(cell.model) if cell.setting == paper.PLAIN else None
        for year, (earned, _) in cell.by_year.items():
            yield ("years", cell.model, cell.setting, year, earned, None, None, known.points(year) if known else None)
    for line in sets.rows if sets else ():
        for name, share in line.shares.items():
            yield ("sets", line.model, line.setting, name, *_bounds(share.accuracy), share.published)


def _known(models: Sequence[str]) -> list[paper.Published]:
    """The paper's rows for these models, each once."""
    return list(dict.fromkeys(known for model in models if (known := paper.published(model))))


def _estimate(estimate: Estimate | None, signed: bool = False) -> str:
    return f"{number(estimate.value, signed)} {interval(estimate, signed)}" if estimate else _NONE


def _value(value: float | None, signed: bool = False) -> str:
    return _NONE if value is None else number(value, signed)


def _bounds(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def _line(cell: str) -> str:
    return " ".join(cell.splitlines())


def _markdown(sheet: Sheet) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(_MARKED.sub(_ESCAPED, _line(cell)) for cell in cells)} |"

    rules = f"|---|{'---:|' * (len(sheet.headings) - 1)}"
    return "\n".join([f"## {sheet.title}", "", line(sheet.headings), rules, *map(line, sheet.rows), ""])


def _latex(sheet: Sheet) -> str:
    def line(cells: Sequence[str]) -> str:
        row = " & ".join("".join(_LATEX.get(sign, sign) for sign in _line(cell)) for cell in cells) + r" \\"
        return f"{{}}{row}" if row.startswith(("[", "*")) else row  # else an option of the \\ before it

    return "\n".join(
        [
            r"\begin{table}",
            r"\caption{" + line([sheet.title]).removesuffix(r" \\") + "}",
            r"\begin{tabular}{l" + "r" * (len(sheet.headings) - 1) + "}",
            r"\toprule",
            line(sheet.headings),
            r"\midrule",
            *map(line, sheet.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _harmless(cell: object) -> object:
    """No spreadsheet is to run what a model is called."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


WRITERS: Mapping[Format, Callable[[StudyTable | None, Sequence[Cell], SetsTable | None], str]] = {
    "markdown": lambda table, cells, sets: markdown(sheets(table, cells, sets)),
    "latex": lambda table, cells, sets: latex(sheets(table, cells, sets)),
    "csv": csv_text,
}
"""What writes each format but the page's."""
