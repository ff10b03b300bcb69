"""The embedded study's report: the page every study gets, with what is particular to this one said at its top."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from medllm.mini.study import PREVIOUS, StudyResult
from medllm.report.page import write_report
from medllm.report.runs import report_from_runs

_SUMMARY = (
    "This is the embedded study: a model of a million parameters in a generated world. All diseases, drugs, tests and "
    "findings are invented; nothing here is medical knowledge, and no figure says how a large model would fare.",
)


def write_study_report(path: Path, result: StudyResult) -> Path:
    """Write the page of a finished study to ``path`` and return the path."""
    page = report_from_runs(result.runs, title="The embedded study", previous=PREVIOUS)
    return write_report(path, dataclasses.replace(page, summary=_SUMMARY))
