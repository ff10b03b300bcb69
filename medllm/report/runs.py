"""Finished run folders → what the report shows.

Each stage leaves ``config.yaml``, ``environment.json`` and ``result.json``; training adds ``metrics.jsonl``, curation
``preferences.jsonl``, evaluation ``predictions.jsonl`` and the per-problem rows of its score sheet. A file is what
``medllm score --json`` wrote of published predictions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medllm.errors import UserError
from medllm.exam.answers import Readings
from medllm.exam.endings import EndingCounts
from medllm.exam.flips import Answered, find_flips, read_answered
from medllm.exam.loaders import problems_at
from medllm.exam.problem import Problem
from medllm.exam.rows import read_json_lines
from medllm.exam.scoring import NO_GROUP, ProblemResult
from medllm.exam.setting import explained
from medllm.preferences.records import read_preferences
from medllm.report.labels import short_names
from medllm.report.questions import Questions, gather
from medllm.report.results import Cell
from medllm.report.sittings import Sitting, laid_out, read_sitting
from medllm.report.statistics import BOOTSTRAP, Bootstrap
from medllm.report.study import ReportInput, RunSummary, composition
from medllm.text_files import read_json_object, read_yaml

STAGES = ("cpt", "curate", "rpo", "evaluate", "options", "score")
_SAT = ("evaluate", "options", "score")
_TEXTS = ("problems_format", "layout", "on_bad_row", "shots", "template", "format", "answer_as")
_MOST_KINDS = 25  # a breakdown into more than this is a list, not a picture


@dataclasses.dataclass(frozen=True)
class _Sat:
    """A model in a setting, and where that is from."""

    path: Path
    run: RunSummary
    cell: Cell


def report_from_runs(
    paths: Sequence[str | Path],
    *,
    title: str = "Does the model still get it right when it has to explain itself?",
    previous: Mapping[str, str] | None = None,
    draw: Bootstrap = BOOTSTRAP,
) -> ReportInput:
    """Read run folders of any stages, and results of ``medllm score``; at least one of them is of an exam.

    Args:
        paths: Run folders and files, in the order in which models and stages are to be shown.
        title: Headline of the page.
        previous: For a model label, the one it started from; each with the one before it when unset.
        draw: How intervals are drawn.

    Raises:
        UserError: a folder or a file in it is missing or not as its stage writes it, or no evaluation is among the folders.
    """
    names = _names([Path(path) for path in paths])
    runs = tuple(dataclasses.replace(read_run(path), name=name) for path, name in zip(paths, names, strict=True))
    sat = [_Sat(Path(path), run, read_cell(run, path)) for path, run in zip(paths, runs, strict=True) if run.stage in _SAT]
    if not sat:
        given = ", ".join(map(str, paths)) or "none"
        raise UserError(f"a report needs a run of at least one 'medllm evaluate', or a 'medllm score --json'; given: {given}")
    short = short_names([one.cell.model for one in sat])
    sat = [dataclasses.replace(one, cell=dataclasses.replace(one.cell, model=short[one.cell.model])) for one in sat]
    exams = [one for one in sat if not one.cell.problem_set]
    problems = next(filter(None, (_problems_of(one.run) for one in exams if one.run.stage == "evaluate")), {})
    kind_name, kinds = _kinds(
        [problems[r.problem_id] for one in exams[:1] for r in one.cell.results if r.problem_id in problems]
    )
    return ReportInput(
        title=title,
        engine=", ".join(dict.fromkeys(str(run.result["engine"]) for run in runs if run.result.get("engine"))),
        environment=next((run.environment for run in reversed(runs) if run.environment), {}),
        cells=tuple(one.cell for one in exams),
        sets=tuple(one.cell for one in sat if one.cell.problem_set),
        runs=runs,
        preferences={
            run.name: composition(read_preferences(_present(Path(path) / "preferences.jsonl", "curation writes it")))
            for path, run in zip(paths, runs, strict=True)
            if run.stage == "curate"
        },
        questions=_questions(exams, problems) if exams else None,
        kinds=kinds,
        kind_name=kind_name,
        previous=previous and {short.get(name, name): short.get(before, before) for name, before in previous.items()},
        names={shown: name for name, shown in short.items() if shown != name},
        draw=draw,
    )


def read_run(path: str | Path) -> RunSummary:
    """One finished run folder, or the result of a ``medllm score``.

    Raises:
        UserError: neither, not finished, or a file that does not hold what its stage writes.
    """
    folder = Path(path)
    if folder.is_file():
        scored = read_json_object(folder, "")
        if scored.get("stage") != "score":
            raise UserError(f"{folder}: a report takes run folders, and what 'medllm score --json' wrote; this is neither")
        return RunSummary(folder.stem, "score", {}, (), scored)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    config = read_yaml(_present(folder / "config.yaml", "the folder is not a run of medllm"))
    environment = read_json_object(_present(folder / "environment.json", "the folder is not a run of medllm"), "")
    result = read_json_object(_present(folder / "result.json", "the run has not finished; finish it, or leave it out"), "")
    stage = result.get("stage")
    if stage not in STAGES:
        raise UserError(f"{folder / 'result.json'}: 'stage' is {stage!r}; a report takes {', '.join(STAGES)}")
    if stage in _SAT:
        _check_settings(config, folder / "config.yaml")
    return RunSummary(folder.resolve().name, stage, config, tuple(_metrics(folder / "metrics.jsonl")), result, environment)


def read_cell(run: RunSummary, path: str | Path) -> Cell:
    """The model, setting and per-problem results of a finished exam, :func:`read_run` of ``path``.

    Raises:
        UserError: its result is without label, setting or per-problem rows.
    """
    result, file = run.result, Path(path) if run.stage == "score" else Path(path) / "result.json"
    again = f"run 'medllm {'score' if run.stage == 'score' else 'evaluate'}' again to write"
    for name in ("model", "setting", *(["problem_set"] if run.stage == "options" else [])):
        if not isinstance(result.get(name), str):
            raise UserError(f"{file}: '{name}' is missing or no text; {again} it")
    sheet = result.get("score") if run.stage == "evaluate" else result
    where = "score.results" if run.stage == "evaluate" else "results"
    rows = sheet.get("results") if isinstance(sheet, dict) else None
    if not isinstance(sheet, dict) or not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: '{where}' holds no per-problem rows; {again} them")
    return Cell(
        result["model"],
        result["setting"],
        tuple(_problem_result(row, f"{file}: {where}[{index}]", again) for index, row in enumerate(rows)),
        EndingCounts.from_json(result.get("endings")),
        Readings.from_json(result.get("readings")),
        result.get("problem_set") or "",
        _tallies(sheet, "by_category", ("correct", "questions"), f"{file}: {{}}; {again} it"),
        _tallies(sheet, "by_year", ("points", "possible"), f"{file}: {{}}; {again} it"),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's own name; where two have the same, as much of their paths as tells them apart."""
    every = [folder.resolve().parts for folder in folders]

    def shortest(parts: tuple[str, ...]) -> str:
        endings = (parts[-length:] for length in range(1, len(parts)))
        return "/".join(next((end for end in endings if sum(other[-len(end) :] == end for other in every) == 1), parts))

    return [shortest(parts) for parts in every]


def _check_settings(config: Mapping[str, Any], file: Path) -> None:
    """What a report makes of an exam's settings, where it has them, is of the kind that the stage writes."""
    for name in _TEXTS:
        if not isinstance(config.get(name), str | None):
            raise UserError(f"{file}: '{name}' is no text; put the file of the run back")
    if not isinstance(config.get("explanation"), bool | None):
        raise UserError(f"{file}: 'explanation' is neither true nor false; put the file of the run back")
    problems = config.get("problems") or []
    if not isinstance(problems, list) or not all(isinstance(path, str) for path in problems):
        raise UserError(f"{file}: 'problems' is no list of file names; put the file of the run back")
    if not _is_count(config.get("shot_count") or 0):
        raise UserError(f"{file}: 'shot_count' is no whole number; put the file of the run back")


def _tallies(sheet: Mapping[str, Any], groups: str, counts: tuple[str, str], refusal: str) -> dict[str, tuple[int, int]]:
    """Two counts of each group of a score sheet; none of the problems that are in no group."""
    given = sheet.get(groups) or {}
    tallies = list(given.values()) if isinstance(given, Mapping) else [given]
    if not all(isinstance(tally, Mapping) and all(_is_count(tally.get(count)) for count in counts) for tally in tallies):
        raise UserError(refusal.format(f"'{groups}' has a group without the whole numbers {' and '.join(map(repr, counts))}"))
    return {name: (tally[counts[0]], tally[counts[1]]) for name, tally in given.items() if name != NO_GROUP}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 31


def _metrics(file: Path) -> Iterator[dict[str, float]]:
    """The lines of a training run; none where the stage logs nothing."""
    if not file.exists():
        return
    for line, where in read_json_lines(_present(file, "training writes it")):
        if "step" not in line or not all(isinstance(value, (int, float)) for value in line.values()):
            raise UserError(f"{where}: expected numbers by name and among them 'step'")
        yield line


def _problem_result(row: Any, where: str, again: str) -> ProblemResult:
    for name, holds, words in (
        ("problem_id", lambda value: isinstance(value, str), "text"),
        ("correct", lambda value: isinstance(value, bool), "true or false"),
        ("points", _is_count, "a whole number"),
    ):
        if not isinstance(row, dict) or not holds(row.get(name)):
            raise UserError(f"{where}: '{name}' is missing or not {words}; {again} it")
    return ProblemResult(row["problem_id"], row["correct"], row["points"], row.get("prediction"))


def _problems_of(run: RunSummary) -> dict[str, Problem]:
    """The problems an evaluation was run on, where its files are still where its configuration says."""
    here = [Path(path) for path in run.config.get("problems") or () if os.path.exists(path)]
    return {one.problem_id: one for path in here for one in problems_at(path, laid_out(run.config)).problems}


def _questions(exams: Sequence[_Sat], problems: Mapping[str, Problem]) -> Questions:
    """All questions with what was asked and said, and those that explaining lost or gained."""
    answers: dict[tuple[str, str], Mapping[str, Answered]] = {}
    sittings: list[Sitting | None] = []
    for one in exams:
        if one.run.stage != "evaluate":
            sittings.append(None)
            continue
        _present(one.path / "predictions.jsonl", "evaluation writes it")
        answers[one.cell.model, one.cell.setting] = mine = read_answered(one.path)
        sittings.append(read_sitting(one.path, one.run.config, mine, problems))
    flips = {
        model: find_flips(problems, plain, answers[model, explained(setting)])
        for (model, setting), plain in answers.items()
        if (model, explained(setting)) in answers and plain.keys() <= problems.keys()
    }
    return gather([one.cell for one in exams], problems, sittings, flips)


def _kinds(problems: Sequence[Problem]) -> tuple[str, dict[str, str]]:
    """The first of section, category and year that parts the problems into a few kinds."""
    for name in ("section", "category", "year"):
        kinds = {problem.problem_id: str(getattr(problem, name)) for problem in problems if getattr(problem, name) is not None}
        if 2 <= len(set(kinds.values())) <= _MOST_KINDS:
            return name, kinds
    return "kind", {}


def _present(file: Path, missing: str) -> Path:
    if not file.is_file():
        raise UserError(f"{file}: no such file; {missing}")
    if file.resolve().parent != file.parent.resolve():
        raise UserError(f"{file}: is a link out of the run folder, which is not followed; copy the file there")
    return file
