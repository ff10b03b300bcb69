"""lm-evaluation-harness on an engine of this project, against its own Hugging Face model on the same weights."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from medllm.cli import main
from medllm.config import ModelConfig
from medllm.engines import open_scorer
from medllm.exam.loaders import write_problems
from medllm.exam.option_scores import score_options
from medllm.exam.problem import Problem
from medllm.mini.problems import exam_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world
from parity_tests.tolerances import FLOAT32_FORWARD

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from medllm.harness import HarnessModel

PROBLEMS = [
    Problem("sky", "空は何色か。", ("赤", "青", "緑い"), ("b",), category="colours"),
    Problem("sea", "海は何色か。", ("赤と黄", "白", "青"), ("c",), category="colours"),
    Problem("study", "効くか。", ("はい", "いいえ", "たぶん"), ("b",), context="効かなかった。"),
    Problem("two", "2つ選べ。", ("赤", "青", "緑"), ("a", "b")),
    Problem("days", "何日か。", (), ("3",)),
]
LONGEST = 40  # so that texts are cut into windows, and contexts at their beginning


@pytest.fixture(scope="module")
def theirs():
    # Its cache of logits takes windows of a text that repeats itself for one another: 0.4 % off, and only in some batch sizes.
    settings = {"dtype": "float32", "device": "cpu", "batch_size": 4, "logits_cache": False}
    return HFLM(pretrained=str(BASE), max_length=LONGEST, **settings)


@pytest.fixture(scope="module", params=["jax", "torch"])
def ours(request):
    return HarnessModel(str(BASE), engine=request.param, dtype="float32", batch_size=4, max_length=LONGEST)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two exams, made up, as the command writes them."""
    folder = tmp_path_factory.mktemp("tasks")
    exams = {"colours": PROBLEMS, "world": exam_problems(make_world(), 2)}
    for name, problems in exams.items():
        write_problems(folder / f"{name}.jsonl", problems)
        method = "letters" if name == "world" else "options"
        assert main(["data", "task", str(folder / f"{name}.jsonl"), "--out", str(folder / "out"), "--method", method]) == 0
    return folder / "out", exams


def asked(kind, *arguments):
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def test_log_likelihoods_and_whether_a_text_is_the_likeliest_are_theirs(ours, theirs):
    written = ours.generate_until(asked("generate_until", ("症例：", {"max_gen_toks": 4, "until": []})))
    pairs = [
        ("空は", "青い"),
        ("Answer: ", "B"),
        ("", "症例"),
        ("空" * 60, "青"),
        ("症例：", written[0]),
        ("症例：", written[0] + "青"),
    ]
    found, expected = (model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True) for model in (ours, theirs))
    FLOAT32_FORWARD.assert_close([one for one, _ in found], [one for one, _ in expected], "log-likelihoods")
    assert [bool(one) for _, one in found] == [bool(one) for _, one in expected]
    assert [one for _, one in found][4:] == [True, False]


def test_a_long_text_has_their_rolling_likelihood(ours, theirs):
    texts = [("空は青い。",), ("症例：" + "海は青い。" * 40,)]
    requests = asked("loglikelihood_rolling", *texts)
    found, expected = (np.array(model.loglikelihood_rolling(requests)) for model in (ours, theirs))
    assert expected[1] < expected[0] < 0
    FLOAT32_FORWARD.assert_close(found, expected, "rolling log-likelihoods")


def test_texts_are_generated_as_theirs_until_a_stop_string(ours, theirs):
    greedy = {"max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", ("症例：", greedy | {"until": []}), ("空は", greedy | {"until": ["。"]}))
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_two_tasks_have_their_numbers_and_those_of_evaluate(tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    folder, exams = tasks
    results = []
    for model in (
        HarnessModel(str(BASE), dtype="float32", greedy=False),
        HFLM(pretrained=str(BASE), dtype="float32", device="cpu", batch_size=8),
    ):
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        results.append(simple_evaluate(model, tasks=["colours", "world"], task_manager=manager, bootstrap_iters=0))
    ours, theirs = results
    for name in ("colours", "world"):
        assert ours["results"][name]["acc,none"] == theirs["results"][name]["acc,none"]
        assert ours["results"][name]["acc_norm,none"] == theirs["results"][name]["acc_norm,none"]
        found, expected = (
            np.array([response[0] for sample in one["samples"][name] for response in sample["filtered_resps"]], float)
            for one in results
        )
        FLOAT32_FORWARD.assert_close(found, expected, name)
        engine = open_scorer("jax", ModelConfig(str(BASE), dtype="float32"))
        method = "letters" if name == "world" else "options"
        scores = score_options(engine, engine.tokenizer, exams[name], method=method)
        assert len(scores.results) == len(ours["samples"][name])
        assert scores.accuracy == pytest.approx(ours["results"][name]["acc,none"])


def test_the_harness_knows_the_model_by_name(tasks, tmp_path):
    words = ["run", "--model", "medllm", "--model_args", f"path={BASE},dtype=float32", "--tasks", "colours"]
    words += ["--include_path", str(tasks[0]), "--output_path", str(tmp_path / "out")]
    command = [sys.executable, "-m", "medllm.harness", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|colours|" in done.stdout
