"""The study's table on a terminal, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from medllm.report import paper
from medllm.report.results import Row, StudyTable
from medllm.report.statistics import Comparison, Estimate, StabilityChange

MINUS = "−"


def number(value: float, signed: bool = False) -> str:
    """Three decimals, with a real minus sign; ``signed`` also writes the plus of a difference. Never ``-0.000``."""
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", MINUS)


def interval(estimate: Estimate, signed: bool = False) -> str:
    """``[low, high]``."""
    return f"[{number(estimate.low, signed)}, {number(estimate.high, signed)}]"


def p_value(p: float) -> str:
    """``p = 0.012``, ``p < 0.001``: more digits than that say nothing."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def headings(table: StudyTable) -> tuple[str, ...]:
    """Model, one column a setting, stability where it can be had, and the comparison with the stage before."""
    stability = ("stability",) if table.stability_settings else ()
    return ("model", *table.settings, *stability, "change from the stage before")


def terminal_table(table: StudyTable, *, published: bool = False) -> Table:
    """A rich table: every value above its interval. ``published`` adds the paper's figures where it has such a row."""
    title = f"Points earned / points possible, {table.draw.confidence:.0%} intervals, {_problems(table)} problems"
    drawn = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    for index, heading in enumerate(headings(table)):
        drawn.add_column(heading, justify="left" if index == 0 or index > len(table.settings) + 1 else "right")
    if published:
        drawn.add_column("published (72B)", justify="right")
    for row in table.rows:
        cells = [Text(row.model, style="bold"), *(_two_lines(*pair) for pair in _estimates(table, row))]
        cells.append(Text("\n".join(changes(row)) or "–"))
        if published:
            cells.append(Text(published_scores(row.model)))
        drawn.add_row(*cells)
    return drawn


def markdown(table: StudyTable, *, published: bool = False) -> str:
    """The same table in GitHub's Markdown. ``published`` adds the paper's figures where it has such a row."""
    titles = [*headings(table), *(["published (72B)"] if published else [])]
    lines = [_markdown_row(titles), _markdown_row(["---", *["---:"] * (len(table.settings)), *["---"] * (len(titles) - len(table.settings) - 1)])]
    for row in table.rows:
        cells = [row.model]
        cells += [f"{value} {bounds}".strip() for value, bounds in _estimates(table, row)]
        cells.append("; ".join(changes(row)) or "–")
        if published:
            cells.append(published_scores(row.model))
        lines.append(_markdown_row(cells))
    return "\n".join(lines) + "\n"


def to_json(table: StudyTable) -> dict[str, Any]:
    """Every figure of the table as plain data, unrounded; a row that has a published counterpart carries it as ``published``."""
    rows = []
    for row in table.rows:
        mine = dataclasses.asdict(row)
        known = paper.published(row.model)
        mine["published"] = dataclasses.asdict(known) if known else None
        rows.append(mine)
    return {"settings": list(table.settings), "bootstrap": dataclasses.asdict(table.draw), "rows": rows}


def changes(row: Row) -> list[str]:
    """One line a setting (and one for stability): difference from the stage before, its interval, p."""
    lines = [f"{setting}: {change(comparison)}" for setting, comparison in row.against_previous.items()]
    if row.stability_change:
        lines.append(f"stability: {change(row.stability_change)}")
    return [f"from {row.previous}", *lines] if lines else []


def change(comparison: Comparison | StabilityChange) -> str:
    """``+0.034 [+0.010, +0.058], p = 0.004``."""
    difference = comparison.difference
    return f"{number(difference.value, True)} {interval(difference, True)}, {p_value(comparison.p_value)}"


def published_scores(model: str) -> str:
    """The paper's two scores and stability for such a model, ``–`` where it has none."""
    known = paper.published(model)
    if known is None:
        return "–"
    if known.explained is None or known.stability is None:
        return number(known.plain)
    return f"{number(known.plain)} / {number(known.explained)} ({number(known.stability, True)})"


def _estimates(table: StudyTable, row: Row) -> Iterator[tuple[str, str]]:
    for setting in table.settings:
        score = row.scores.get(setting)
        yield (number(score.score.value), interval(score.score)) if score else ("–", "")
    if table.stability_settings:
        yield (number(row.stability.value, True), interval(row.stability, True)) if row.stability else ("–", "")


def _problems(table: StudyTable) -> int:
    return next(iter(table.rows[0].scores.values())).problems


def _two_lines(value: str, bounds: str) -> Text:
    return Text.assemble(value, ("\n" + bounds, "dim"))


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
