"""``medllm report``: run folders and scored predictions → tables on the terminal, a page or a file of tables, and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from medllm.command import say
from medllm.run import atomic_path


def report_arguments(parser: ArgumentParser) -> None:
    """The options of ``medllm report``."""
    parser.add_argument("runs", type=str, nargs="+", help="run folders of any stage, and what 'medllm score --json' wrote")
    parser.add_argument(
        "--format",
        type=Literal["html", "markdown", "latex", "csv"],
        default="html",
        help="a page to work in, or its tables alone with the published rows beside ours",
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="the file to write; report with the format's ending when unset"
    )
    parser.add_argument(
        "--previous", type=dict[str, str] | None, default=None, help="which model each is compared with, {B: A}"
    )


def write_and_say(values: Any) -> dict[str, Any]:
    """Write the page or the tables, and print its tables with the paper's figures beside them."""
    from medllm.report.formats import SUFFIX, WRITERS
    from medllm.report.page import report_from_runs, write_report
    from medllm.report.sets import terminal_sets
    from medllm.report.tables import terminal_table, terminal_text, to_json, years_to_json

    study = report_from_runs([Path(run) for run in values.runs], previous=values.previous)
    table, sets = study.table(), study.sets_table()
    out = values.out or f"report{SUFFIX[values.format]}"
    if values.format == "html":
        write_report(Path(out), study, table)
    else:
        with atomic_path(Path(out)) as scratch:
            scratch.write_text(WRITERS[values.format](table, study.cells, sets), encoding="utf-8")
    if table:
        say(terminal_text(terminal_table(table, published=True)))
    if sets:
        say(terminal_text(terminal_sets(sets)))
    say(f"report: {out}")
    return {
        "report": out,
        "scores": to_json(table) if table else None,
        "years": years_to_json(study.cells),
        "sets": sets.to_json() if sets else None,
    }
