"""How many problems and trainings it takes to see a difference, or to see that there is none.

What is asked is the power of :func:`medllm.report.nested.nested_comparison`: of one training of each model over problems, of
several over both. With ψ the share of problems on which one training of each model part, χ the share on which two trainings
of one model part, and τ the standard deviation of a model's score over trainings beyond that, the difference of two means
over S trainings and n problems has the variance

    V = (ψ − δ² − χ + χ/S)/n + 2τ²/S

(McNemar's ψ − δ² in its first term; Connor 1987). Of one training the last term is not seen, and the answer is of these two
trainings alone. What the test sees of the trainings has S − 1 degrees of freedom a model, and S − 1 in all where it compares
training by training; what it takes for the variance, and so its critical value, is averaged over what it may see.

That a difference lies within a margin is shown by two tests, one-sided, against either end of it (Schuirmann 1987;
:func:`medllm.report.nested.equivalence`): by an interval of confidence 1 − 2α inside the margin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

from medllm.errors import UserError
from medllm.report.nested import freedom_of, freedom_of_two, total_variance

MOST_PROBLEMS = 1_000_000
"""More than these are none that an exam could have."""

_SEEN = 24  # spreads that a test may see: two digits of a power


@dataclass(frozen=True)
class Design:
    """A comparison of two models that is planned.

    Attributes:
        difference: The true difference of their scores.
        discordance: ψ, the share of problems that a training of one model gets right and one of the other wrong, or reversely.
        chance: χ, the share of problems on which two trainings of one model part.
        spread: τ, the standard deviation of a model's score over its trainings, without what is chance in single answers.
        problems: That both answer, of equal points.
        trainings: Of each model.
        alpha: Size of the two-sided test, or of each of the two one-sided ones.
        paired: Training by training, as ``medllm ablate`` compares; else the two were trained apart.
        margin: What is to be shown is that the difference lies within it; None: that there is one.

    Raises:
        UserError: no such models are possible.
    """

    difference: float
    discordance: float
    chance: float = 0.0
    spread: float = 0.0
    problems: int = 2000
    trainings: int = 1
    alpha: float = 0.05
    paired: bool = False
    margin: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.margin is not None and not abs(self.difference) < self.margin < 1:
            raise UserError(
                f"--margin is {self.margin}; expected one below 1 that the difference, {self.difference}, lies within"
            )
        if self.margin is None and not 0 < abs(self.difference) < 1:
            raise UserError(f"--difference is {self.difference}; expected a difference of scores, such as 0.03")
        if not abs(self.difference) <= self.discordance <= 1:
            raise UserError(
                f"--discordance is {self.discordance:.3g}; models whose scores differ by {abs(self.difference):.3g} part on at "
                "least that share of problems, and on no more than all"
            )
        if not 0 <= self.chance <= self.discordance - self.difference**2:
            raise UserError(
                f"--chance is {self.chance:.3g}; expected a share between 0 and {self.discordance - self.difference**2:.3g}, "
                "for two models part at least as often as two trainings of one"
            )
        if self.spread < 0 or self.problems < 2 or self.trainings < 1 or not 0 < self.alpha < 1:
            raise UserError(
                "--spread is not below 0, --problems not below 2, --trainings not below 1, --alpha between 0 and 1; found "
                f"{self.spread}, {self.problems}, {self.trainings}, {self.alpha}"
            )


def independent_discordance(score: float, difference: float) -> float:
    """On how many problems two models part whose answers have nothing to do with each other: the most that is to be feared.

    Raises:
        UserError: a score that is none.
    """
    other = score + difference
    if not (0 < score < 1 and 0 <= other <= 1):
        raise UserError(f"--score is {score} and with the difference {other:.3g}; expected scores between 0 and 1")
    return score * (1 - other) + other * (1 - score)


def power(design: Design) -> float:
    """The chance that the test finds the difference, or that there is none beyond the margin."""
    problems, trainings = design.problems, design.trainings
    lasting = (design.discordance - design.difference**2 - design.chance) / problems
    by_chance = design.chance / (problems * trainings)
    alpha = design.alpha if design.margin is None else 2 * design.alpha
    if trainings == 1:
        seen, freedom = np.array([lasting + by_chance]), np.array([np.inf])
        return _found(design, stats.t.ppf(1 - alpha / 2, freedom) * np.sqrt(seen), lasting + by_chance)
    of_trainings = 2 * design.spread**2 / trainings
    # What the test may see of the trainings: of their differences, or of either model and both together.
    share = stats.chi2.ppf((np.arange(_SEEN) + 0.5) / _SEEN, trainings - 1) / (trainings - 1)
    freedom = np.full(_SEEN, trainings - 1.0)
    if not design.paired:
        first, second = (pair.ravel() / 2 for pair in np.meshgrid(share, share))
        share, freedom = first + second, freedom_of_two(first, second, trainings - 1, trainings - 1)
    seen = share * (of_trainings + by_chance)
    total = total_variance(lasting, seen)
    critical = stats.t.ppf(1 - alpha / 2, freedom_of(seen / np.maximum(total, 1e-300), freedom, alpha)) * np.sqrt(total)
    return _found(design, critical, lasting + by_chance + of_trainings)


def problems_needed(design: Design, wanted: float) -> int | None:
    """The fewest problems that give a power of ``wanted``; None where no number does, for trainings differ too much."""
    if power(replace(design, problems=MOST_PROBLEMS)) < wanted:
        return None
    low, high = 1, MOST_PROBLEMS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(replace(design, problems=middle)) >= wanted else (middle, high)
    return high


def smallest_difference(design: Design, wanted: float) -> float | None:
    """The smallest difference that is found with a power of ``wanted``; None where not even the largest possible one is."""
    largest = (np.sqrt(1 + 4 * (design.discordance - design.chance)) - 1) / 2  # δ + δ² = ψ − χ, so that both bounds hold
    largest = min(float(largest), design.discordance)

    def missing(difference: float) -> float:
        return power(replace(design, difference=difference)) - wanted

    return float(optimize.brentq(missing, 1e-6, largest, xtol=1e-4)) if missing(largest) >= 0 else None


def smallest_margin(design: Design, wanted: float) -> float | None:
    """The smallest margin within which the difference is shown with a power of ``wanted``; None where none below 1 is."""

    def missing(margin: float) -> float:
        return power(replace(design, margin=margin)) - wanted

    least, most = abs(design.difference) + 1e-6, 1 - 1e-6
    return float(optimize.brentq(missing, least, most, xtol=1e-4)) if missing(most) >= 0 else None


def _found(design: Design, critical: np.ndarray, variance: float) -> float:
    scale, difference = np.sqrt(variance), abs(design.difference)
    if design.margin is not None:
        room = design.margin - critical  # a difference seen within it is shown to lie within the margin
        inside = stats.norm.cdf((room - difference) / scale) - stats.norm.cdf((-room - difference) / scale)
        return float(np.maximum(0.0, inside).mean())
    tails = stats.norm.sf((critical - difference) / scale) + stats.norm.cdf((-critical - difference) / scale)
    return float(tails.mean())
