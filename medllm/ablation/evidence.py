"""What a finished study shows: scores, stabilities and differences, over problems and over trainings, and what flips come of.

Rows are compared training by training: training *s* of a row starts from training *s* of the row before it, and so do two rows
that start from the same one. A model that was not trained here answers each time the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from medllm.ablation.design import Design
from medllm.ablation.jobs import Plan, Sat
from medllm.config import ProblemLayout
from medllm.errors import UserError
from medllm.exam.flips import Cause, Flip, find_flips, read_answered
from medllm.exam.problem import Problem
from medllm.exam.scoring import ProblemResult
from medllm.report.nested import Equivalence, Over, equivalence, nested_comparison, nested_estimate
from medllm.report.runs import read_cell, read_run
from medllm.report.statistics import BOOTSTRAP, Bootstrap, Estimate, holm
from medllm.stages.problems import read_problems

_SHARE, _DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)


@dataclass(frozen=True)
class Measured:
    """A score or a stability.

    Attributes:
        estimate: The mean over trainings, with its interval.
        trainings: That of each.
    """

    estimate: Estimate
    trainings: tuple[float, ...]


@dataclass(frozen=True)
class Change:
    """A row's score or stability minus that of another row.

    Attributes:
        difference: With its interval.
        p_value: Two-sided, that it is zero.
        adjusted_p: The same beside all other tests of the exam's table (Holm 1979).
    """

    difference: Estimate
    p_value: float
    adjusted_p: float


@dataclass(frozen=True)
class EvidenceRow:
    """A row of an exam's table.

    Attributes:
        exam: The exam.
        model: The row.
        seeds: Trainings that were measured; one of a model as it is.
        over: What its intervals speak of.
        scores: Points earned over points possible, by setting.
        stability: Score with explanation minus score without, where it sat both.
        kept: Whether that is zero but for the margin.
        changes: What differs from each row that it is compared with, by setting, and ``stability``.
        lost: Problems right without explanation and wrong with it, by cause, over all trainings.
        gained: The reverse.
        answered: Problems, times trainings.
    """

    exam: str
    model: str
    seeds: int
    over: Over
    scores: Mapping[str, Measured]
    stability: Measured | None
    kept: Equivalence | None
    changes: Mapping[str, Mapping[str, Change]]
    lost: Mapping[Cause, int]
    gained: Mapping[Cause, int]
    answered: int


@dataclass(frozen=True)
class _Answers:
    """A row's answers to an exam: right or wrong by setting, training and problem, and where they are."""

    right: Mapping[str, Float[np.ndarray, "trainings n"]]
    runs: Mapping[str, tuple[Path, ...]]
    settings: tuple[str, ...]
    explained: str | None
    plain: str | None

    @property
    def stability(self) -> Float[np.ndarray, "trainings n"] | None:
        if self.plain is None or self.explained is None:
            return None
        return self.right[self.explained] - self.right[self.plain]


def gather(design: Design, plan: Plan, draw: Bootstrap = BOOTSTRAP) -> tuple[EvidenceRow, ...]:
    """The tables of a study that is finished, exam by exam.

    Raises:
        UserError: a run folder is not as its stage left it.
    """
    return tuple(row for exam in design.exams for row in _table(design, [one for one in plan.sat if one.exam == exam], draw))


def _table(design: Design, sat: Sequence[Sat], draw: Bootstrap) -> list[EvidenceRow]:
    """The rows of one exam, with Holm's adjustment over all of its tests."""
    problems = _problems(sat[0].runs[0])
    years = [str(problem.year) for problem in problems.values()]
    asked = {result.problem_id: result.points for result in _results(sat[0].runs[0])}
    points = np.array([*asked.values()], dtype=float)
    answers = {row: _answers([one for one in sat if one.row == row], asked) for row in design.rows}
    rows = [_row(design, sat[0].exam, row, answers, problems, points, years, draw) for row in design.rows]
    tests = [change for row in rows for changes in row.changes.values() for change in changes.values()]
    adjusted = iter(holm([test.p_value for test in tests]))
    return [
        replace(
            row,
            changes={
                other: {name: replace(one, adjusted_p=next(adjusted)) for name, one in changes.items()}
                for other, changes in row.changes.items()
            },
        )
        for row in rows
    ]


def _row(
    design: Design,
    exam: str,
    row: str,
    answers: Mapping[str, _Answers],
    problems: Mapping[str, Problem],
    points: np.ndarray,
    years: Sequence[str],
    draw: Bootstrap,
) -> EvidenceRow:
    mine = answers[row]
    seeds = max(len(right) for right in mine.right.values())
    over: Over = "both" if seeds > 1 else "problems"

    def measured(values: np.ndarray, bounds: tuple[float, float]) -> Measured:
        estimate = nested_estimate(values, points, years, over=over, bounds=bounds, draw=draw)
        return Measured(estimate, tuple(float(one) for one in values @ points / points.sum()))

    stability = mine.stability
    others = design.compared_with(row)
    changes = {other: _changes(mine, answers[other], points, years, draw) for other in others}
    lost, gained = _causes(mine, problems)
    return EvidenceRow(
        exam=exam,
        model=row,
        seeds=seeds,
        over=over,
        scores={setting: measured(mine.right[setting], _SHARE) for setting in mine.settings},
        stability=None if stability is None else measured(stability, _DIFFERENCE),
        kept=None if stability is None else equivalence(stability, points, years, over=over, margin=design.margin, draw=draw),
        changes=changes,
        lost=lost,
        gained=gained,
        answered=seeds * len(points),
    )


def _changes(mine: _Answers, other: _Answers, points: np.ndarray, years: Sequence[str], draw: Bootstrap) -> dict[str, Change]:
    """What differs between two rows; p is adjusted once all are there."""
    pairs = {setting: (other.right[setting], mine.right[setting], _SHARE) for setting in mine.settings}
    if mine.stability is not None and other.stability is not None:
        pairs["stability"] = (other.stability, mine.stability, _DIFFERENCE)
    changes = {}
    for name, sides in pairs.items():
        *values, bounds = sides
        trainings = max(len(side) for side in values)
        first, after = (np.broadcast_to(side, (trainings, side.shape[1])) for side in values)
        over: Over = "both" if trainings > 1 else "problems"
        difference, p = nested_comparison(
            first, after, points, years, over=over, paired_trainings=True, bounds=bounds, draw=draw
        )
        changes[name] = Change(difference, p, p)
    return changes


def _causes(mine: _Answers, problems: Mapping[str, Problem]) -> tuple[dict[Cause, int], dict[Cause, int]]:
    """Causes of the flips of all trainings: of those lost by explaining, and of those gained."""
    if mine.plain is None or mine.explained is None:
        return {}, {}
    flips: list[Flip] = []
    for plain, explained in zip(mine.runs[mine.plain], mine.runs[mine.explained], strict=True):
        flips += find_flips(problems, read_answered(plain), read_answered(explained))
    return _counted(flip for flip in flips if flip.lost), _counted(flip for flip in flips if not flip.lost)


def _counted(flips: Iterable[Flip]) -> dict[Cause, int]:
    return dict(Counter(flip.cause for flip in flips).most_common())


def _answers(sat: Sequence[Sat], asked: Mapping[str, int]) -> _Answers:
    """A row's answers to one exam, the settings without explanation first.

    Args:
        sat: Its sittings.
        asked: What each problem is worth, in the order of the table.
    """
    right: dict[str, np.ndarray] = {}
    runs: dict[str, tuple[Path, ...]] = {}
    named: dict[bool, str] = {}
    for one in sorted(sat, key=lambda one: one.explained):
        setting = read_cell(read_run(one.runs[0]), one.runs[0]).setting
        right[setting] = np.array([_right(run, asked) for run in one.runs])
        runs[setting] = one.runs
        named[one.explained] = setting
    return _Answers(right, runs, tuple(right), named.get(True), named.get(False))


def _right(run: Path, asked: Mapping[str, int]) -> list[float]:
    """Which of the problems a run has right: 1, or 0.

    Raises:
        UserError: it is of other problems, or they are worth other points.
    """
    results = {result.problem_id: result for result in _results(run)}
    if {name: result.points for name, result in results.items()} != asked:
        worth = {name: result.points for name, result in results.items()}
        odd = sorted(name for name in worth.keys() | asked.keys() if worth.get(name) != asked.get(name))
        raise UserError(
            f"{run}: not the same problems as in the study's first run: {len(odd)} differ, e.g. {odd[0]}; was the exam's file "
            "changed meanwhile? Remove this run, or begin anew in another folder (--out)"
        )
    return [float(results[name].correct) for name in asked]


def _results(run: Path) -> tuple[ProblemResult, ...]:
    return read_cell(read_run(run), run).results


def _problems(run: Path) -> dict[str, Problem]:
    """The problems of a sitting, in the order in which they were scored."""
    config = read_run(run).config
    layout = ProblemLayout(**{name: config[name] for name in ("problems_format", "layout", "on_bad_row")})
    problems = {problem.problem_id: problem for problem in read_problems(config["problems"], layout)[0]}
    asked = [result.problem_id for result in _results(run)]
    if missing := [name for name in asked if name not in problems]:
        raise UserError(f"{run}: problem {missing[0]} was answered and is no more in the exam's files; put it back")
    return {name: problems[name] for name in asked}
