"""``medllm report``: run folders and scored predictions → tables on the terminal, one HTML page, and every figure as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from medllm.command import say


def report_arguments(parser: ArgumentParser) -> None:
    """The options of ``medllm report``."""
    parser.add_argument("runs", type=str, nargs="+", help="run folders of any stage, and what 'medllm score --json' wrote")
    parser.add_argument("--out", type=str, default="report.html", help="the page to write")
    parser.add_argument(
        "--previous", type=dict[str, str] | None, default=None, help="which model each is compared with, {B: A}"
    )


def write_and_say(values: Any) -> dict[str, Any]:
    """Write the page, and print its tables with the paper's figures beside them."""
    from medllm.report.page import report_from_runs, write_report
    from medllm.report.sets import terminal_sets
    from medllm.report.tables import terminal_table, terminal_text, to_json, years_to_json

    study = report_from_runs([Path(run) for run in values.runs], previous=values.previous)
    table, sets = study.table(), study.sets_table()
    write_report(Path(values.out), study, table)
    if table:
        say(terminal_text(terminal_table(table, published=True)))
    if sets:
        say(terminal_text(terminal_sets(sets)))
    say(f"report: {values.out}")
    return {
        "report": values.out,
        "scores": to_json(table) if table else None,
        "years": years_to_json(study.cells),
        "sets": sets.to_json() if sets else None,
    }
