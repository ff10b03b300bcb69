"""A score on the problems that training text does not hold, beside the score on all of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from medllm.errors import UserError
from medllm.exam.scoring import ProblemResult
from medllm.report.statistics import BOOTSTRAP, Bootstrap, Estimate, score_interval
from medllm.text_files import parse_json, read_text

_AT_A_TIME = 500


@dataclass(frozen=True)
class CleanScore:
    """Points earned over points possible, with and without the problems that were found in training text.

    Attributes:
        leaked: Problems that were found there, of those that were asked.
        clean: Problems that were not.
        all_problems: The score on all.
        clean_problems: The score on those that were not found.
        difference: The latter minus the former.
    """

    leaked: int
    clean: int
    all_problems: Estimate
    clean_problems: Estimate
    difference: Estimate

    def words(self) -> str:
        """For a line."""
        shift = self.difference
        everything = f"{self.all_problems.value:.3f} on all {self.leaked + self.clean}"
        return (
            f"{self.clean_problems.value:.3f} on the {self.clean} problems not found in the training text, "
            f"{shift.value:+.3f} ({shift.low:+.3f} to {shift.high:+.3f}) beside {everything}"
        )


def clean_score(results: Sequence[ProblemResult], leaked: Collection[str], draw: Bootstrap = BOOTSTRAP) -> CleanScore:
    """The score on all problems and on the clean ones, and how far they are apart.

    The interval of the difference is paired: problems are drawn, and both scores are those of the same draw (percentiles).

    Args:
        results: Problem by problem.
        leaked: Ids of the problems that were found.
        draw: How intervals are drawn.

    Raises:
        UserError: no clean problem is worth any points.
    """
    correct = np.array([one.correct for one in results], bool)
    points = np.array([one.points for one in results], float)
    clean = np.array([one.problem_id not in leaked for one in results], bool)
    if not points[clean].sum():
        raise UserError(
            f"all {len(results)} problems that are worth points were found in the training text: there is no clean score"
        )
    whole, part = score_interval(correct, points, draw), score_interval(correct[clean], points[clean], draw)
    difference = clean_difference(correct, points, clean, draw)
    return CleanScore(int((~clean).sum()), int(clean.sum()), whole, part, difference)


def leaked_ids(file: str | Path, asked: Collection[str]) -> frozenset[str]:
    """The problems that ``medllm data leaks --json`` found.

    Args:
        file: What it wrote.
        asked: The problems of this exam.

    Raises:
        UserError: the file is not what it writes, or all that was found are problems of another exam.
    """
    found = parse_json(read_text(Path(file)), str(file), "expected what `medllm data leaks --json` writes")
    leaks = found.get("leaks") if isinstance(found, dict) else None
    if not isinstance(leaks, list) or not all(
        isinstance(one, dict) and isinstance(one.get("problem_id"), str) for one in leaks
    ):
        raise UserError(
            f"{file}: no list of leaks with their problem_id in it; expected what `medllm data leaks --json` writes"
        )
    found = frozenset(one["problem_id"] for one in leaks)
    if found and found.isdisjoint(asked):
        raise UserError(
            f"{file}: names {len(found)} problems, e.g. {min(found)}, none of this exam; search for its own (medllm data leaks)"
        )
    return found


def clean_difference(
    correct: Bool[np.ndarray, "n"], points: Float[np.ndarray, "n"], clean: Bool[np.ndarray, "n"], draw: Bootstrap
) -> Estimate:
    """Score on the clean problems minus score on all, both of the same draws of problems (percentiles).

    Args:
        correct: Whether each problem earned its points.
        points: What it is worth.
        clean: Whether it was not found in the training text. A draw without such a problem counts for nothing.
        draw: How many draws, and what share of them the interval holds.
    """
    value = points[clean & correct].sum() / points[clean].sum() - points[correct].sum() / points.sum()
    chance = np.random.default_rng(draw.seed)
    drawn = []
    for start in range(0, draw.resamples, _AT_A_TIME):
        rows = chance.integers(len(points), size=(min(_AT_A_TIME, draw.resamples - start), len(points)))
        worth, right, kept = points[rows], correct[rows], clean[rows]
        possible = np.stack([(worth * kept).sum(1), worth.sum(1)])
        earned = np.stack([(worth * kept * right).sum(1), (worth * right).sum(1)])
        shares = earned / np.where(possible > 0, possible, np.nan)
        drawn.append(shares[0] - shares[1])
    tail = (1 - draw.confidence) / 2
    low, high = np.nanquantile(np.concatenate(drawn), [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))
