"""From the per-problem results of several models in several settings to the study's table.

Rows are models, columns are settings. What a row adds to two scores is the question of the study: its *stability* (score with
explanation minus score without) and whether it differs from the stage before it by more than chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from medllm.errors import UserError
from medllm.exam.answers import Readings
from medllm.exam.endings import EndingCounts
from medllm.exam.scoring import ProblemResult, mean_share
from medllm.exam.setting import explained, explains
from medllm.report import statistics
from medllm.report.statistics import BOOTSTRAP, Bootstrap, Comparison, Estimate, StabilityChange


@dataclass(frozen=True)
class Cell:
    """One model in one setting (named by :mod:`medllm.exam.setting`).

    Attributes:
        model: Its label.
        setting: The setting.
        results: Problem by problem.
        endings: How its texts ended, where it wrote any.
        readings: How they were read.
        problem_set: The zero-shot set that the problems are of; empty where they are an exam.
        by_category: By subject: problems right, problems asked.
        by_year: By exam year: points earned, points possible.
    """

    model: str
    setting: str
    results: tuple[ProblemResult, ...]
    endings: EndingCounts | None = None
    readings: Readings | None = None
    problem_set: str = ""
    by_category: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    by_year: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def mean_of_years(self) -> float:
        """Mean over exam years of points earned / points possible: the paper's score. 0 where no points are possible."""
        return mean_share(self.by_year.values())


@dataclass(frozen=True)
class Score:
    """What a cell comes to.

    Attributes:
        score: Points earned over points possible, with its bootstrap interval.
        accuracy: Share of problems right, each counted once, with its Wilson interval.
        earned: Points earned.
        possible: Points possible.
        problems: Number of problems, those worth no points included.
    """

    score: Estimate
    accuracy: Estimate
    earned: int
    possible: int
    problems: int


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        model: Its label.
        scores: By setting; a setting the model was not run in is absent.
        stability: Score with explanation minus score without, where both were run.
        previous: The model it is compared with, where there is one.
        against_previous: This model minus the previous one, by setting.
        stability_change: Its stability minus the previous model's.
    """

    model: str
    scores: Mapping[str, Score]
    stability: Estimate | None
    previous: str | None
    against_previous: Mapping[str, Comparison]
    stability_change: StabilityChange | None


@dataclass(frozen=True)
class StudyTable:
    """Rows of models, columns of settings (those without explanation first), and how the intervals were drawn."""

    settings: tuple[str, ...]
    rows: tuple[Row, ...]
    draw: Bootstrap

    @property
    def stability_settings(self) -> tuple[str, str] | None:
        """The two settings whose difference is the stability, where the study has both."""
        return _stability_settings(self.settings)


def build_table(cells: Sequence[Cell], *, previous: Mapping[str, str] | None = None, draw: Bootstrap = BOOTSTRAP) -> StudyTable:
    """Scores, stability, and the comparison of each row with the one it came from; the tests with their p adjusted together.

    Args:
        cells: One for each model and setting that was run; rows come in the order in which models first appear.
        previous: For a model, the one it is compared with (the stage it started from); each row with the row above when unset.
        draw: How intervals are drawn.

    Raises:
        UserError: no cells, the same cell twice, cells that are not of the same problems, or an unknown model in ``previous``.
    """
    if not cells:
        raise UserError("a table needs at least one evaluated model: give the run folder of a 'medllm evaluate'")
    models = list(dict.fromkeys(cell.model for cell in cells))
    settings = tuple(sorted(dict.fromkeys(cell.setting for cell in cells), key=explains))
    if previous is None:
        previous = dict(zip(models[1:], models, strict=False))
    for name in {*previous, *previous.values()} - set(models):
        raise UserError(f"'{name}' is to be compared but was not evaluated; evaluated are: {', '.join(models)}")
    points, answers = _align(cells)
    rows = tuple(_row(model, settings, previous.get(model), points, answers, draw) for model in models)
    return StudyTable(settings, _adjusted(rows), draw)


def breakdown(cells: Sequence[Cell], kinds: Mapping[str, str]) -> dict[str, dict[tuple[str, str], float]]:
    """Score by kind of problem: kind → (model, setting) → points earned over points possible.

    Args:
        cells: As for :func:`build_table`.
        kinds: Kind of each problem (a section, a subject, a year) by problem_id; other problems are left out.
    """
    table: dict[str, dict[tuple[str, str], float]] = {}
    for kind in sorted(set(kinds.values())):
        for cell in cells:
            mine = [result for result in cell.results if kinds.get(result.problem_id) == kind]
            possible = sum(result.points for result in mine)
            if possible:
                earned = sum(result.points for result in mine if result.correct)
                table.setdefault(kind, {})[cell.model, cell.setting] = earned / possible
    return table


def _stability_settings(settings: Sequence[str]) -> tuple[str, str] | None:
    return next(((plain, explained(plain)) for plain in settings if explained(plain) in settings), None)


def _align(cells: Sequence[Cell]) -> tuple[np.ndarray, dict[tuple[str, str], np.ndarray]]:
    """Points by problem, and right/wrong by (model, setting), all in the problem order of the first cell."""
    first = cells[0]
    worth = {result.problem_id: result.points for result in first.results}
    answers: dict[tuple[str, str], np.ndarray] = {}
    for cell in cells:
        where = f"model '{cell.model}', setting '{cell.setting}'"
        if (cell.model, cell.setting) in answers:
            raise UserError(f"{where}: given twice; give each model its own label, or leave one run out")
        right = {result.problem_id: bool(result.correct) for result in cell.results}
        if len(right) != len(cell.results):
            raise UserError(f"{where}: a problem_id appears twice; each problem may count once")
        if right.keys() != worth.keys():
            odd = sorted(right.keys() ^ worth.keys())
            raise UserError(
                f"{where}: not the same problems as '{first.model}', '{first.setting}': {len(odd)} differ, e.g. {odd[0]}; "
                f"evaluate both on the same problem files with the same limit"
            )
        for result in cell.results:
            if result.points != worth[result.problem_id]:
                raise UserError(
                    f"{where}: problem {result.problem_id} is worth {result.points} points here and "
                    f"{worth[result.problem_id]} for '{first.model}'; evaluate both on the same problem files"
                )
        answers[cell.model, cell.setting] = np.array([right[problem_id] for problem_id in worth], dtype=bool)
    return np.array(list(worth.values()), dtype=float), answers


def _row(
    model: str,
    settings: Sequence[str],
    previous: str | None,
    points: np.ndarray,
    answers: Mapping[tuple[str, str], np.ndarray],
    draw: Bootstrap,
) -> Row:
    scores = {setting: _score(answers[model, setting], points, draw) for setting in settings if (model, setting) in answers}
    shared = [setting for setting in scores if (previous, setting) in answers] if previous is not None else []
    against = {
        setting: statistics.compare(answers[str(previous), setting], answers[model, setting], points, draw)
        for setting in shared
    }
    pair = _stability_settings(settings)
    stability = change = None
    if pair and all(setting in scores for setting in pair):
        plain, explained = (answers[model, setting] for setting in pair)
        stability = statistics.stability(plain, explained, points, draw)
        if all(setting in against for setting in pair):
            before = (answers[str(previous), pair[0]], answers[str(previous), pair[1]])
            change = statistics.compare_stability(before, (plain, explained), points, draw)
    return Row(model, scores, stability, previous, against, change)


def _adjusted(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows, each test of the table with its p beside all others (:func:`medllm.report.statistics.holm`)."""
    tests = [test for row in rows for test in (*row.against_previous.values(), row.stability_change) if test is not None]
    adjusted = iter(statistics.holm([test.p_value for test in tests]))
    return tuple(
        replace(
            row,
            against_previous={
                setting: replace(test, adjusted_p=next(adjusted)) for setting, test in row.against_previous.items()
            },
            stability_change=replace(row.stability_change, adjusted_p=next(adjusted)) if row.stability_change else None,
        )
        for row in rows
    )


def _score(correct: np.ndarray, points: np.ndarray, draw: Bootstrap) -> Score:
    return Score(
        score=statistics.score_interval(correct, points, draw),
        accuracy=statistics.wilson(int(correct.sum()), len(correct), draw.confidence),
        earned=int(points[correct].sum()),
        possible=int(points.sum()),
        problems=len(correct),
    )
