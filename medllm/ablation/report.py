"""A study's end: its table on the terminal, as JSON, and a page for each exam."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from medllm.ablation.design import Design, slug
from medllm.ablation.evidence import EvidenceRow, Measured
from medllm.ablation.jobs import ONLY_EXAM, Plan
from medllm.ablation.work import Say
from medllm.exam.flips import CAUSES, Cause
from medllm.host.processes import is_primary_process
from medllm.report.page import write_report
from medllm.report.runs import report_from_runs
from medllm.report.tables import interval, number, p_value, terminal_text
from medllm.run import RESULT, write_json


def conclude(
    design: Design, plan: Plan, rows: Sequence[EvidenceRow], engine: str, out: Path, say: Say, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Write ``result.json`` and the pages of a finished study, say its tables, and return what the file holds.

    ``notes`` are paragraphs that stand at the top of each page.
    """
    pages = {exam: out / ("report.html" if exam == ONLY_EXAM else f"report-{slug(exam)}.html") for exam in design.exams}
    figures = {
        "stage": "ablate",
        "engine": engine,
        "seeds": design.seeds,
        "margin": design.margin,
        "rows": [row_json(row) for row in rows],
        "trainings": {row: [str(run) for run in runs] for row, runs in plan.trainings.items()},
        "reports": {exam: str(page) for exam, page in pages.items()},
    }
    for exam, page in pages.items():
        mine = [row for row in rows if row.exam == exam]
        report = report_from_runs(plan.first_runs(exam), previous=design.previous)
        if is_primary_process():
            write_report(page, dataclasses.replace(report, summary=(*notes, *summary(mine, design.margin))))
        say(terminal_text(evidence_table(mine)))
        for line in summary(mine, design.margin):
            say(line)
    if is_primary_process():
        write_json(out / RESULT, figures)
    say(f"ablate: {', '.join(map(str, pages.values()))}")
    return figures


def evidence_table(rows: Sequence[EvidenceRow]) -> Table:
    """A rich table of one exam: each value above its interval, that of each training, and its change."""
    seeds, settings = max(row.seeds for row in rows), list(rows[0].scores)
    spread = f", {seeds} trainings: intervals over problems and trainings" if seeds > 1 else ""
    problems = max(row.answered // row.seeds for row in rows)
    drawn = Table(
        title=f"{rows[0].exam}: points earned / points possible, {problems} problems{spread}; Δ to the row that is named, p "
        "adjusted (Holm)",
        title_justify="left",
        title_style="bold",
        show_lines=True,
    )
    for index, heading in enumerate(["model", *settings, *(["stability"] if rows[0].stability else [])]):
        drawn.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows:
        cells = [row.model]
        cells += [_cell(row, name, row.scores[name], signed=False) for name in settings]
        cells += [_cell(row, "stability", row.stability, signed=True)] if row.stability else []
        drawn.add_row(*cells)
    return drawn


def summary(rows: Sequence[EvidenceRow], margin: float) -> tuple[str, ...]:
    """Whether each row kept its score when it explained itself, and what its flips come of, a line a row."""
    lines = []
    for row in rows:
        if row.stability is None or row.kept is None:
            continue
        verdict = "kept its score" if row.kept.holds else "not shown to keep its score"
        changed = f"{number(row.stability.estimate.value, True)} {interval(row.stability.estimate, True)}"
        lines.append(
            f"{row.model}: {verdict} within {number(margin)} when it explained itself ({changed}); "
            f"lost {_causes(row.lost)}; gained {_causes(row.gained)}"
        )
    return tuple(lines)


def row_json(row: EvidenceRow) -> dict[str, Any]:
    """A row as plain data."""
    plain = dataclasses.asdict(row)
    del plain["lost"], plain["gained"]
    plain["settings"] = {name: _measured(one) for name, one in row.scores.items()}
    del plain["scores"]
    plain["stability"] = _measured(row.stability) if row.stability else None
    plain["causes"] = {"lost": dict(row.lost), "gained": dict(row.gained)}
    return plain


def _measured(one: Measured) -> dict[str, Any]:
    return {
        "score": one.estimate.value,
        "interval": [one.estimate.low, one.estimate.high],
        "trainings": list(one.trainings),
    }


def _cell(row: EvidenceRow, name: str, measured: Measured, *, signed: bool) -> str:
    lines = [number(measured.estimate.value, signed), interval(measured.estimate, signed)]
    if len(measured.trainings) > 1:
        lines.append(" ".join(number(one, signed) for one in measured.trainings))
    for other, changes in row.changes.items():
        if change := changes.get(name):
            lines += [f"vs {other}", f"Δ {number(change.difference.value, True)}, {p_value(change.adjusted_p)}"]
    return "\n".join(lines)


def _causes(counts: Mapping[Cause, int]) -> str:
    """``12: was cut off before it had answered (9), gave no answer that could be read (3)``; ``none``."""
    parts = ", ".join(f"{CAUSES[cause]} ({count})" for cause, count in counts.items())
    return f"{sum(counts.values())}: {parts}" if counts else "none"
