"""Rounds of curation and preference training: what follows from what, when they stop, how they go on, and what is refused."""

import dataclasses
import json
import math

import pytest

from medllm.cli import main
from medllm.config import ModelConfig, Sampling
from medllm.errors import UserError
from medllm.exam.loaders import write_problems
from medllm.mini.problems import exam_problems, shot_problems, train_problems
from medllm.mini.study import BASE, LEAKED
from medllm.mini.world import make_world
from medllm.model.random import write_random_model
from medllm.preferences.records import Preference, Sample, write_preferences
from medllm.run import Run
from medllm.stage_config import HeldOutConfig, RoundsConfig
from medllm.stages import rounds
from medllm.stages.rounds import run_rounds
from tests.refusal import refused

SAMPLES = 100


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    made = make_world()
    write_problems(folder / "train.jsonl", train_problems(made, 1)[:4])
    write_problems(folder / "shots.jsonl", shot_problems(made, 3))
    write_problems(folder / "exam.jsonl", exam_problems(made, 1))
    return folder


class Stages:
    """Stages that answer and learn as they are told; what they were asked for is kept."""

    def __init__(self, shares, wrong=1):
        self.shares, self.wrong = shares, wrong
        self.curations, self.trainings = [], []
        self.fails = False
        self.says = "甲である。"

    def curate(self, config, engine):
        with Run(config.run, config, resume="auto") as run:
            wrong = (Sample("乙である。", "b"),) * self.wrong
            write_preferences(run.path / "preferences.jsonl", [Preference("1", "問:", Sample(self.says, "a"), rejected=wrong)])
            right = round(SAMPLES * self.shares[len(self.curations)])
            run.finish({"stage": "curate", "samples": SAMPLES, "right": right})
        self.curations.append(config)

    def rpo(self, config, engine):
        if self.fails:
            raise UserError("the disk is full")
        with Run(config.run, config, resume="auto") as run:
            opened = {"path": f"{config.run}/merged", "adapters": [f"{config.run}/adapter"]}
            run.finish({"stage": "rpo", "loss": 1.5, "steps": 7, "opened_as": opened})
        self.trainings.append(config)


@pytest.fixture
def scripted(monkeypatch):
    def make(*arguments, **settings) -> Stages:
        stages = Stages(*arguments, **settings)
        monkeypatch.setattr(rounds, "run_curate", stages.curate)
        monkeypatch.setattr(rounds, "run_rpo", stages.rpo)
        monkeypatch.setattr(rounds, "open_trainer", lambda *_: None)
        return stages

    return make


def config(world, tmp_path, **changes) -> RoundsConfig:
    sampling = Sampling(max_new_tokens=8, temperature=1.0, samples=2, seed=5)
    shots, problems = str(world / "shots.jsonl"), (str(world / "train.jsonl"),)
    return RoundsConfig(ModelConfig(str(BASE)), str(tmp_path / "run"), problems, shots, sampling=sampling, **changes)


@pytest.mark.parametrize(
    ("shares", "settings", "stopped", "best"),
    [
        ([0.3, 0.5, 0.6], {"rounds": 2}, "all rounds are done", 2),
        ([0.3, 0.5, 0.55], {"rounds": 5, "improvement": 0.1}, "no better", 2),
        ([0.3, 0.5, 0.4], {"rounds": 5, "improvement": 0.0}, "no better", 1),
        ([0.3, 0.3, 0.5], {"rounds": 2, "improvement": 0.0}, "all rounds are done", 2),
        ([0.3], {"rounds": 2, "fewest_pairs": 2}, "too few pairs", 0),
    ],
)
def test_rounds_end_where_another_would_not_pay(scripted, world, tmp_path, shares, settings, stopped, best):
    stages, said = scripted(shares), []
    result = run_rounds(config(world, tmp_path, **settings), say=said.append)
    assert (result.stopped, result.best.trainings) == (stopped, best)
    assert len(stages.curations) == len(shares) == len(said)
    assert len(stages.trainings) == len(shares) - 1
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [one["share_right"] for one in written["models"]] == shares
    assert written["opened_as"] == written["models"][best]["opened_as"]
    assert [one["pairs"] for one in written["models"]] == [1] * len(shares)


def test_pairs_that_no_wrong_answer_loses_are_not_counted(scripted, world, tmp_path):
    scripted([0.9], wrong=0)
    assert run_rounds(config(world, tmp_path), say=lambda line: None).stopped == "too few pairs"


def test_each_round_is_trained_from_the_one_before_on_its_own_answers(scripted, world, tmp_path):
    stages = scripted([0.3, 0.5, 0.7])
    asked = config(world, tmp_path, rounds=2)
    run_rounds(asked, say=lambda line: None)
    opened = [("round-1/rpo/merged", "round-1/rpo/adapter"), ("round-2/rpo/merged", "round-2/rpo/adapter")]
    models = [asked.model] + [
        dataclasses.replace(asked.model, path=f"{asked.run}/{path}", adapter=(f"{asked.run}/{adapter}",))
        for path, adapter in opened
    ]
    assert [one.model for one in stages.curations] == models
    assert [one.model for one in stages.trainings] == models[:2]
    data = [f"{asked.run}/round-{number}/curate" for number in (1, 2, 3)]
    assert [one.run for one in stages.curations] == data
    assert [one.preferences for one in stages.trainings] == [f"{folder}/preferences.jsonl" for folder in data[:2]]
    assert [one.sampling.seed for one in stages.curations] == [5, 6, 7]


def test_the_same_command_goes_on_behind_the_last_finished_stage(scripted, world, tmp_path):
    stages, asked = scripted([0.3, 0.5, 0.7]), config(world, tmp_path, rounds=2)
    stages.fails = True
    with pytest.raises(UserError, match="the disk is full"):
        run_rounds(asked, say=lambda line: None)
    stages.fails = False
    assert len(run_rounds(asked, say=lambda line: None).models) == 3
    assert (len(stages.curations), len(stages.trainings)) == (3, 2)


def test_rounds_are_added_to_a_finished_run_only_when_asked_for(scripted, world, tmp_path):
    stages, asked = scripted([0.3, 0.5, 0.7]), config(world, tmp_path, rounds=1)
    run_rounds(asked, say=lambda line: None)
    more = dataclasses.replace(asked, rounds=2)
    with pytest.raises(UserError, match="already holds a finished run"):
        run_rounds(more, say=lambda line: None)
    result = run_rounds(dataclasses.replace(more, resume=True), say=lambda line: None)
    assert (len(result.models), len(stages.trainings)) == (3, 2)
    assert [one.steps for one in result.models] == [0, 7, 7]


def test_a_problem_that_is_held_out_is_refused_before_anything_is_asked(scripted, world, tmp_path):
    stages = scripted([0.3])
    held_out = HeldOutConfig(problems=(str(world / "train.jsonl"),))
    with pytest.raises(UserError, match=r"holds problem .* which is held out \(--held_out\.problems\)"):
        run_rounds(config(world, tmp_path, held_out=held_out))
    assert not stages.curations
    assert not (tmp_path / "run").exists()


def test_every_stage_of_every_round_is_told_what_is_held_out(scripted, world, tmp_path):
    stages, held_out = scripted([0.3, 0.5, 0.7]), HeldOutConfig(problems=(str(world / "exam.jsonl"),), **LEAKED)
    run_rounds(config(world, tmp_path, rounds=2, held_out=held_out), say=lambda line: None)
    assert [one.held_out for one in (*stages.curations, *stages.trainings)] == [held_out] * 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rounds=0"], "rounds is 0"),
        (["--improvement=1"], "improvement is 1"),
        (["--loss.name=rop"], "loss.name is 'rop'"),
        (["--loss.name=dpo", "--loss.gamma=1"], "loss.gamma is 1.0, which loss 'dpo' does not read"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_and_leaves_nothing_behind(world, tmp_path, capsys, words, expected):
    pytest.importorskip("jax")
    given = f"rounds --model.path {BASE} --model.dtype float32 --run {tmp_path / 'run'} --problems {world / 'train.jsonl'}"
    assert expected in refused(tmp_path, capsys, *given.split(), *words)


def test_the_reference_of_a_round_is_the_model_that_it_begins_with(world, tmp_path, capsys):
    """DPO's term is ln 2 in a round's first step, whichever round: the policy is the reference there."""
    pytest.importorskip("jax")
    run, model = tmp_path / "run", tmp_path / "model"
    write_random_model(model, tokenizer=str(BASE), vocab_size=1280, hidden_size=32, layers=1)
    words = (
        f"rounds --model.path {model} --model.dtype float32 --run {run} --problems {world / 'train.jsonl'} --shots "
        f"{world / 'shots.jsonl'} --held_out.problems {world / 'exam.jsonl'} --held_out.near {LEAKED['near']} --rounds 2 "
        "--improvement 0 --answer_as text "
        "--batch_size 8 "
        "--sampling.samples 2 --sampling.max_new_tokens 8 --optimizer.learning_rate 1e-2 --optimizer.warmup_ratio 0 "
        "--lora.rank 2 --training.batch_size 2 --training.accumulation 1 --training.remat none --limit 4"
    )
    assert main(words.split()) == 0
    said = capsys.readouterr().out
    assert "model 2: 0 of 8 samples right" in said
    for number in (1, 2):
        first, *_, last = map(json.loads, (run / f"round-{number}" / "rpo" / "metrics.jsonl").open())
        assert first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert last["dpo_loss"] != pytest.approx(math.log(2), abs=1e-6)
