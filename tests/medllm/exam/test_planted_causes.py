"""Causes that were planted are found again in what ``medllm evaluate`` leaves, as often as they were planted."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from medllm.config import ModelConfig, Sampling
from medllm.exam.flips import CAUSES, find_flips, read_answered
from medllm.exam.loaders import write_problems
from medllm.stage_config import EvaluateConfig
from medllm.stages import evaluate as stage
from medllm.stages.evaluate import run_evaluate
from tests.planted_causes import PlantedEngine, planted, problems

MIXTURES = {
    "even": (dict.fromkeys(CAUSES, 0.08), dict.fromkeys(CAUSES, 0.04)),
    "a base model": (
        {"ran_on": 0.2, "cut_off": 0.1, "unread": 0.05, "contradicts": 0.02, "reasoning": 0.1},
        {"ran_on": 0.1, "cut_off": 0.0, "unread": 0.05, "contradicts": 0.0, "reasoning": 0.25},
    ),
    "a trained one": (
        {"ran_on": 0.0, "cut_off": 0.01, "unread": 0.0, "contradicts": 0.06, "reasoning": 0.06},
        {"ran_on": 0.0, "cut_off": 0.0, "unread": 0.01, "contradicts": 0.0, "reasoning": 0.14},
    ),
}
"""What becomes of answers with an explanation, and of those without."""


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    made = problems(2000)
    file = tmp_path_factory.mktemp("exam") / "exam.jsonl"
    write_problems(file, made)
    return made, file


@pytest.mark.parametrize("name", MIXTURES)
def test_planted_mixtures_are_recovered_within_two_points(name, exam, tmp_path, monkeypatch):
    made, file = exam
    rng = random.Random(name)
    shares = dict(zip((True, False), MIXTURES[name], strict=True))
    outcomes, answered = {}, {}
    for explanation, mixture in shares.items():
        outcomes[explanation] = planted(made, mixture, rng)
        engine = PlantedEngine(made, outcomes[explanation])
        monkeypatch.setattr(stage, "open_engine", lambda *_, engine=engine: engine)
        config = EvaluateConfig(
            ModelConfig("planted"),
            str(tmp_path / f"{explanation}"),
            (str(file),),
            explanation=explanation,
            shot_count=0,
            format="chat",
            sampling=Sampling(max_new_tokens=8),
        )
        run_evaluate(config)
        answered[explanation] = read_answered(tmp_path / f"{explanation}")
    flips = find_flips({problem.problem_id: problem for problem in made}, answered[False], answered[True])
    for lost in (True, False):
        found = Counter(flip.cause for flip in flips if flip.lost == lost)
        drawn = Counter(cause for key, cause in outcomes[lost].items() if cause and outcomes[not lost][key] is None)
        others_right = 1 - sum(shares[not lost].values())  # the two settings were drawn apart
        for cause in CAUSES:
            among = found[cause] / sum(found.values())
            assert among == pytest.approx(drawn[cause] / sum(drawn.values()), abs=0.02), (cause, lost)
            assert found[cause] / len(made) == pytest.approx(shares[lost][cause] * others_right, abs=0.02), (cause, lost)
        mixed = Counter((outcomes[lost][flip.problem_id], flip.cause) for flip in flips if flip.lost == lost)
        assert sum(count for (truth, cause), count in mixed.items() if truth != cause) <= 0.02 * len(flips), mixed
