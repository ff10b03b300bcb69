"""Intervals over problems, trainings and both, against closed forms, enumeration, and exams whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medllm.errors import UserError
from medllm.report.nested import equivalence, freedom_of, freedom_of_two, nested_comparison, nested_estimate, variance_of
from medllm.report.statistics import Bootstrap, compare, holm, score_interval
from medllm.report.statistics import stability as plain_stability
from scripts.calibrate_statistics import MARGIN, Exams, of_one_training, of_several, rates

PERCENTILE = Bootstrap(method="percentile")


@pytest.fixture(scope="module")
def exam():
    """Three trainings of two models on 300 problems of three years."""
    rng = np.random.default_rng(4)
    exams = Exams(300, 3, 0.1)
    difficulty = exams.difficulty(rng)
    return exams.answers(rng, difficulty), exams.answers(rng, difficulty, mean=1.4), exams.points(rng), exams.years


def half(estimate):
    return (estimate.high - estimate.low) / 2


def test_one_training_over_problems_of_one_year_is_the_plain_bootstrap(exam):
    first, second, points, _ = exam
    for draw in (Bootstrap(), PERCENTILE):
        nested, plain = nested_estimate(first[:1], points, over="problems", draw=draw), score_interval(first[0], points, draw)
        assert (nested.value, nested.low, nested.high) == pytest.approx((plain.value, plain.low, plain.high), abs=4e-3)
    difference, p = nested_comparison(first[:1], second[:1], points, over="problems")
    known = compare(first[0], second[0], points)
    assert (difference.low, difference.high) == pytest.approx((known.difference.low, known.difference.high), abs=4e-3)
    assert p == pytest.approx(known.p_value, abs=5e-3)


def test_problems_are_drawn_within_their_years_as_enumerated():
    values, years = np.array([1.0, 0.3, 0.6, 0.0, 0.2, 0.9]), ["1", "1", "1", "2", "2", "2"]
    draws = np.array(list(itertools.product(range(3), repeat=3)))
    early, late = values[:3][draws].mean(1), values[3:][draws].mean(1)
    stretch = math.sqrt(3 / 2)
    means = (stretch * (early - values[:3].mean()))[:, None] / 2 + (stretch * (late - values[3:].mean()))[None] / 2
    exact = np.quantile(means + values.mean(), [0.1, 0.9])
    found = nested_estimate(values[None], np.ones(6), years, over="problems", draw=Bootstrap(40000, 0.8, method="percentile"))
    assert (found.low, found.high) == pytest.approx(exact, abs=0.005)


def test_what_years_differ_by_is_no_doubt():
    years = np.repeat(["easy", "hard"], 200)
    right = np.concatenate([np.arange(200) % 20 > 0, np.arange(200) % 20 == 0])
    apart = nested_estimate(right[None], np.ones(400), years, over="problems")
    assert half(apart) == pytest.approx(1.96 * math.sqrt(0.05 * 0.95 / 400), rel=0.1)
    together = nested_estimate(right[None], np.ones(400), over="problems")
    assert half(together) == pytest.approx(1.96 * math.sqrt(0.25 / 400), rel=0.1)


def test_a_year_of_one_problem_is_drawn_with_others():
    values = np.array([[1.0, 0, 1, 1, 0, 1, 0, 1]])
    pooled = nested_estimate(values, np.ones(8), ["a"] * 6 + ["b", "c"], over="problems", draw=PERCENTILE)
    same = nested_estimate(values, np.ones(8), ["a"] * 6 + ["b", "b"], over="problems", draw=PERCENTILE)
    assert pooled == same
    lone = nested_estimate(values, np.ones(8), ["a"] * 7 + ["b"], over="problems", draw=PERCENTILE)
    assert lone == nested_estimate(values, np.ones(8), over="problems", draw=PERCENTILE)


def test_over_trainings_the_interval_is_students(exam):
    first, second, points, years = exam
    scores = first @ points / points.sum()
    found = nested_estimate(first, points, years, over="trainings", draw=PERCENTILE)
    reach = stats.t.ppf(0.975, 2) * scores.std(ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((scores.mean() - reach, scores.mean() + reach), rel=1e-2)
    pairs = (second @ points - first @ points) / points.sum()
    difference, p = nested_comparison(first, second, points, years, over="trainings", paired_trainings=True)
    assert difference.value == pytest.approx(pairs.mean())
    assert p == pytest.approx(stats.ttest_1samp(pairs, 0).pvalue, abs=2e-3)
    welch = stats.ttest_ind(second @ points, first @ points, equal_var=False)
    own = freedom_of_two((second @ points).var(), (first @ points).var(), 2, 2)
    found = nested_comparison(first, second, points, over="trainings")[1]
    assert found == pytest.approx(2 * stats.t.sf(abs(welch.statistic), own), abs=2e-3)
    assert found < welch.pvalue


@pytest.mark.parametrize("trainings", [3, 5, 9])
def test_variances_add_up_as_in_a_two_way_analysis(trainings):
    rng, exams = np.random.default_rng(8), Exams(300, trainings, 0.2)
    values = exams.answers(rng, exams.difficulty(rng)).astype(float)
    rows, columns, mean = values.mean(1), values.mean(0), values.mean()
    of_trainings = ((rows - mean) ** 2).sum() / (trainings - 1) / trainings
    of_problems = ((columns - mean) ** 2).sum() / 299 / 300
    rest = ((values - rows[:, None] - columns + mean) ** 2).sum() / ((trainings - 1) * 299) / (300 * trainings)
    found = variance_of([values], np.ones(300), of_problems)
    assert found.trainings == pytest.approx(of_trainings)
    assert found.chance == pytest.approx(rest, rel=0.01)
    assert found.total == pytest.approx(of_problems - found.chance + of_trainings)
    assert found.freedom == trainings - 1
    freedom = float(freedom_of(found.trainings / found.total, found.freedom))
    interval = nested_estimate(values, np.ones(300), over="both", draw=PERCENTILE)
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(found.total)
    assert half(interval) == pytest.approx(reach, rel=0.1)  # but for the bootstrap's own shape
    given = variance_of([values], np.ones(300))
    assert given.total == pytest.approx(of_trainings)


def with_right(problems: int, *counts: int) -> np.ndarray:
    """Trainings that get so many of the problems right, each others."""
    rng = np.random.default_rng(1)
    return np.array([rng.permutation(np.arange(problems) < count) for count in counts]).astype(float)


@pytest.mark.parametrize(("problems", "count"), [(4, 1), (200, 17), (600, 211)])
def test_trainings_that_happen_to_be_level_leave_what_problems_show(problems, count):
    values = with_right(problems, count, count, count)  # of which some means part by a rounding
    assert variance_of([values], np.ones(problems), 0.01).total == 0.01
    both, over_problems = (nested_estimate(values, np.ones(problems), over=over) for over in ("both", "problems"))
    assert (both.low, both.high) == pytest.approx((over_problems.low, over_problems.high))
    assert nested_comparison(values, 1 - values, np.ones(problems), over="trainings", paired_trainings=True)[1] == 2 / 8


@pytest.mark.parametrize("counts", [(184, 182, 183), (178, 177, 177), (196, 195, 197)])
def test_where_trainings_lie_closer_than_chance_the_value_is_within_its_interval(counts):
    found = nested_estimate(with_right(200, *counts), np.ones(200), over="both")
    assert found.low < found.value < found.high
    assert half(found) > 0.1 * half(nested_estimate(with_right(200, *counts), np.ones(200), over="problems"))


def test_two_models_add_their_variances():
    rng = np.random.default_rng(3)
    sides = [(rng.random((3, 400)) < rng.normal(0.6, scale, (3, 1))).astype(float) for scale in (0.05, 0.15)]
    first, second = (side.mean(1).var(ddof=1) / 3 for side in sides)
    found = variance_of(sides, np.ones(400))
    assert found.total == pytest.approx(first + second)
    welchs = 2 * (first + second) ** 2 / (first**2 + second**2)
    assert welchs < found.freedom <= 4
    assert variance_of([sides[0], np.tile(sides[1][:1], (3, 1))], np.ones(400)).freedom == pytest.approx(2)


def rejected(freedom: int, first: float, second: float, lasting: float, alpha: float = 0.05) -> float:
    """How often a true difference of zero is rejected, by integration: variances of that size are estimated with so many
    degrees of freedom each (0: it is known to be none), beside one that is known."""
    nodes = (np.arange(200) + 0.5) / 200
    seen, weight = stats.chi2.ppf(nodes**3, freedom) / freedom, nodes**2  # closer together where little is seen
    pairs = np.meshgrid(first * seen, second * seen) if second else (first * seen, np.zeros(200))
    one, other = (side.ravel() for side in pairs)
    weights = np.outer(weight, weight).ravel() if second else weight
    of_both = freedom_of_two(one, other, freedom, freedom) if second else np.full(200, float(freedom))
    total = lasting + one + other
    critical = stats.t.ppf(1 - alpha / 2, freedom_of((one + other) / total, of_both, alpha)) * np.sqrt(total)
    return float(np.average(2 * stats.norm.sf(critical / math.sqrt(first + second + lasting)), weights=weights))


SHARES = (0.05, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95, 1.0)


@pytest.mark.parametrize(
    ("freedom", "low", "high"), [(1, 0.0005, 0.05), (2, 0.038, 0.061), (4, 0.047, 0.055), (9, 0.049, 0.051)]
)
def test_a_test_at_five_percent_rejects_about_five_whatever_part_trainings_have(freedom, low, high):
    sizes = [rejected(freedom, share, 0.0, 1 - share) for share in SHARES]
    assert low <= min(sizes)
    assert max(sizes) <= high + 1e-3


@pytest.mark.parametrize("freedom", [1, 2, 4, 9])
@pytest.mark.parametrize("level", [0.01, 0.003, 0.001])
def test_one_at_a_smaller_level_rejects_no_more_than_half_as_many_again(freedom, level):
    """Of many tests beside each other the smallest p is held against a fraction of 5 % (Holm)."""
    assert max(rejected(freedom, share, 0.0, 1 - share, level) for share in SHARES) < 1.5 * level


@pytest.mark.parametrize(("freedom", "low", "high"), [(1, 0.015, 0.075), (2, 0.039, 0.07), (4, 0.047, 0.059)])
def test_so_does_one_of_two_models_trained_apart(freedom, low, high):
    sizes = [rejected(freedom, q * share, (1 - q) * share, 1 - share) for q in (0.5, 0.7, 0.9, 0.95) for share in SHARES]
    assert low <= min(sizes)
    assert max(sizes) <= high


def test_what_problems_share_is_paired():
    rng = np.random.default_rng(0)
    hard = rng.random(400) < 0.5
    first = np.array([hard & (rng.random(400) < 0.98) for _ in range(3)])
    second = np.array([hard & (rng.random(400) < 0.98) for _ in range(3)])
    difference, _ = nested_comparison(first, second, np.ones(400), over="problems")
    alone = [half(nested_estimate(side, np.ones(400), over="problems")) for side in (first, second)]
    assert half(difference) < math.hypot(*alone) / 4


def test_what_trainings_share_is_paired_where_it_is_said_to_be():
    rng = np.random.default_rng(1)
    exams = Exams(600, 4, 0.5)
    difficulty, parents = exams.difficulty(rng), rng.normal(0, 0.5, (4, 1))
    first, second = exams.answers(rng, difficulty, parents), exams.answers(rng, difficulty, parents, 1.3)
    found = [nested_comparison(first, second, np.ones(600), over="both", paired_trainings=paired) for paired in (True, False)]
    assert found[0][0].value == pytest.approx(found[1][0].value)
    assert half(found[0][0]) < half(found[1][0]) / 2
    assert found[0][1] < 0.05 < 0.2 < found[1][1]


def test_over_both_is_wider_than_over_either_part():
    rng = np.random.default_rng(5)
    exams = Exams(500, 3, 0.3)
    values = exams.answers(rng, exams.difficulty(rng))
    problems, both = (nested_estimate(values, np.ones(500), exams.years, over=over) for over in ("problems", "both"))
    assert half(both) > 1.8 * half(problems)


def test_equivalence_is_the_two_one_sided_tests(exam):
    first, _, points, years = exam
    rng = np.random.default_rng(2)
    values = first.astype(float) - np.where(rng.random(first.shape) < 0.04, 1 - first, first)
    value = nested_estimate(values, points, years, over="problems", bounds=(-1.0, 1.0)).value
    narrow = nested_estimate(
        values, points, years, over="problems", bounds=(-1.0, 1.0), draw=Bootstrap(confidence=0.9, method="percentile")
    )
    found = equivalence(values, points, years, over="problems", margin=0.05)
    assert found.interval == narrow
    assert found.holds
    assert found.p_value < 0.05
    deviation = half(narrow) / stats.norm.ppf(0.95)
    larger = abs(value)
    at = equivalence(values, points, years, over="problems", margin=larger + deviation)
    assert at.p_value == pytest.approx(stats.norm.sf(1), abs=0.03)
    assert not at.holds
    assert equivalence(values, points, over="both", margin=larger / 2).p_value > 0.5


@pytest.mark.parametrize("margin", [0.02, 0.08])
def test_equal_answers_are_equivalent_as_far_as_unseen_problems_let_them(margin):
    found = equivalence(np.zeros((1, 60)), np.ones(60), over="problems", margin=margin)
    assert found.p_value == pytest.approx((1 - margin) ** 60)
    assert found.interval.high == pytest.approx(1 - 0.05 ** (1 / 60))
    assert found.holds == (margin > 1 - 0.05 ** (1 / 60)) == (found.p_value < 0.05)


def test_trainings_that_do_not_differ_prove_little():
    same = np.tile(np.arange(40) % 2, (3, 1)).astype(float)
    better = np.ones((3, 40))
    found = nested_comparison(same, better, np.ones(40), over="trainings")
    assert found[0].low == found[0].high == 0.5
    assert found[1] == 2 / 8
    assert nested_estimate(better, np.ones(40), over="both").low < 1


def test_what_cannot_be_asked_is_refused():
    one, two = np.ones((1, 4)), np.ones((2, 4))
    with pytest.raises(UserError, match="an interval over trainings needs two of them or more"):
        nested_estimate(one, np.ones(4), over="both")
    with pytest.raises(UserError, match="1 and 2 trainings cannot be paired"):
        nested_comparison(one, two, np.ones(4), over="problems", paired_trainings=True)
    with pytest.raises(UserError, match="worth points"):
        nested_estimate(two, np.zeros(4), over="both")
    with pytest.raises(UserError, match="the margin of an equivalence test is 0"):
        equivalence(two, np.ones(4), over="both", margin=0)


def test_problems_worth_nothing_change_nothing(exam):
    first, second, points, years = exam
    more = [np.concatenate([side, side[:, :7]], 1) for side in (first, second)]
    worth, when = np.concatenate([points, np.zeros(7)]), [*map(str, years), *["x"] * 7]
    assert nested_comparison(*more, worth, when, over="both") == nested_comparison(first, second, points, years, over="both")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=9), st.integers(0, 99))
def test_any_exam_gives_ordered_bounds_within_range(trainings, rows, seed):
    years, points = (np.array(column) for column in zip(*rows, strict=True))
    values = np.random.default_rng(seed).integers(0, 2, (2, trainings, len(rows))).astype(float)
    points = points + float(not points.any())
    for over in ("problems", "trainings", "both") if trainings > 1 else ("problems",):
        draw = Bootstrap(resamples=99)
        score = nested_estimate(values[0], points, years, over=over, draw=draw)
        difference, p = nested_comparison(*values, points, years, over=over, draw=draw)
        assert 0 <= score.low <= score.high <= 1
        assert -1 <= difference.low <= difference.high <= 1
        assert 0 < p <= 1


def test_holm_steps_down_and_never_back():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.02, 0.021]) == pytest.approx((0.04, 0.04))  # the second is no smaller than the first
    assert holm([0.6, 0.9]) == pytest.approx((1.0, 1.0))
    assert holm([]) == ()


@pytest.fixture(scope="module")
def one_training():
    return rates(of_one_training, Exams(200), 200, Bootstrap(resamples=199))


@pytest.fixture(scope="module")
def three_trainings():
    return rates(of_several, Exams(200, 3, 0.3), 200, Bootstrap(resamples=199))


# 200 exams tell a rate of 5 % to 3 points, twice its standard error.
@pytest.mark.parametrize("claim", ["score, interval", "stability, interval"])
def test_intervals_hold_the_truth_as_often_as_they_say(one_training, three_trainings, claim):
    assert 0.91 <= one_training[claim] <= 0.985
    assert 0.91 <= three_trainings[claim] <= 0.985


def test_tests_reject_the_truth_as_seldom_as_they_say(one_training, three_trainings):
    for claim in ("difference, rejected", "difference, years together, rejected", "equivalent at the margin"):
        assert 0.015 <= one_training[claim] <= 0.09
    assert 0.015 <= three_trainings["difference, rejected"] <= 0.09
    assert 0.015 <= three_trainings["difference of pairs, rejected"] <= 0.09
    assert three_trainings["equivalent at the margin"] <= 0.09


def test_where_trainings_differ_the_simple_ways_do_not(three_trainings):
    assert three_trainings["score, over problems alone"] < 0.89
    assert three_trainings["score, trainings drawn with replacement"] < three_trainings["score, interval"] - 0.01


def test_the_simulated_truth_is_the_mean_of_many_exams():
    rng, exams = np.random.default_rng(0), Exams(4000, 3, 0.3)
    scores = [exams.answers(rng, exams.difficulty(rng)).mean() for _ in range(60)]
    assert np.mean(scores) == pytest.approx(exams.truth(), abs=4 * np.std(scores) / math.sqrt(60))
    assert MARGIN == 0.1


def test_stability_by_problem_is_the_reports_own(exam):
    first, second, points, _ = exam
    known = plain_stability(first[0], second[0], points, PERCENTILE)
    found = nested_estimate(second[:1].astype(float) - first[:1], points, over="problems", bounds=(-1.0, 1.0), draw=PERCENTILE)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=4e-3)
