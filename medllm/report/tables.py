"""The study's table on a terminal, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medllm.report import paper
from medllm.report.results import Cell, Row, StudyTable
from medllm.report.statistics import Comparison, Estimate, StabilityChange

MINUS = "−"


def number(value: float, signed: bool = False) -> str:
    """Three decimals, with a real minus sign; ``signed`` also writes the plus of a difference. Never ``-0.000``."""
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", MINUS)


def interval(estimate: Estimate, signed: bool = False) -> str:
    """``[low, high]``, in one piece at the end of a line."""
    return f"[{number(estimate.low, signed)},\u00a0{number(estimate.high, signed)}]"


def p_value(p: float) -> str:
    """``p = 0.012``, ``p < 0.001``: more digits than that say nothing."""
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p:.3f}"


def holm(adjusted_p: float | None) -> str:
    """``, Holm p = 0.036``; nothing where a test stands alone."""
    return "" if adjusted_p is None else f", Holm\u00a0{p_value(adjusted_p)}"


def headings(table: StudyTable) -> tuple[str, ...]:
    """Model, one column a setting, and stability where it can be had."""
    stability = ("stability",) if table.stability_settings else ()
    return ("model", *table.settings, *stability)


def lines(table: StudyTable, row: Row) -> list[tuple[str, ...]]:
    """A row's cells as short lines: model and what it is compared with; then value, interval, change and its ps."""
    cells: list[tuple[str, ...]] = [(row.model, f"vs {row.previous}") if row.against_previous else (row.model,)]
    for setting in table.settings:
        score, against = row.scores.get(setting), row.against_previous.get(setting)
        written = (number(score.score.value), interval(score.score)) if score else ("–",)
        cells.append((*written, *_change_lines(against)) if against else written)
    if table.stability_settings:
        written = (number(row.stability.value, True), interval(row.stability, True)) if row.stability else ("–",)
        cells.append((*written, *_change_lines(row.stability_change)) if row.stability_change else written)
    return cells


def change(comparison: Comparison | StabilityChange) -> str:
    """``Δ +0.034, p = 0.004, Holm p = 0.016``."""
    return ", ".join(_change_lines(comparison))


def terminal_table(table: StudyTable, *, published: bool = False) -> Table:
    """A rich table: each value above its interval and its change. ``published`` adds the paper's figures for such a row."""
    title = f"Points earned / points possible, {table.draw.confidence:.0%} intervals, {_problems(table)} problems"
    drawn = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    for index, heading in enumerate(headings(table)):
        drawn.add_column(heading, justify="right" if index else "left", overflow="fold")
    if published:
        drawn.add_column("published", justify="right")
    for row in table.rows:
        written = lines(table, row)
        cells = [Text.assemble((first, "bold"), *(("\n" + other, "dim") for other in others)) for first, *others in written]
        if published:
            cells.append(Text(published_scores(row.model)))
        drawn.add_row(*cells)
    return drawn


def terminal_text(drawn: Table) -> str:
    """A table as it is shown in a terminal."""
    console = Console(file=StringIO(), width=max(80, shutil.get_terminal_size().columns), force_terminal=sys.stdout.isatty())
    console.print(drawn)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def to_json(table: StudyTable) -> dict[str, Any]:
    """Every figure of the table as plain data, unrounded; a row the paper has too carries its figures as ``published``."""
    rows = []
    for row in table.rows:
        mine = dataclasses.asdict(row)
        known = paper.published(row.model)
        mine["published"] = dataclasses.asdict(known) if known else None
        rows.append(mine)
    return {"settings": list(table.settings), "bootstrap": dataclasses.asdict(table.draw), "rows": rows}


def years_to_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Points earned and possible by exam year, of each cell that has years, with the paper's points where it has them."""
    return [
        {
            "model": cell.model,
            "setting": cell.setting,
            "years": {year: list(points) for year, points in cell.by_year.items()},
            "mean": cell.mean_of_years,
            "published": {year: known.points(year) for year in cell.by_year}
            if known and known.years and cell.setting == paper.PLAIN
            else None,
        }
        for cell in cells
        if cell.by_year
        for known in [paper.published(cell.model)]
    ]


def published_scores(model: str) -> str:
    """The paper's two scores and stability for such a model, ``–`` where it has none."""
    known = paper.published(model)
    if known is None:
        return "–"
    if known.explained is None or known.stability is None:
        return number(known.plain)
    return f"{number(known.plain)} / {number(known.explained)} ({number(known.stability, True)})"


def _change_lines(comparison: Comparison | StabilityChange) -> tuple[str, ...]:
    written = f"Δ\u00a0{number(comparison.difference.value, True)}", p_value(comparison.p_value)
    return written if comparison.adjusted_p is None else (*written, f"Holm\u00a0{p_value(comparison.adjusted_p)}")


def _problems(table: StudyTable) -> int:
    return next(iter(table.rows[0].scores.values())).problems
