"""One self-contained HTML page: it opens offline, asks nothing of the network, and prints."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medllm.exam.flips import CAUSES
from medllm.report import flows, paper, plots, provenance, tables, wording
from medllm.report.flows import gaps
from medllm.report.results import StudyTable, breakdown
from medllm.report.runs import report_from_runs
from medllm.report.study import ReportInput, RunSummary
from medllm.report.templating import page_templates
from medllm.run import atomic_path

__all__ = ["ReportInput", "RunSummary", "StageCost", "render", "report_from_runs", "stage_cost", "write_report"]

LIMITATIONS = (
    "This is research software, not medical advice; a score on an exam is not clinical safety.",
    "A right answer says nothing about whether the explanation before it is sound: explanations are not graded here.",
    "Questions whose image is missing count like all others.",
    "An exam that was public before a model was trained may have been seen in training.",
)
_SECTIONS = {
    "trainings": "All trainings",
    "scores": "Scores",
    "why": "Why",
    "questions": "Questions",
    "figures": "Figures",
    "words": "What the figures say",
    "published": "Published results",
    "sets": "Zero-shot sets",
    "cost": "Training",
    "curation": "Curation",
    "contamination": "Contamination",
    "provenance": "What was run",
    "reproduce": "How to reproduce it",
    "limitations": "Limitations",
}
_OF_THE_TABLE = ("scores", "figures", "words", "published")
_RATES = {"cpt": "tokens/s", "rpo": "pairs/s"}
_SHOWN_ELSEWHERE = {
    *("stage", "engine", "steps", "loss", "seconds", "rate", "adapter", "model", "setting", "score", "pairs"),
    *("questions", "accuracy", "problem_set"),
}


@dataclass(frozen=True)
class StageCost:
    """One line of the cost table, as text; ``""`` where a run did not say."""

    name: str
    stage: str
    engine: str
    seconds: str
    steps: str
    rate: str
    pairs: str
    loss: str
    also: str


def write_report(path: str | Path, study: ReportInput, table: StudyTable | None = None) -> Path:
    """Write the report to ``path`` (an ``.html`` file), all of it or nothing, and return the path.

    ``table`` is the study's own, where it was drawn already.

    Raises:
        UserError: the cells cannot stand in one table (see :mod:`medllm.report.results` and :mod:`medllm.report.sets`).
    """
    target = Path(path)
    text = render(study, table)
    with atomic_path(target) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return target


def render(study: ReportInput, table: StudyTable | None = None) -> str:
    """The page as text (arguments: :func:`write_report`); what comes from a model, a file or a setting is escaped."""
    table = table or study.table()
    templates = page_templates()
    templates.filters.update(number=tables.number, interval=tables.interval, change=tables.change)
    return templates.get_template("report.html.j2").render(
        study=study,
        table=table,
        verdict=study.answer or (wording.verdict(table, study.equivalences()) if table else ""),
        origin=provenance.origin(study.environment),
        environment=provenance.environment_lines(study.environment),
        names=study.names,
        findings=wording.findings(table) if table else [],
        method=wording.method(table) if table else "",
        figures=_figures(study, table) if table else [],
        endings={
            (cell.model, cell.setting): "; ".join(part.words() for part in (cell.endings, cell.readings) if part)
            for cell in study.cells
        },
        sets=study.sets_table(),
        years=sorted({year for cell in study.cells for year in cell.by_year}),
        **_why(study),
        packed=study.questions.packed() if study.questions and study.questions.every else None,
        script_hash=_hash(templates.get_template("questions.js").render()),
        sections=[(id, heading) for id, heading in _SECTIONS.items() if _is_there(id, study, table)],
        curation=[plots.preferences(one, name) for name, one in study.preferences.items()],
        trained_on=provenance.trained_on(study.runs),
        commands=provenance.commands(study.runs),
        curves=[figure for run in study.runs if (figure := plots.training_curves(run))],
        costs=[stage_cost(run) for run in study.runs if run.stage != "score"],
        settings=[
            (run, yaml.safe_dump(_plain(run.config), sort_keys=False, allow_unicode=True)) for run in study.runs if run.config
        ],
        published={cell.model: paper.published(cell.model) for cell in study.cells},
        paper=paper,
        limitations=LIMITATIONS,
    )


def stage_cost(run: RunSummary) -> StageCost:
    """What a run took and made, from its ``result.json``."""
    result = run.result
    also = [f"{name} {_short(value)}" for name, value in result.items() if name not in _SHOWN_ELSEWHERE and _is_scalar(value)]
    return StageCost(
        name=run.name,
        stage=run.stage,
        engine=str(result.get("engine", "")),
        seconds=_duration(result["seconds"]) if _is_number(result.get("seconds")) else "",
        steps=f"{result['steps']:,}" if _is_number(result.get("steps")) else "",
        rate=_rate(result["rate"], run.stage) if _is_number(result.get("rate")) else "",
        pairs=f"{result['pairs']:,}" if _is_number(result.get("pairs")) else "",
        loss=f"{result['loss']:.4f}" if _is_number(result.get("loss")) else "",
        also=", ".join(also),
    )


def _is_there(section: str, study: ReportInput, table: StudyTable | None) -> bool:
    """Whether the page has a section."""
    given: dict[str, object] = {
        "trainings": study.tables,
        "why": study.questions and study.questions.flips,
        "questions": study.questions and study.questions.every,
        "sets": study.sets,
        "cost": study.runs,
        "curation": study.preferences,
        "reproduce": provenance.commands(study.runs),
    }
    return bool(given.get(section, table or section not in _OF_THE_TABLE))


def _why(study: ReportInput) -> dict[str, Any]:
    """The flips of every model: counted, and drawn."""
    found = gaps(study.cells, study.questions.flips, study.draw.confidence) if study.questions else ()
    return {
        "drawing": flows,
        "gaps": found,
        "flows": [flows.draw(gap) for gap in found],
        "causes": list(flows.SHORT.values()),
        "cause_words": {flows.SHORT[cause]: words for cause, words in CAUSES.items()},
    }


def _hash(script: str) -> str:
    """What the page's policy knows its one script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}"


def _figures(study: ReportInput, table: StudyTable) -> list[plots.Figure]:
    counts = Counter(study.kinds[result.problem_id] for result in study.cells[0].results if result.problem_id in study.kinds)
    drawn = [plots.scores(table), plots.slopes(table), plots.stabilities(table)]
    drawn.append(plots.kinds(breakdown(study.cells, study.kinds), study.kind_name, counts))
    return [figure for figure in drawn if figure]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _rate(rate: float, stage: str) -> str:
    return f"{rate:,.0f} {_RATES.get(stage, 'units/s')}" if rate >= 100 else f"{rate:.3g} {_RATES.get(stage, 'units/s')}"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda other: dict(other) if isinstance(other, Mapping) else str(other)))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))


def _is_number(value: Any) -> bool:
    """Whether it can be shown as one: what a stage measures is neither infinite nor beyond a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
