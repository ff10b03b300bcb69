"""The embedded study's report: the page every study gets, with what is particular to this one said at its top."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from io import StringIO

from rich.console import Console

from medllm.mini.study import PREVIOUS, StudyResult
from medllm.report.results import StudyTable, build_table
from medllm.report.runs import report_from_runs
from medllm.report.study import ReportInput
from medllm.report.tables import terminal_table

_SUMMARY = (
    "This is the embedded study: a model of a million parameters in a generated world. All diseases, drugs, tests and "
    "findings are invented; nothing here is medical knowledge, and no figure says how a large model would fare.",
)


def study_report(result: StudyResult) -> ReportInput:
    """What the page of a finished study shows."""
    page = report_from_runs(result.runs, title="The embedded study", previous=PREVIOUS)
    return dataclasses.replace(page, summary=_SUMMARY)


def study_table(report: ReportInput) -> StudyTable:
    """The paper's table of the study: five models, two settings, what explaining costs."""
    return build_table(report.cells, previous=report.previous, draw=report.draw)


def table_text(table: StudyTable) -> str:
    """The table as it is shown in a terminal."""
    console = Console(file=StringIO(), width=max(80, shutil.get_terminal_size().columns), force_terminal=sys.stdout.isatty())
    console.print(terminal_table(table))
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
