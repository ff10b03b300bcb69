#!/usr/bin/env python
"""How often intervals of 95 % hold the truth and tests at 5 % reject it, on exams whose truth is known.

    python scripts/calibrate_statistics.py --replicates 2000 --json calibration.json

A model gets problem i of year h right in training s where ``mean + year_h + difficulty_i + spread_s + chance`` is above zero;
difficulty, spread and chance are normal, the years are given. So the truth has a closed form: the mean over years of
Φ((mean + year_h)/√(1 + the variances that an interval speaks over)). Two models or settings share the problems' difficulty and
differ in a part of their own. Every tenth problem is worth three points.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from medllm.report.nested import equivalence, nested_comparison, nested_estimate
from medllm.report.statistics import Bootstrap, compare, stability

MARGIN = 0.1
YEARS = np.linspace(-0.4, 0.4, 5)


@dataclass(frozen=True)
class Exams:
    """Exams that are drawn, and the trainings that sit them.

    Attributes:
        problems: Of an exam, over five years.
        trainings: Of each model.
        spread: Standard deviation of a training, in units of the chance in an answer.
        mean: Of a model over its trainings; 1 is a score of about 0.73.
        shared: Standard deviation of the difficulty that models and settings share.
        own: Of what is each one's own.
    """

    problems: int
    trainings: int = 1
    spread: float = 0.0
    mean: float = 1.0
    shared: float = 1.2
    own: float = 0.5

    @property
    def years(self) -> np.ndarray:
        """The year of each problem."""
        return np.arange(self.problems) % len(YEARS)

    def truth(self, mean: float | None = None) -> float:
        """The score over all problems and trainings."""
        deviation = np.sqrt(1 + self.shared**2 + self.own**2 + self.spread**2)
        return float(norm.cdf(((self.mean if mean is None else mean) + YEARS) / deviation).mean())

    def points(self, rng: np.random.Generator) -> np.ndarray:
        """What the problems are worth."""
        return np.where(rng.random(self.problems) < 0.1, 3.0, 1.0)

    def difficulty(self, rng: np.random.Generator) -> np.ndarray:
        """What all share of the problems."""
        return YEARS[self.years] + rng.normal(0, self.shared, self.problems)

    def answers(
        self, rng: np.random.Generator, difficulty: np.ndarray, skill: np.ndarray | None = None, mean: float | None = None
    ) -> np.ndarray:
        """Right or wrong, by training and problem; ``skill`` is the trainings' own where it was drawn already."""
        skill = rng.normal(0, self.spread, (self.trainings, 1)) if skill is None else skill
        own = rng.normal(0, self.own, self.problems)
        chance = rng.normal(size=(self.trainings, self.problems))
        return (self.mean if mean is None else mean) + difficulty + own + skill + chance > 0


def within(interval, truth: float) -> bool:
    """Whether an interval holds the truth."""
    return interval.low <= truth <= interval.high


def plain_bootstrap(values: np.ndarray, points: np.ndarray, draw: Bootstrap) -> tuple[float, float]:
    """The 95 % of a bootstrap that draws trainings and problems with replacement, years together: for comparison."""
    rng = np.random.default_rng(draw.seed)
    trainings, problems = values.shape
    drawn = rng.integers(0, problems, (draw.resamples, problems))
    scores = np.stack([(own * points)[drawn].sum(1) for own in values], 1) / points[drawn].sum(1, keepdims=True)
    means = (scores * rng.multinomial(trainings, np.full(trainings, 1 / trainings), draw.resamples)).sum(1) / trainings
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def of_one_training(exams: Exams, rng: np.random.Generator, draw: Bootstrap) -> dict[str, bool]:
    """One exam sat once by two equal models, in two settings; the second setting worse by the margin in ``margin``."""
    points, difficulty = exams.points(rng), exams.difficulty(rng)
    first, second = exams.answers(rng, difficulty), exams.answers(rng, difficulty)
    worse = brentq(lambda mean: exams.truth(mean) - exams.truth() + MARGIN, exams.mean - 1, exams.mean)
    explained = exams.answers(rng, difficulty, mean=worse)
    changes = explained.astype(float) - first
    years = exams.years
    steady = nested_estimate(changes, points, years, over="problems", bounds=(-1.0, 1.0), draw=draw)
    tested = compare(first[0], second[0], points, draw)
    return {
        "score, interval": within(nested_estimate(first, points, years, over="problems", draw=draw), exams.truth()),
        "stability, interval": within(steady, -MARGIN),
        "stability, years together": within(stability(first[0], explained[0], points, draw), -MARGIN),
        "difference, rejected": nested_comparison(first, second, points, years, over="problems", draw=draw)[1] < 0.05,
        "difference, years together, rejected": tested.p_value < 0.05,
        "difference, McNemar, rejected": tested.mcnemar_p < 0.05,
        "equivalent at the margin": equivalence(changes, points, years, over="problems", margin=MARGIN, draw=draw).holds,
    }


def of_several(exams: Exams, rng: np.random.Generator, draw: Bootstrap) -> dict[str, bool]:
    """One exam sat by several trainings of two equal models, trained apart and from common parents."""
    points, difficulty, years = exams.points(rng), exams.difficulty(rng), exams.years
    first, second = exams.answers(rng, difficulty), exams.answers(rng, difficulty)
    parents = rng.normal(0, exams.spread, (exams.trainings, 1))
    pair = [exams.answers(rng, difficulty, parents + rng.normal(0, exams.spread / 2, parents.shape)) for _ in range(2)]
    worse = brentq(lambda mean: exams.truth(mean) - exams.truth() + MARGIN, exams.mean - 1, exams.mean)
    before, after = (exams.answers(rng, difficulty, parents, mean) for mean in (exams.mean, worse))
    changes = after.astype(float) - before
    low, high = plain_bootstrap(first, points, replace(draw, resamples=400))
    apart = nested_comparison(first, second, points, years, over="both", draw=draw)[1]
    paired = nested_comparison(*pair, points, years, over="both", paired_trainings=True, draw=draw)[1]
    steady = nested_estimate(changes, points, years, over="both", bounds=(-1.0, 1.0), draw=draw)
    return {
        "score, interval": within(nested_estimate(first, points, years, over="both", draw=draw), exams.truth()),
        "score, over problems alone": within(nested_estimate(first, points, years, over="problems", draw=draw), exams.truth()),
        "score, trainings drawn with replacement": low <= exams.truth() <= high,
        "stability, interval": within(steady, -MARGIN),
        "difference, rejected": apart < 0.05,
        "difference of pairs, rejected": paired < 0.05,
        "equivalent at the margin": equivalence(changes, points, years, over="both", margin=MARGIN, draw=draw).holds,
    }


Trial = Callable[[Exams, np.random.Generator, Bootstrap], Mapping[str, bool]]


def rates(trial: Trial, exams: Exams, replicates: int, draw: Bootstrap, seed: int = 0) -> dict[str, float]:
    """How often each claim of a trial was true."""
    rng = np.random.default_rng(seed)
    seen = [trial(exams, rng, replace(draw, seed=number)) for number in range(replicates)]
    return {name: float(np.mean([one[name] for one in seen])) for name in seen[0]}


CASES = {
    **{f"1 training, {n} problems": (of_one_training, Exams(n)) for n in (200, 500)},
    **{
        f"{trainings} trainings of spread {spread}, {n} problems": (of_several, Exams(n, trainings, spread))
        for trainings in (3, 5)
        for n in (200, 500)
        for spread in (0.0, 0.1, 0.3)
    },
}


def main() -> None:
    """Simulate every case, and print its rates."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replicates", type=int, default=2000, help="exams that are drawn for each case")
    parser.add_argument("--resamples", type=int, default=999, help="bootstrap samples of each interval")
    parser.add_argument("--only", type=str, default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path, help="file for every rate")
    chosen = parser.parse_args()
    found = {}
    for name, (trial, exams) in CASES.items():
        if chosen.only in name:
            found[name] = rates(trial, exams, chosen.replicates, Bootstrap(resamples=chosen.resamples))
            print(name, flush=True)
            for claim, rate in found[name].items():
                print(f"  {claim}: {rate:.3f}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
