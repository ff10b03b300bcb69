"""The report's statistics against closed forms, enumeration of every resample, and properties that must hold."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from medllm.errors import UserError
from medllm.report import statistics
from medllm.report.statistics import Bootstrap, Estimate

CORRECT = np.array([True, False, True, True, False])
POINTS = np.array([1.0, 1.0, 2.0, 3.0, 1.0])
OTHER = np.array([True, True, False, True, True])


def every_resample(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The whole bootstrap distribution: all n^n draws."""
    draws = np.array(list(itertools.product(range(len(values)), repeat=len(values))))
    return (values[draws] * points[draws]).sum(1) / points[draws].sum(1)


def bca(values: np.ndarray, points: np.ndarray, distribution: np.ndarray, confidence: float) -> tuple[float, float]:
    """Efron's BCa interval written out (Efron & Tibshirani 1993, eq. 14.9 to 14.15)."""
    estimate = (values * points).sum() / points.sum()
    below = ((distribution < estimate).mean() + (distribution <= estimate).mean()) / 2
    bias = norm.ppf(below)
    without = np.array([np.delete(values * points, i).sum() / np.delete(points, i).sum() for i in range(len(values))])
    spread = without.mean() - without
    skew = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    ends = [bias + norm.ppf(tail) for tail in ((1 - confidence) / 2, (1 + confidence) / 2)]
    levels = [norm.cdf(bias + end / (1 - skew * end)) for end in ends]
    low, high = np.quantile(distribution, levels)
    return float(low), float(high)


def test_a_score_is_points_earned_over_points_possible():
    assert statistics.score_interval(CORRECT, POINTS).value == pytest.approx(6 / 8)


def test_the_percentile_interval_is_that_of_the_enumerated_distribution():
    exact = np.quantile(every_resample(CORRECT.astype(float), POINTS), [0.1, 0.9])
    drawn = statistics.score_interval(CORRECT, POINTS, Bootstrap(resamples=20000, confidence=0.8, method="percentile"))
    assert [drawn.low, drawn.high] == pytest.approx(exact, abs=1e-9)


def test_the_bca_interval_is_efrons_formula_on_the_enumerated_distribution():
    rng = np.random.default_rng(5)
    values, points = rng.random(6) < 0.6, rng.choice([1.0, 2.0, 3.0], 6) + np.linspace(0, 0.1, 6)
    low, high = bca(values.astype(float), points, every_resample(values.astype(float), points), 0.8)
    drawn = statistics.score_interval(values, points, Bootstrap(resamples=40000, confidence=0.8))
    assert (drawn.low, drawn.high) == pytest.approx((low, high), abs=0.01)
    percentile = statistics.score_interval(values, points, Bootstrap(resamples=40000, confidence=0.8, method="percentile"))
    assert abs(percentile.low - low) > 0.02  # the two methods differ here, so the line above can tell them apart


def test_the_interval_of_many_problems_approaches_the_normal_one():
    correct = np.arange(3000) % 10 < 7
    drawn = statistics.score_interval(correct, np.ones(3000))
    half = norm.ppf(0.975) * math.sqrt(0.7 * 0.3 / 3000)
    assert (drawn.low, drawn.high) == pytest.approx((0.7 - half, 0.7 + half), abs=1.5e-3)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    draw = Bootstrap(resamples=400)
    hits = 0
    for _ in range(200):
        points = rng.choice([1.0, 3.0], 120, p=[0.8, 0.2])
        interval = statistics.score_interval(rng.random(120) < 0.8, points, draw)
        hits += interval.low <= 0.8 <= interval.high
    assert 0.89 <= hits / 200 <= 0.99


def test_the_paired_p_value_is_that_of_the_enumerated_distribution():
    distribution = every_resample(OTHER.astype(float) - CORRECT, POINTS)
    exact = 2 * min((distribution <= 1e-12).mean(), (distribution >= -1e-12).mean())
    drawn = statistics.compare(CORRECT, OTHER, POINTS, Bootstrap(resamples=20000))
    assert drawn.difference.value == pytest.approx(0.0)
    assert drawn.p_value == pytest.approx(min(1.0, exact), abs=0.01)
    shifted = statistics.compare(np.array([False, False, True, False, False]), OTHER, POINTS, Bootstrap(resamples=20000))
    distribution = every_resample(np.array([1.0, 1.0, -1.0, 1.0, 1.0]), POINTS)
    exact = 2 * min((distribution <= 1e-12).mean(), (distribution >= -1e-12).mean())
    assert 0.05 < exact < 0.95
    assert shifted.p_value == pytest.approx(exact, abs=0.01)


def test_pairing_makes_a_consistent_small_gain_significant():
    rng = np.random.default_rng(1)
    before = rng.random(1000) < 0.6
    after = before.copy()
    after[np.flatnonzero(~before)[:25]] = True
    paired = statistics.compare(before, after, np.ones(1000))
    assert paired.difference.value == pytest.approx(0.025)
    assert paired.p_value < 0.001
    assert paired.difference.low > 0
    alone = [statistics.score_interval(side, np.ones(1000)) for side in (before, after)]
    assert alone[0].high > alone[1].low  # the unpaired intervals overlap


def test_mcnemar_is_the_exact_binomial_tail():
    comparison = statistics.compare(
        np.array([True] * 2 + [False] * 9 + [True] * 5), np.array([False] * 2 + [True] * 9 + [True] * 5), np.ones(16)
    )
    assert (comparison.gained, comparison.lost) == (9, 2)
    assert comparison.mcnemar_p == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    assert statistics.mcnemar(0, 0) == 1.0


def test_wilson_is_its_closed_form():
    correct, total, z = 7, 40, norm.ppf(0.975)
    share = correct / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    found = statistics.wilson(correct, total)
    assert (found.value, found.low, found.high) == pytest.approx((share, middle - half, middle + half))


def test_stability_is_the_paired_difference_explained_minus_plain():
    found = statistics.stability(CORRECT, OTHER, POINTS)
    assert found == statistics.compare(CORRECT, OTHER, POINTS).difference
    assert statistics.stability(CORRECT, CORRECT & OTHER, POINTS).value == pytest.approx((4 - 6) / 8)


def test_a_change_of_stability_is_the_difference_of_two_stabilities():
    rng = np.random.default_rng(2)
    sides = rng.random((4, 300)) < np.array([[0.8], [0.6], [0.8], [0.8]])
    points = rng.choice([1.0, 2.0], 300)
    change = statistics.compare_stability((sides[0], sides[1]), (sides[2], sides[3]), points)
    apart = statistics.stability(sides[2], sides[3], points).value - statistics.stability(sides[0], sides[1], points).value
    assert change.difference.value == pytest.approx(apart)
    assert change.p_value < 0.01
    assert change.difference.low > 0


@pytest.mark.parametrize("right", [True, False])
def test_a_unanimous_score_has_the_exact_binomial_interval(right):
    found = statistics.score_interval(np.full(30, right), np.ones(30))
    exact = binomtest(30 * right, 30).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_equal_answers_leave_room_for_unseen_disagreement():
    found = statistics.compare(CORRECT, CORRECT, POINTS)
    assert found.p_value == 1.0
    assert found.difference.value == 0
    assert found.difference.low == pytest.approx(-found.difference.high)
    assert found.difference.high == pytest.approx(1 - 0.025 ** (16 / 64))  # Kish: (Σw)²/Σw² = 64/16


def test_unanimous_gains_are_tested_by_their_signs():
    found = statistics.compare(np.zeros(4, bool), np.ones(4, bool), np.ones(4))
    assert found.p_value == found.mcnemar_p == 2 / 16


def test_problems_worth_no_points_change_nothing_but_the_count():
    zero = np.concatenate([POINTS, [0.0, 0.0]])
    with_zero = statistics.score_interval(np.concatenate([CORRECT, [True, False]]), zero)
    assert with_zero == statistics.score_interval(CORRECT, POINTS)


def test_no_points_at_all_is_a_user_error():
    with pytest.raises(UserError, match="worth points"):
        statistics.score_interval(np.array([True]), np.array([0.0]))
    with pytest.raises(UserError, match="at least one problem"):
        statistics.wilson(0, 0)


def test_the_same_seed_gives_the_same_digits_and_another_seed_others():
    rng = np.random.default_rng(3)
    correct, points = rng.random(80) < 0.7, rng.random(80) + 0.5
    first, again, other = (statistics.score_interval(correct, points, Bootstrap(999, seed=seed)) for seed in (4, 4, 5))
    assert first == again
    assert first != other


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12))
def test_any_exam_gives_ordered_finite_bounds_within_range(rows):
    first, second, points = (np.array(column) for column in zip(*rows, strict=True))
    if not points.sum():
        points = points + 1
    draw = Bootstrap(resamples=200)
    score = statistics.score_interval(first, points.astype(float), draw)
    comparison = statistics.compare(first, second, points.astype(float), draw)
    for found, bounds in ((score, (0, 1)), (comparison.difference, (-1, 1))):
        assert isinstance(found, Estimate)
        assert bounds[0] - 1e-9 <= found.low <= found.high <= bounds[1] + 1e-9
        assert math.isfinite(found.low)
        assert math.isfinite(found.high)
    assert 0 < comparison.p_value <= 1
    assert comparison.gained - comparison.lost == int(second.sum()) - int(first.sum())


def test_swapping_the_models_mirrors_the_comparison():
    there = statistics.compare(CORRECT, OTHER, POINTS, Bootstrap(method="percentile"))
    back = statistics.compare(OTHER, CORRECT, POINTS, Bootstrap(method="percentile"))
    assert (back.gained, back.lost, back.mcnemar_p) == (there.lost, there.gained, there.mcnemar_p)
    assert back.difference.low == pytest.approx(-there.difference.high)
    assert back.p_value == pytest.approx(there.p_value)
