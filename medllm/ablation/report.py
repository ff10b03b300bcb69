"""A study's end: its table on the terminal, as JSON, and a page for each exam."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from medllm.ablation.design import Design, slug
from medllm.ablation.evidence import EvidenceRow, Measured
from medllm.ablation.jobs import ONLY_EXAM, Plan
from medllm.exam.flips import CAUSES, Cause
from medllm.host.processes import is_primary_process
from medllm.host.progress import Say
from medllm.report.page import write_report
from medllm.report.runs import report_from_runs
from medllm.report.study import PlainTable
from medllm.report.tables import interval, number, p_value, terminal_text
from medllm.report.wording import kept_score
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
        shown, sentence = tables(mine, design.margin), answer(mine)
        report = report_from_runs(plan.first_runs(exam), previous=design.previous)
        if is_primary_process():
            write_report(page, dataclasses.replace(report, summary=tuple(notes), answer=sentence, tables=shown))
        for table in shown:
            say(terminal_text(drawn(table)))
        say(sentence)
    if is_primary_process():
        write_json(out / RESULT, figures)
    say(f"ablate: {', '.join(map(str, pages.values()))}")
    return figures


def answer(rows: Sequence[EvidenceRow]) -> str:
    """Of one exam, in a sentence: did the row that does best with an explanation keep its score when it gave one?"""
    both = [row for row in rows if row.stability is not None]
    if not both:
        return ""
    best = max(both, key=lambda row: list(row.scores.values())[-1].estimate.value)
    assert best.stability is not None
    score = number(list(best.scores.values())[-1].estimate.value)
    trainings = f", over {best.seeds} trainings" if best.seeds > 1 else ""
    return (
        f"{best.model} {kept_score(best.stability.estimate, best.kept)}; with an explanation it does best ({score}{trainings})."
    )


def tables(rows: Sequence[EvidenceRow], margin: float) -> tuple[PlainTable, ...]:
    """The tables of one exam: scores and what differs; and, where it was sat both ways, what flips come of."""
    settings, both = list(rows[0].scores), rows[0].stability is not None
    seeds, problems = max(row.seeds for row in rows), max(row.answered // row.seeds for row in rows)
    over = f"{seeds} trainings; intervals over problems and trainings" if seeds > 1 else "one training; intervals over problems"
    scores = PlainTable(
        f"{rows[0].exam}: points earned / points possible, {problems} problems, {over}",
        "In brackets the interval, below it the trainings one by one. Δ: minus the row that is named, with its p beside all "
        f"others of the table (Holm). Kept: the score with explanation is within {number(margin)} of the one without (two "
        "one-sided tests).",
        ("model", *settings, *(("stability", "kept") if both else ())),
        tuple(
            (
                (row.model,),
                *(_cell(row, name, row.scores[name], signed=False) for name in settings),
                *((_cell(row, "stability", row.stability, signed=True), _kept(row)) if row.stability else ()),
            )
            for row in rows
        ),
    )
    if not both:
        return (scores,)
    causes = [cause for cause in CAUSES if any(cause in side for row in rows for side in (row.lost, row.gained))]
    flips = PlainTable(
        "Problems lost and gained by explaining, by what was wrong with the answer that was wrong",
        "Over all trainings: right without explanation and wrong with it (lost), and the reverse (gained). "
        + "; ".join(f"{_short(cause)}: the text {CAUSES[cause]}" for cause in causes),
        ("model", "answers", "lost", "gained", *(_short(cause) for cause in causes)),
        tuple(
            (
                (row.model,),
                (f"{row.answered:,}",),
                (str(sum(row.lost.values())),),
                (str(sum(row.gained.values())),),
                *((f"{row.lost.get(cause, 0)} / {row.gained.get(cause, 0)}",) for cause in causes),
            )
            for row in rows
        ),
    )
    return scores, flips


def drawn(table: PlainTable) -> Table:
    """A table as a terminal shows it, its note below."""
    shown = Table(
        title=table.heading,
        title_justify="left",
        title_style="bold",
        caption=table.note,
        caption_justify="left",
        show_lines=any(len(lines) > 1 for row in table.rows for lines in row),
    )
    for index, heading in enumerate(table.columns):
        shown.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*("\n".join(lines) for lines in row))
    return shown


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


def _cell(row: EvidenceRow, name: str, measured: Measured, *, signed: bool) -> tuple[str, ...]:
    lines = [number(measured.estimate.value, signed), interval(measured.estimate, signed)]
    if len(measured.trainings) > 1:
        lines.append(" ".join(number(one, signed) for one in measured.trainings))
    for other, changes in row.changes.items():
        if change := changes.get(name):
            lines.append(f"Δ {other}: {number(change.difference.value, True)}, {p_value(change.adjusted_p)}")
    return tuple(lines)


def _kept(row: EvidenceRow) -> tuple[str, ...]:
    return ("yes" if row.kept.holds else "not shown", p_value(row.kept.p_value)) if row.kept else ("–",)


def _short(cause: Cause) -> str:
    return cause.replace("_", " ")
