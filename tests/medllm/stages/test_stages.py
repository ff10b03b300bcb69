"""The stages as functions: one command each, on the embedded base model."""

import json
import math
from typing import get_args

import pytest

from medllm.cli import main
from medllm.config import ModelConfig, OptionPrompt, Sampling
from medllm.exam.loaders import write_problems
from medllm.exam.option_prompts import OPTION_PROMPTS
from medllm.exam.option_scores import OptionResult, OptionScores
from medllm.mini.problems import exam_problems, shot_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world
from medllm.model.tokenizer import encode, load_tokenizer
from medllm.stage_config import EvaluateConfig
from medllm.stages import evaluate as stage
from medllm.stages.evaluate import run_evaluate

MODEL = ModelConfig(str(BASE), dtype="float32")


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exam")
    world = make_world()
    write_problems(folder / "exam.jsonl", exam_problems(world, 2)[:6])
    write_problems(folder / "shots.jsonl", shot_problems(world, 3))
    return folder


def test_the_exam_is_the_same_on_both_engines(exam, tmp_path):
    """Greedy answers of one model do not depend on the framework that reads it."""
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    answers = {}
    for engine in ("jax", "torch"):
        config = EvaluateConfig(
            MODEL,
            str(tmp_path / engine),
            (str(exam / "exam.jsonl"),),
            str(exam / "shots.jsonl"),
            explanation=True,
            template="curation",
            answer_as="text",
            sampling=Sampling(max_new_tokens=48),
        )
        run_evaluate(config, engine)
        answers[engine] = (tmp_path / engine / "predictions.jsonl").read_text(encoding="utf-8")
    assert answers["jax"] == answers["torch"]
    assert answers["jax"].count("\n") == 6


NONE_RIGHT = OptionScores(0, 0, (OptionResult("x", ("a",), (2.0, 1.0), (1, 1)),), {})


def test_the_prompt_of_an_option_is_a_setting(exam, tmp_path, monkeypatch):
    pytest.importorskip("jax")
    seen = []
    monkeypatch.setattr(stage, "score_options", lambda *_, prompt, method, **__: seen.append((prompt, method)) or NONE_RIGHT)
    for method in ("options", "letters"):
        config = EvaluateConfig(
            MODEL, str(tmp_path / method), (str(exam / "exam.jsonl"),), method=method, option_prompt="mcqa", problem_set="sky"
        )
        assert run_evaluate(config).setting == f"zero-shot {method}"
    assert seen == [("mcqa", "options"), ("mcqa", "letters")]
    assert set(get_args(OptionPrompt)) == set(OPTION_PROMPTS)


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_options_are_chosen_by_their_likelihood(engine, exam, tmp_path, capsys):
    pytest.importorskip(engine)
    settings = ["--model.path", str(BASE), "--model.dtype", "float32", "--run", str(tmp_path / "run"), "--method", "options"]
    out = tmp_path / "result.json"
    assert main(["evaluate", "--engine", engine, *settings, "--problems", str(exam / "exam.jsonl"), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["questions"] + sum(result["left_out"].values()) == 6
    tokenizer = load_tokenizer(BASE)
    problems = {row["problem_id"]: row for row in map(json.loads, (exam / "exam.jsonl").open(encoding="utf-8"))}
    for row in result["results"]:
        assert all(math.isfinite(nll) and nll > 0 for nll in row["nll"])
        assert row["tokens"] == [len(encode(tokenizer, choice)) for choice in problems[row["problem_id"]]["choices"]]
    likeliest = ["abcde"[row["nll"].index(min(row["nll"]))] in row["accepted"] for row in result["results"]]
    assert result["accuracy"] == pytest.approx(sum(likeliest) / len(likeliest))
    # Wilson's interval, as its formula is written (z of 95 %).
    n, p, z = len(likeliest), result["accuracy"], 1.959964
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    assert result["interval"] == pytest.approx([low, high], abs=1e-6)
    assert result["problem_set"] == "exam"
    said = capsys.readouterr().out
    assert "zero-shot options" in said
    assert f"{p:.3f} [{low:.3f}, {high:.3f}] right" in said
