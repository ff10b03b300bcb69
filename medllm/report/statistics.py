"""What a difference between two scores is worth.

A score is a weighted mean over problems: points earned over points possible. So are a difference between two models on the same
problems and a *stability* (score with explanation minus score without): only the value of a problem changes, from right/wrong
to the difference of two such values. One bootstrap over problems therefore serves all of them, and it is always paired:
what a problem contributes to both sides is drawn together.

Problems worth no points carry no weight and are left out before anything is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from medllm.errors import UserError


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn. The same settings give the same digits.

    Args:
        resamples: Bootstrap samples of the problems.
        confidence: Coverage of the interval.
        seed: Seed of the draws.
        method: ``BCa`` corrects bias and skew (Efron 1987); ``percentile`` reads the quantiles as they are.
    """

    resamples: int = 9999
    confidence: float = 0.95
    seed: int = 0
    method: Literal["BCa", "percentile"] = "BCa"


BOOTSTRAP = Bootstrap()


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """``second`` minus ``first`` on the same problems.

    Attributes:
        difference: In units of the score, with its interval.
        p_value: Two-sided, that the difference is zero, from the paired bootstrap.
        gained: Problems only the second gets right.
        lost: Problems only the first gets right.
        mcnemar_p: Exact two-sided McNemar test on ``gained`` against ``lost``; it counts problems, not points.
        adjusted_p: ``p_value`` beside the other tests of a table (:func:`holm`); None where it stands alone.
    """

    difference: Estimate
    p_value: float
    gained: int
    lost: int
    mcnemar_p: float
    adjusted_p: float | None = None


@dataclass(frozen=True)
class StabilityChange:
    """How much steadier the second model is than the first: the difference of their stabilities, two-sided p.

    ``adjusted_p`` is a :class:`Comparison`'s.
    """

    difference: Estimate
    p_value: float
    adjusted_p: float | None = None


def score_interval(correct: Bool[np.ndarray, "n"], points: Float[np.ndarray, "n"], draw: Bootstrap = BOOTSTRAP) -> Estimate:
    """Points earned over points possible.

    Raises:
        UserError: no problem is worth any points.
    """
    return _mean(np.asarray(correct, float), points, (0.0, 1.0), draw)[0]


def stability(
    plain: Bool[np.ndarray, "n"], explained: Bool[np.ndarray, "n"], points: Float[np.ndarray, "n"], draw: Bootstrap = BOOTSTRAP
) -> Estimate:
    """Score with explanation minus score without, problem by problem; 0 is perfectly stable, below 0 explaining costs points.

    Raises:
        UserError: no problem is worth any points.
    """
    return _mean(_minus(explained, plain), points, (-1.0, 1.0), draw)[0]


def compare(
    first: Bool[np.ndarray, "n"], second: Bool[np.ndarray, "n"], points: Float[np.ndarray, "n"], draw: Bootstrap = BOOTSTRAP
) -> Comparison:
    """Two models (or stages) that answered the same problems.

    Raises:
        UserError: no problem is worth any points.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    difference, p_value = _mean(_minus(second, first), points, (-1.0, 1.0), draw)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    return Comparison(difference, p_value, gained, lost, mcnemar(gained, lost))


def compare_stability(
    first: tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]],
    second: tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]],
    points: Float[np.ndarray, "n"],
    draw: Bootstrap = BOOTSTRAP,
) -> StabilityChange:
    """Stability of ``second`` minus stability of ``first``; each is its (plain, explained) answers to the same problems.

    Raises:
        UserError: no problem is worth any points.
    """
    values = _minus(second[1], second[0]) - _minus(first[1], first[0])
    return StabilityChange(*_mean(values, points, (-2.0, 2.0), draw))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Each p as it stands beside the others: Holm's step-down (1979), which holds however the tests depend on each other."""
    if not p_values:
        return ()
    from statsmodels.stats.multitest import multipletests  # takes a second to import

    return tuple(float(p) for p in multipletests(p_values, method="holm")[1])


def wilson(correct: int, total: int, confidence: float = 0.95) -> Estimate:
    """Wilson's score interval (1927) of a plain accuracy, every problem counted once.

    Raises:
        UserError: there are no problems.
    """
    if total < 1:
        raise UserError("an accuracy needs at least one problem, but there are none: check the problem files")
    interval = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return Estimate(correct / total, float(interval.low), float(interval.high))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: are the problems on which two models part split evenly between them?"""
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def _minus(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.asarray(left, float) - np.asarray(right, float)


def _mean(
    values: Float[np.ndarray, "n"], points: Float[np.ndarray, "n"], bounds: tuple[float, float], draw: Bootstrap
) -> tuple[Estimate, float]:
    """Weighted mean of per-problem values, its interval, and the two-sided p that it is zero."""
    weights = np.asarray(points, float)
    if values.shape != weights.shape:
        raise ValueError(f"answers {values.shape} and points {weights.shape} are not of the same problems")
    values, weights = values[weights > 0], weights[weights > 0]
    if not len(values):
        raise UserError("a score needs at least one problem that is worth points, but there is none: check the problem files")
    value = _weighted_mean(values, weights)
    if (values == values[0]).all():
        return unanimous(float(values[0]), weights, bounds, draw.confidence), sign_test(float(values[0]), len(values))
    drawn = stats.bootstrap(
        (values, weights),
        _weighted_mean,
        paired=True,
        vectorized=True,
        n_resamples=draw.resamples,
        batch=1000,
        confidence_level=draw.confidence,
        method=draw.method,
        random_state=np.random.default_rng(draw.seed),
    )
    low, high = drawn.confidence_interval
    return Estimate(float(value), float(low), float(high)), bootstrap_p(drawn.bootstrap_distribution)


def _weighted_mean(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    return (values * weights).sum(axis) / weights.sum(axis)


def bootstrap_p(distribution: np.ndarray) -> float:
    """Twice the smaller tail beyond zero. The +1 keeps it from claiming more than the draws show (Davison & Hinkley 1997)."""
    # Sums of the same terms in another order can miss zero by a rounding: such a draw is zero and counts for both tails.
    tail = min((distribution <= 1e-12).sum(), (distribution >= -1e-12).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(distribution) + 1)))


def unanimous(value: float, weights: np.ndarray, bounds: tuple[float, float], confidence: float) -> Estimate:
    """Interval where every problem has the same value, so that a bootstrap draws nothing but that value.

    The exact (Clopper–Pearson) bound on how many unseen problems could differ, each by as much as ``bounds`` allows. Unequal
    points count through :func:`kish`.
    """
    unseen = 1 - ((1 - confidence) / 2) ** (1 / kish(weights))
    low, high = bounds
    return Estimate(value, float(value - unseen * (value - low)), float(value + unseen * (high - value)))


def kish(weights: Float[np.ndarray, "n"]) -> float:
    """Kish's effective number of problems of unequal points, (Σw)²/Σw²."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def sign_test(value: float, problems: int) -> float:
    """Two-sided p where every problem has the same value: zero, or all of one sign."""
    return min(1.0, 2 * 0.5**problems) if value else 1.0
