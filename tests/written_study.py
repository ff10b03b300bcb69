"""Run folders as the stages write them, of a study that nobody trained: models of known chances."""

from __future__ import annotations

import random
import re
from pathlib import Path

from medllm.config import ModelConfig
from medllm.exam.loaders import write_problems
from medllm.exam.predictions import Prediction, write_predictions
from medllm.exam.problem import Problem
from medllm.exam.scoring import score
from medllm.preferences.records import Preference, Sample, write_preferences
from medllm.report.statistics import Bootstrap
from medllm.run import Run
from medllm.stage_config import CptConfig, CurateConfig, EvaluateConfig, RpoConfig

DRAW = Bootstrap(resamples=200)
SETTINGS = ("3-shot", "3-shot with explanation")
CHANCES = {
    "base": (0.6, 0.35),
    "CPT": (0.8, 0.65),
    "RPO without CPT": (0.7, 0.6),
    "CPT + DPO": (0.8, 0.7),
    "CPT + RPO": (0.8, 0.8),
}
ATTACK = "<script>alert('x')</script> & <img src=https://example.org/x.png>"
MODEL = ModelConfig("models/small")


def problems(count: int = 40) -> list[Problem]:
    return [
        Problem(
            f"118{'ABC'[i % 3]}{i}",
            f"患者 {i}: which drug?",
            ("一", "二", "三"),
            ("a",),
            1 + (i % 5 == 0),
            year=2024,
            section="ABC"[i % 3],
        )
        for i in range(count)
    ]


def shots() -> list[Problem]:
    return [
        Problem(f"100A{i}", f"Example {i}?", ("left", "right"), ("b",), explanation=f"for it is {i}", year=2006)
        for i in range(3)
    ]


def _answer(problem: Problem, letter: str, setting: str) -> Prediction:
    """A text that says the letter; every third wrong one that explains says none."""
    if letter != "a" and setting == SETTINGS[1] and int(problem.problem_id[4:]) % 3 == 1:
        return Prediction(problem.problem_id, "", f"because {problem.problem_id} nobody knows.")
    return Prediction(problem.problem_id, letter, f"because {problem.problem_id}\n答え: {letter}")


def write_study(root: Path) -> list[Path]:
    """A small study: two training runs, a curation and ten evaluations, as the stages leave them."""
    rng = random.Random(0)
    exam = problems()
    write_problems(root / "exam.jsonl", exam)
    write_problems(root / "shots.jsonl", shots())
    train_result = {"engine": "jax", "steps": 30, "seconds": 75.2, "adapter": "adapter"}
    with Run(root / "cpt", CptConfig(MODEL, "cpt")) as run:
        for step in range(30):
            run.log(step, loss=3 / (1 + step), learning_rate=1e-4)
        run.finish({"stage": "cpt", "loss": 0.1, "rate": 1234.5, **train_result})
    with Run(root / "curate", CurateConfig(MODEL, "curate", ("train.jsonl",))) as run:
        right, wrong = Sample("t", "a"), Sample("t", "b")
        mixes = [(2, 1), (3, 0), (0, 3), (0, 0), (1, 2)]
        write_preferences(
            run.path / "preferences.jsonl",
            [Preference(f"p{i}", "q", right, (right,) * good, (wrong,) * bad) for i, (good, bad) in enumerate(mixes)],
        )
        run.finish({"stage": "curate", "engine": "jax", "problems": 5, "chosen": 6, "rejected": 6})
    with Run(root / "rpo", RpoConfig(MODEL, "rpo", "curate/preferences.jsonl")) as run:
        for step in range(30):
            run.log(
                step, loss=2 / (1 + step), dpo_loss=0.69 - step / 100, nll=0.2, margins=step / 10, accuracies=0.5 + step / 60
            )
        run.finish({"stage": "rpo", "loss": 0.2, "rate": 3.25, "pairs": 96, **train_result})
    folders = [root / "cpt", root / "curate", root / "rpo"]
    for model, chances in CHANCES.items():
        for setting, chance in zip(SETTINGS, chances, strict=True):
            name = re.sub(r"\W+", "-", f"evaluate {model} {setting}").lower()
            asked = {"shots": str(root / "shots.jsonl"), "shot_count": 3, "explanation": setting == SETTINGS[1]}
            with Run(root / name, EvaluateConfig(MODEL, name, (str(root / "exam.jsonl"),), **asked)) as run:
                letters = ["a" if rng.random() < chance else "b" for _ in exam]
                answers = [_answer(p, letter, setting) for p, letter in zip(exam, letters, strict=True)]
                write_predictions(run.path / "predictions.jsonl", answers)
                sheet = score(exam, answers).to_json()
                run.finish(
                    {"stage": "evaluate", "engine": "jax", "model": model, "setting": setting, "seconds": 12.5, "score": sheet}
                )
            folders.append(root / name)
    return folders
