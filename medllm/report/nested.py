"""What a score, a stability or a difference is worth where a model was trained several times.

Every training of a model answers the same problems, so a score varies for two reasons, crossed with each other: other problems
would have been asked, and another training would have come out otherwise. An interval says over which of them it speaks:

- ``problems``: of these trainings, over exams like this one. Problems are drawn with replacement within each exam year, as the
  years of an exam are given and not drawn, and all trainings' answers to a problem come along.
- ``trainings``: of this exam, over trainings like these.
- ``both``: over exams and trainings like these: what a reader wants to know of a method.

**Why trainings are not drawn with replacement.** Three values drawn from three have a third less variance than those they stand
for, and tails far too light; and a draw of both ways counts what is chance in single answers three times (Owen 2007): intervals
come out too narrow where trainings differ and too wide where they do not (docs/evidence.md). Here variances are added up as of
two-way random effects (Searle, Casella & McCulloch 1992, ch. 4). With yₛ the score of training s, P the variance of the mean
over S trainings that a bootstrap of problems shows, and e what neither the problem nor the training explains alone,

    V = max(0, P − Var(e)/(nS)) + T,    T = Var(yₛ)/S

for chance in single answers is in P and in T, and is to be counted once. P is known well, T with ν = S − 1 degrees of freedom,
so a mean over √V has about Student's t with

    ν · (V/T)^k,    k = (2 − 1.85/ν) · min(1, ln 0.05/ln α)^1.5

degrees of freedom, in a two-sided test at the level α. Satterthwaite (1946) and Welch (1947) have k = 2. Of few trainings that
is too free, for where T comes out small, V is too small and its degrees of freedom are too many: where ν is 2, a test at 5 %
rejects the truth in up to 8 %, one at 0.1 % in more than 1. With this k a test at 5 % does so in 3.9 to 6.0 % whatever share of
V is T's, and closer to 5 the larger ν is; one at a smaller level at most 1.5 times as often as it says. Of two models that were
trained apart the T add up, with

    (T₁² + T₂² + 3 T₁T₂) / (T₁²/ν₁ + T₂²/ν₂)

degrees of freedom and no more than ν₁ + ν₂. Welch has 2 T₁T₂: of two models that three trainings each spread alike, 3.5 % are
then told apart, with 3 it is 4.0 to 6.9 % (the tests integrate all this). What is drawn has the shape of the bootstrap's draws,
its quantiles put from the normal's to Student's. Two trainings (ν = 1) show next to nothing of what they differ by: tests of
one model reject 0.1 to 5 %, of two models trained apart 1.6 to 8. Where all trainings have one score, they show nothing, and V
is P.

**Small years.** A bootstrap within a year of m problems shows (m − 1)/m of their variance; each year's draws are stretched by
√(m/(m − 1)) (Rao & Wu 1988). Years of one problem are pooled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import stats

from medllm.errors import UserError
from medllm.report.statistics import BOOTSTRAP, Bootstrap, Estimate, bootstrap_p, kish, sign_test, unanimous

Over = Literal["problems", "trainings", "both"]

MARGIN = 0.02
"""A stability of less is none: of the five years' 2,000 problems, 40."""

_BATCH = 4_000_000  # problems drawn at a time
_ROUNDING = 1e-24  # scores of trainings that differ by less are equal

Values = Shaped[np.ndarray, "trainings n"]
Numbers = float | Float[np.ndarray, "..."]
Years = Sequence[str] | Shaped[np.ndarray, "n"] | None


@dataclass(frozen=True)
class Equivalence:
    """Whether a value is zero but for a margin that does not matter (two one-sided tests; Schuirmann 1987).

    Attributes:
        margin: What does not matter, stated before looking.
        interval: The value, with the interval of confidence 1 − 2α.
        p_value: The larger of the two one-sided p: that it is below −margin, that it is above margin.
        holds: The interval lies inside the margin. False does not say that there is a difference.
    """

    margin: float
    interval: Estimate
    p_value: float
    holds: bool


@dataclass(frozen=True)
class Variance:
    """Where the variance of a mean over trainings and problems comes from; letters as at the top.

    Attributes:
        problems: P, what a bootstrap of the problems shows; 0 where they are given.
        chance: What of it is chance in single answers.
        trainings: T, what the trainings' scores show, the same chance included; 0 where they are given.
        freedom: ν, degrees of freedom of T.
    """

    problems: float
    chance: float = 0.0
    trainings: float = 0.0
    freedom: float = math.inf

    @property
    def total(self) -> float:
        """V."""
        return float(total_variance(self.problems - self.chance, self.trainings)) if self.trainings else self.problems


def nested_estimate(
    values: Values,
    points: Float[np.ndarray, "n"],
    years: Years = None,
    *,
    over: Over,
    bounds: tuple[float, float] = (0.0, 1.0),
    draw: Bootstrap = BOOTSTRAP,
) -> Estimate:
    """The mean over trainings of a mean over problems weighted by points, with its interval.

    Args:
        values: What each training earned of each problem: 0 or 1; of a stability, with explanation minus without.
        points: What each problem is worth.
        years: The exam year of each problem; None: they are of one.
        over: What the interval speaks of.
        bounds: Between which values lie: (−1, 1) for a stability.
        draw: How it is drawn.

    Raises:
        UserError: no problem is worth points, or an interval over trainings is asked of one.
    """
    return _sample([values], [1.0], points, years, over, bounds, draw).estimate(draw.confidence, draw.method)


def nested_comparison(
    first: Values,
    second: Shaped[np.ndarray, "others n"],
    points: Float[np.ndarray, "n"],
    years: Years = None,
    *,
    over: Over,
    paired_trainings: bool = False,
    bounds: tuple[float, float] = (0.0, 1.0),
    draw: Bootstrap = BOOTSTRAP,
) -> tuple[Estimate, float]:
    """``second`` minus ``first`` on the same problems, with its interval, and the two-sided p that it is zero.

    Args:
        first: As ``values`` of :func:`nested_estimate`.
        second: The other model's, of as many trainings or of another number.
        points: What each problem is worth.
        years: The exam year of each problem; None: they are of one.
        over: What interval and test speak of.
        paired_trainings: Training s of both share what makes trainings differ (a seed, or the model they start from), so their
            difference is what varies; else the two were trained apart.
        bounds: Between which values lie, (−1, 1) for stabilities; a difference may be twice as large.
        draw: How it is drawn.

    Raises:
        UserError: as there; or trainings are paired that are not as many.
    """
    widest = (bounds[0] - bounds[1], bounds[1] - bounds[0])
    if paired_trainings:
        if np.shape(first) != np.shape(second):
            raise UserError(
                f"{len(first)} and {len(second)} trainings cannot be paired: give as many of both, or compare them unpaired"
            )
        drawn = _sample([np.asarray(second, float) - np.asarray(first, float)], [1.0], points, years, over, widest, draw)
    else:
        drawn = _sample([second, first], [1.0, -1.0], points, years, over, widest, draw)
    return drawn.estimate(draw.confidence, draw.method), drawn.p_value()


def equivalence(
    values: Values,
    points: Float[np.ndarray, "n"],
    years: Years = None,
    *,
    over: Over,
    margin: float = MARGIN,
    bounds: tuple[float, float] = (-1.0, 1.0),
    draw: Bootstrap = BOOTSTRAP,
) -> Equivalence:
    """Whether a stability (or a difference, training by training) is zero but for ``margin``, at α = 1 − ``draw.confidence``.

    Raises:
        UserError: as :func:`nested_estimate`, or the margin is not above zero.
    """
    if not margin > 0:
        raise UserError(f"the margin of an equivalence test is {margin}; expected a difference above zero, such as 0.02")
    drawn = _sample([values], [1.0], points, years, over, bounds, draw)
    # By the same quantiles as the p-value, so that the two agree.
    interval = drawn.estimate(2 * draw.confidence - 1, "percentile")
    inside = bool(-margin < interval.low and interval.high < margin)
    return Equivalence(margin, interval, max(drawn.tail(-margin, below=True), drawn.tail(margin, below=False)), inside)


@dataclass(frozen=True)
class _Sample:
    """The distribution of a mean: its value, and draws of it; None where every problem has the same value.

    ``weights`` are those of what was drawn: of the problems, or of as many trainings.
    """

    value: float
    draws: Float[np.ndarray, "draws"] | None
    skew: float
    weights: Float[np.ndarray, "n"]
    bounds: tuple[float, float]

    def estimate(self, confidence: float, method: str) -> Estimate:
        if self.draws is None:
            return unanimous(self.value, self.weights, self.bounds, confidence)
        levels = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
        if method == "BCa":  # Efron 1987
            below = ((self.draws < self.value - 1e-12).mean() + (self.draws <= self.value + 1e-12).mean()) / 2
            bias = stats.norm.ppf(min(max(below, 1 / len(self.draws)), 1 - 1 / len(self.draws)))
            ends = bias + stats.norm.ppf(levels)
            levels = stats.norm.cdf(bias + ends / (1 - self.skew * ends))
        low, high = np.clip(np.quantile(self.draws, levels), *self.bounds)
        return Estimate(self.value, float(low), float(high))

    def p_value(self) -> float:
        if self.draws is None or not np.ptp(self.draws):
            return sign_test(self.value, len(self.weights))
        return bootstrap_p(self.draws)

    def tail(self, edge: float, *, below: bool) -> float:
        """One-sided p that the truth is on that side of ``edge``."""
        if self.draws is not None:
            beyond = self.draws <= edge + 1e-12 if below else self.draws >= edge - 1e-12
            return float((beyond.sum() + 1) / (len(self.draws) + 1))
        end = self.bounds[0] if below else self.bounds[1]
        if (self.value <= edge) if below else (self.value >= edge):
            return 1.0
        unseen = (self.value - edge) / (self.value - end)  # the share of other problems that would bring it there
        return float(max(0.0, 1 - unseen) ** kish(self.weights))


def _sample(
    sides: Sequence[np.ndarray],
    signs: Sequence[float],
    points: np.ndarray,
    years: Years,
    over: Over,
    bounds: tuple[float, float],
    draw: Bootstrap,
) -> _Sample:
    """Draws of Σ sign · mean of a side."""
    weights = np.asarray(points, float)
    arrays = [np.atleast_2d(np.asarray(side, float)) for side in sides]
    for side in arrays:
        if side.shape[1:] != weights.shape:
            raise ValueError(f"answers {side.shape} and points {weights.shape} are not of the same problems")
        if over != "problems" and len(side) < 2:
            raise UserError("an interval over trainings needs two of them or more (--seeds); of one, ask over problems")
    counted = weights > 0
    if not counted.any():
        raise UserError("a score needs at least one problem that is worth points, but there is none: check the problem files")
    weights, arrays = weights[counted], [side[:, counted] for side in arrays]
    means = sum(sign * side.mean(0) for sign, side in zip(signs, arrays, strict=True))
    value = float((means * weights).sum() / weights.sum())
    rng = np.random.default_rng(draw.seed)
    of_trainings = over == "trainings"
    moved, influence = np.zeros(draw.resamples), np.zeros(len(weights))
    if not of_trainings and (means != means[0]).any():
        strata = _strata(None if years is None else np.asarray(years)[counted], len(weights))
        moved = _resampled(means, weights, strata, draw.resamples, rng) - value
        influence = _influence(means, weights, strata)
    problems = float((influence**2).sum())
    variance = Variance(problems) if over == "problems" else variance_of(arrays, weights, problems)
    drawn = np.ones(min(map(len, arrays))) if of_trainings else weights
    if not variance.total:
        return _Sample(value, np.full(draw.resamples, value) if of_trainings else None, 0.0, drawn, bounds)
    # Quantiles themselves, in random order: no chance enters by the width of the tails.
    levels = rng.permutation((np.arange(draw.resamples) + 0.5) / draw.resamples)
    missing = max(0.0, variance.total - problems)
    shape = (moved + math.sqrt(missing) * stats.norm.ppf(levels)) / math.sqrt(problems + missing)
    if variance.trainings:
        freedom = freedom_of(variance.trainings / variance.total, variance.freedom, 2 * stats.norm.sf(np.abs(shape)))
        shape = stats.t.ppf(stats.norm.cdf(shape), freedom)
    skew = float((influence**3).sum()) / (6 * (problems + missing) ** 1.5)
    return _Sample(value, value + math.sqrt(variance.total) * shape, skew, drawn, bounds)


def variance_of(sides: Sequence[np.ndarray], points: Float[np.ndarray, "n"], problems: float = 0.0) -> Variance:
    """Where the variance of a mean score comes from, or that of the difference of two models'.

    Args:
        sides: Of one model or two, as ``values`` of :func:`nested_estimate`; two or more trainings of each.
        points: What each problem is worth, above zero.
        problems: P; 0 where the problems are given.
    """
    shares = points / points.sum()
    variances, chance = [], 0.0
    for values in sides:
        scores, trainings = np.asarray(values, float) @ shares, len(values)
        variances.append(float(scores.var(ddof=1)) / trainings)
        rest = np.asarray(values, float) - np.mean(values, 0) - (scores - scores.mean())[:, None]
        chance += float((shares**2 * (rest**2).sum(0)).sum()) / (trainings * (trainings - 1))
    between = sum(variances) if sum(variances) > _ROUNDING else 0.0
    freedoms = [len(values) - 1 for values in sides]
    freedom = float(freedom_of_two(*variances, *freedoms)) if between and len(sides) == 2 else freedoms[0]
    return Variance(problems, chance if problems else 0.0, between, freedom)


def total_variance(lasting: Numbers, trainings: Numbers) -> Float[np.ndarray, "..."]:
    """V at the top, of what problems show beyond chance and of T."""
    return np.asarray(np.maximum(0.0, lasting) + trainings)


def freedom_of(share: Numbers, freedom: Numbers, level: Numbers = 0.05) -> Float[np.ndarray, "..."]:
    """Degrees of freedom, for a two-sided test at ``level``, of a variance that one of so many is that share of, the rest being
    known."""
    own = np.asarray(freedom, float)
    with np.errstate(divide="ignore"):  # level 0 and 1, share 0
        power = (2 - 1.85 / own) * np.minimum(1.0, (math.log(0.05) / np.log(level)) ** 1.5)
        return np.asarray(own / np.asarray(share) ** power)


def freedom_of_two(first: Numbers, second: Numbers, freedom: float, other: float) -> Float[np.ndarray, "..."]:
    """Degrees of freedom of the sum of two variances of so many each, which are not both 0."""
    found = (first**2 + second**2 + 3 * first * second) / (first**2 / freedom + second**2 / other)
    return np.asarray(np.minimum(found, freedom + other))


def _strata(years: np.ndarray | None, problems: int) -> Int[np.ndarray, "n"]:
    """The number of each problem's year; years of one problem are one, with another year where that would be one again."""
    if years is None:
        return np.zeros(problems, int)
    _, codes, counts = np.unique(years, return_inverse=True, return_counts=True)
    lone = counts[codes] == 1
    if lone.any() and problems > 1:
        codes[lone] = codes[lone if lone.sum() > 1 else ~lone][0]
    return codes


def _resampled(
    values: np.ndarray, weights: np.ndarray, strata: np.ndarray, resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "draws"]:
    """Weighted means of problems drawn with replacement within their strata, stretched as Rao & Wu have it."""
    earned, possible = np.zeros(resamples), np.zeros(resamples)
    for stratum in np.unique(strata):
        own = strata == stratum
        size = int(own.sum())
        worth, gained = weights[own], (weights * values)[own]
        stretch = np.sqrt(size / (size - 1)) if size > 1 else 1.0
        step = max(1, _BATCH // size)
        for start in range(0, resamples, step):
            some = slice(start, min(start + step, resamples))
            drawn = rng.integers(0, size, (some.stop - start, size))
            earned[some] += gained.sum() + stretch * (gained[drawn].sum(1) - gained.sum())
            possible[some] += worth.sum() + stretch * (worth[drawn].sum(1) - worth.sum())
    return earned / possible


def _influence(values: np.ndarray, weights: np.ndarray, strata: np.ndarray) -> Float[np.ndarray, "n"]:
    """By how much each problem moves the weighted mean, against the others of its stratum."""
    moved = weights * (values - (values * weights).sum() / weights.sum()) / weights.sum()
    sizes = np.maximum(1, np.bincount(strata))
    return (moved - (np.bincount(strata, moved) / sizes)[strata]) * np.sqrt(sizes / np.maximum(1, sizes - 1))[strata]
