"""What a training says before it starts, against sizes and times that are worked out here."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest

from medllm import forecast
from medllm.config import LoraConfig, ModelConfig, OptimizerConfig, Sampling, TrainingConfig
from medllm.engine import Generation, place
from medllm.errors import UserError
from medllm.exam.problem import Problem
from medllm.forecast import Devices, Work, adapter_parameters, announce, check_room, checkpoints_kept, training_flops
from medllm.mini.study import BASE
from medllm.model.directory import ModelDirectory
from medllm.model.tokenizer import load_tokenizer
from medllm.published import PUBLISHED
from medllm.stage_config import CptConfig, CurateConfig, EvaluateConfig
from medllm.stages.curate import build_preferences
from medllm.stages.evaluate import sit_exam

CPT = CptConfig(ModelConfig(str(BASE)), "run", lora=LoraConfig(rank=4), training=TrainingConfig(checkpoint_every=10))
WORK = Work("100 rows of 64 tokens", 12_800, 200)


def test_a_training_says_on_what_it_runs_what_it_does_and_where_it_writes(tmp_path, capsys):
    announce("jax", CPT.model, CPT, CPT.lora, tmp_path / "run", Devices(4, "cpu", "cpu", "fsdp=4"), WORK)
    one, two, three = capsys.readouterr().err.splitlines()
    assert one == f"medllm: jax on 4 x cpu as fsdp=4: {BASE} in bfloat16, remat layer, adapter of 57,344 parameters"
    assert two == "medllm: 100 rows of 64 tokens: 200 steps of 16 x 1"  # a CPU's peak rate is nothing to go by
    # two that are kept and one that is written, of three fp32 numbers a parameter each, and the adapter
    mebibytes = 57_344 * 4 * (3 * 3 + 1) / 2**20
    assert three.startswith(f"medllm: writing to {tmp_path / 'run'}: about {mebibytes:.1f} MiB with its checkpoints, of ")


def test_the_least_time_is_that_of_the_peak_rate(tmp_path, capsys):
    base = ModelDirectory(BASE).described
    work = dataclasses.replace(WORK, tokens=10**15)
    announce("torch", CPT.model, CPT, CPT.lora, tmp_path, Devices(8, "cuda", "NVIDIA H100 80GB HBM3"), work)
    seconds = 6 * base.linear_parameters * 1e15 / (8 * 989e12)  # 989 TFLOP/s of dense bf16, by NVIDIA's data sheet
    said = capsys.readouterr().err
    assert f"at least {forecast.duration(seconds)}, by the devices' peak rate" in said


def test_the_operations_of_a_token_are_four_a_weight_and_six_where_the_forward_pass_is_computed_again():
    base = PUBLISHED["qwen2.5-72b"]
    assert training_flops(base, 10, again=False) == 40 * base.linear_parameters
    assert training_flops(base, 10, again=True) == 60 * base.linear_parameters


def test_an_adapters_parameters_are_those_of_the_modules_it_covers():
    base = ModelDirectory(BASE).described
    assert adapter_parameters(base, LoraConfig(rank=4)) == base.adapter_parameters(4)
    width, heads = base.hidden_size, base.heads_width
    one = LoraConfig(rank=4, targets=("layers.1.self_attn.q_proj",))
    assert adapter_parameters(base, one) == 4 * (width + heads)


@pytest.mark.parametrize(
    ("training", "kept"),
    [
        (TrainingConfig(), 1),
        (TrainingConfig(checkpoint_every=10), 3),
        (TrainingConfig(checkpoint_minutes=10, keep=4), 5),
        (TrainingConfig(checkpoint_every=10, keep_every=100), 13),
        (TrainingConfig(checkpoint_every=1, keep=5000), 1000),
    ],
)
def test_checkpoints_lie_beside_the_one_that_is_written(training, kept):
    assert checkpoints_kept(training, 1000) == kept


def test_a_run_that_its_disk_has_no_room_for_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(
        UserError, match=r"take about 2\.2 MiB, and 1\.0 MiB are free on that disk; make room, .*--training.keep"
    ):
        announce("jax", CPT.model, CPT, CPT.lora, tmp_path / "run", Devices(1, "cpu", "cpu"), WORK)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "of_before").write_bytes(bytes(2**20))
    check_room(tmp_path / "run", 2**21)  # half of it is there already


def test_where_the_checkpoints_are_depends_on_the_moments():
    assert forecast.checkpoint_bytes(10, OptimizerConfig().moments) == 10 * 4 * 3


class Answers:
    """A model that answers a."""

    name, place = "jax", "jax on 8 x TPU v4 as fsdp=8: base in bfloat16"
    tokenizer = load_tokenizer(str(BASE))

    def generate(self, prompts, sampling, batch_size=32, progress=None):
        return [[Generation(f"x\n Answer: {chr(97 + one)}", (), "stop") for one in range(sampling.samples)] for _ in prompts]


def test_curation_and_evaluation_say_on_what_they_run_what_they_ask_and_where_they_write(tmp_path, capsys):
    problem = Problem("110A1", "?", ("x", "y"), ("a",), explanation="x", year=2016, source="p:1")
    model, sampling = ModelConfig("base"), Sampling(temperature=1.0, samples=2, max_new_tokens=1000)
    build_preferences(Answers(), [problem], [], CurateConfig(model, str(tmp_path / "c"), (), shot_count=0, sampling=sampling))
    sit_exam(Answers(), [problem], [], EvaluateConfig(model, str(tmp_path / "e"), (), shot_count=0))
    assert capsys.readouterr().err.splitlines() == [
        f"medllm: {Answers.place}: 1 problems x 2 samples of up to 1,000 tokens, 32 at a time, into {tmp_path / 'c'}",
        f"medllm: {Answers.place}: 1 problems, answers of up to 512 tokens, 32 at a time, into {tmp_path / 'e'}",
    ]
    assert place(SimpleNamespace(name="openai")) == "openai"
