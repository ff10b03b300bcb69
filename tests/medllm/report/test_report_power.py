"""The power of a comparison: against McNemar's closed form, and against how often the test itself finds the difference."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

from medllm.cli import main
from medllm.errors import UserError
from medllm.report.nested import equivalence, nested_comparison
from medllm.report.power import Design, independent_discordance, power, problems_needed, smallest_difference, smallest_margin
from medllm.report.statistics import Bootstrap
from scripts.calibrate_statistics import Exams


def test_of_one_training_it_is_mcnemars():
    design = Design(0.03, 0.12)
    scale = np.sqrt((0.12 - 0.03**2) / 2000)
    assert power(design) == pytest.approx(stats.norm.cdf(0.03 / scale - stats.norm.ppf(0.975)), abs=1e-6)
    needed = problems_needed(design, 0.8)
    assert needed == pytest.approx((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) ** 2 * (0.12 - 0.03**2) / 0.03**2, rel=0.01)
    assert power(replace(design, problems=needed)) >= 0.8 > power(replace(design, problems=needed - 1))


def test_chance_is_averaged_over_trainings_and_spread_is_not_bought_off_with_problems():
    once, thrice = (Design(0.03, 0.12, chance=0.1, problems=800, trainings=trainings) for trainings in (1, 3))
    assert power(thrice) > power(once) + 0.1
    spread = replace(thrice, spread=0.03)
    assert power(spread) < power(thrice) / 2
    assert problems_needed(spread, 0.8) is None
    assert problems_needed(replace(spread, trainings=30), 0.8) is not None


def test_the_smallest_difference_is_found_as_often_as_is_wanted():
    design = Design(0.03, 0.12, chance=0.05, spread=0.005, trainings=3)
    smallest = smallest_difference(design, 0.8)
    assert power(replace(design, difference=smallest)) == pytest.approx(0.8, abs=0.01)
    assert smallest_difference(replace(design, problems=10), 0.8) is None


def discordances(exams, mean, count=600):
    """On how much of the problems a training of each model parts, and two trainings of the first; how much scores spread."""
    rng = np.random.default_rng(9)
    apart, again, scores = [], [], []
    for _ in range(count):
        difficulty = exams.difficulty(rng)
        first, second = exams.answers(rng, difficulty), exams.answers(rng, difficulty, mean=mean)
        apart.append((first[0] != second[0]).mean())
        again.append((first[0] != first[1]).mean())
        scores.append(first.mean(1) - first.mean())
    trainings = exams.trainings
    variance = np.square(scores).sum() / (count * (trainings - 1)) - np.mean(again) / 2 / exams.problems
    return float(np.mean(apart)), float(np.mean(again)), float(np.sqrt(max(0.0, variance)))


@pytest.mark.parametrize("paired", [False, True], ids=["apart", "one-by-one"])
@pytest.mark.parametrize("exams", [Exams(300, 3, 0.15), Exams(300, 3, 0.0), Exams(300, 1)], ids=["spread", "alike", "once"])
def test_the_test_itself_finds_it_as_often(exams, paired):
    mean = brentq(lambda mean: exams.truth(mean) - exams.truth() - 0.07, exams.mean, exams.mean + 2)
    apart, again, spread = discordances(replace(exams, problems=500, trainings=max(2, exams.trainings)), mean)
    once = exams.trainings == 1
    chance, spread = (0.0, 0.0) if once else (again, spread)
    design = Design(0.07, apart, chance, spread, exams.problems, exams.trainings, paired=paired)
    rng, found = np.random.default_rng(0), 0
    settings = {"over": "problems" if once else "both", "paired_trainings": paired}
    for number in range(250):
        difficulty = exams.difficulty(rng)
        first, second = exams.answers(rng, difficulty), exams.answers(rng, difficulty, mean=mean)
        draw = Bootstrap(resamples=999, seed=number)
        found += nested_comparison(first, second, np.ones(exams.problems), exams.years, draw=draw, **settings)[1] < 0.05
    of_two_apart = power(replace(design, paired=False))
    assert 0.3 < of_two_apart < 0.95
    assert power(design) <= of_two_apart
    assert found / 250 == pytest.approx(power(design), abs=0.08)  # 2.5 standard errors of 250 draws


def test_of_one_training_equivalence_has_a_closed_form():
    """Schuirmann 1987: 2 Φ(Δ/σ − z) − 1 of two that do not differ; nothing where the margin is narrower than the interval."""
    design = Design(0.0, 0.12, margin=0.03)
    scale = np.sqrt(0.12 / 2000)
    assert power(design) == pytest.approx(2 * stats.norm.cdf(0.03 / scale - stats.norm.ppf(0.95)) - 1, abs=1e-6)
    assert power(replace(design, margin=0.01)) == 0.0
    smallest = smallest_margin(design, 0.8)
    assert smallest == pytest.approx((stats.norm.ppf(0.9) + stats.norm.ppf(0.95)) * scale, abs=2e-4)
    assert power(replace(design, difference=0.02)) < power(design) / 2


@pytest.mark.parametrize("exams", [Exams(600, 3, 0.05), Exams(600, 1)], ids=["thrice", "once"])
def test_equivalence_is_shown_as_often(exams):
    apart, again, spread = discordances(replace(exams, problems=500, trainings=max(2, exams.trainings)), exams.mean)
    once = exams.trainings == 1
    chance, spread = (0.0, 0.0) if once else (again, spread)
    design = Design(0.0, apart, chance, spread, exams.problems, exams.trainings, paired=True, margin=0.5)
    design = replace(design, margin=smallest_margin(design, 0.7))
    rng, shown = np.random.default_rng(3), 0
    for number in range(250):
        difficulty = exams.difficulty(rng)
        changes = exams.answers(rng, difficulty).astype(float) - exams.answers(rng, difficulty)
        over, draw = "problems" if once else "both", Bootstrap(resamples=999, seed=number)
        test = equivalence(changes, np.ones(exams.problems), exams.years, over=over, margin=design.margin, draw=draw)
        shown += test.holds
    assert shown / 250 == pytest.approx(power(design), abs=0.08)


def test_independent_answers_part_most():
    assert independent_discordance(0.8, 0.05) == pytest.approx(0.8 * 0.15 + 0.85 * 0.2)
    for score, difference in ((0.0, 0.1), (0.9, 0.2), (1.2, -0.5)):
        with pytest.raises(UserError, match="expected scores between 0 and 1"):
            independent_discordance(score, difference)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"difference": 0.0}, "--difference is 0.0"),
        ({"discordance": 0.01}, "part on at least that share"),
        ({"chance": 0.2}, "--chance is 0.2; expected a share between 0 and 0.119"),
        ({"spread": -0.1}, "--spread is not below 0"),
        ({"trainings": 0}, "--trainings not below 1"),
        ({"margin": 0.03}, "--margin is 0.03; expected one below 1 that the difference, 0.03, lies within"),
    ],
)
def test_models_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        Design(**({"difference": 0.03, "discordance": 0.12} | wrong))


def test_the_command_says_what_each_number_of_trainings_shows(tmp_path, capsys):
    words = "power --score 0.87 --difference 0.03 --discordance 0.12 --chance 0.06 --spread 0.02 --trainings 1 3"
    assert main([*words.split(), "--json", str(tmp_path / "power.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("power: 1 training, 2,000 problems: 97% for +0.030, 80% for 0.022 or more; 1,039 problems give")
    assert "no number of problems gives 80% for +0.030" in said[1]
    result = json.loads((tmp_path / "power.json").read_text())
    assert [row["trainings"] for row in result["rows"]] == [1, 3]
    assert result["rows"][0]["problems_needed"] == 1039
    assert result["rows"][1]["problems_needed"] is None
    assert result["discordance"] == 0.12
    words = "power --score 0.87 --difference 0 --discordance 0.06 --margin 0.02 --paired --trainings 1 --problems 1000"
    assert main([*words.split(), "--json", str(tmp_path / "margin.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    scale = np.sqrt(0.06 / 1000)
    expected = 2 * stats.norm.cdf(0.02 / scale - stats.norm.ppf(0.95)) - 1
    assert said[0].startswith(
        f"power: 1 training, 1,000 problems: {expected:.0%} that +0.000 is within 0.020, 80% for a margin"
    )
    row = json.loads((tmp_path / "margin.json").read_text())["rows"][0]
    assert row["power"] == pytest.approx(expected, abs=1e-6)
    assert row["smallest_margin"] == pytest.approx((stats.norm.ppf(0.9) + stats.norm.ppf(0.95)) * scale, abs=2e-4)
    assert main(["power", "--score", "0.87", "--difference", "0.03", "--power", "0.01"]) == 2
    assert "--power is 0.01; expected a chance between --alpha and 1" in capsys.readouterr().err
