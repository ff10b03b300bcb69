"""The embedded study's report: the page every study gets, with what is particular to this one said at its top."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medllm.engines import TrainerName
from medllm.host.processes import is_primary_process
from medllm.host.progress import Say
from medllm.mini.study import PREVIOUS, StudyResult, run_study
from medllm.report.page import write_report
from medllm.report.runs import report_from_runs
from medllm.report.study import ReportInput
from medllm.report.tables import terminal_table, terminal_text, to_json
from medllm.run import write_json

NOTES = (
    "This is the embedded study: a model of two million parameters in a generated world. All diseases, drugs, tests and "
    "findings are invented; nothing here is medical knowledge, and no figure says how a large model would fare.",
)
"""What a reader of a page of this study must know."""


def run_and_report(engine_name: TrainerName, out_dir: str | Path, preset: str, progress: Say = print) -> dict[str, Any]:
    """:func:`run_study`, its report as ``report.html`` and its figures as ``result.json``; returns the figures."""
    result = run_study(engine_name, out_dir, preset, progress)
    report = study_report(result)
    table = report.table()
    assert table is not None, "a study sits its exam"
    page = Path(out_dir) / "report.html"
    figures = {
        "stage": "mini",
        "engine": engine_name,
        "preset": preset,
        "seconds": result.seconds,
        "scores": result.scores(),
        "table": to_json(table),
        "training": {model: asdict(summary) for model, summary in result.training.items()},
        "report": str(page),
    }
    if is_primary_process():
        write_report(page, report, table)
        write_json(Path(out_dir) / "result.json", figures)
    progress(terminal_text(terminal_table(table)))
    progress(f"mini: {result.seconds:.0f} s on {engine_name}; report: {page}")
    return figures


def study_report(result: StudyResult) -> ReportInput:
    """What the page of a finished study shows."""
    page = report_from_runs(result.runs, title="The embedded study", previous=PREVIOUS)
    return dataclasses.replace(page, summary=NOTES)
