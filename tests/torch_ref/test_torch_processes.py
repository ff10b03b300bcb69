"""The reference engine in several processes, against itself in one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

import torch_ref
from medllm.config import LoraConfig, OptimizerConfig, TrainingConfig
from medllm.exam.loaders import write_problems
from medllm.mini.problems import exam_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world
from parity_tests.tiny_models import TinyModel, write_tiny_model
from parity_tests.verified_runs import inputs, proved_steps, train, verified
from tests.kills import Job

EVEN = {
    "lora": LoraConfig(rank=4, alpha=8.0),
    "optimizer": OptimizerConfig(learning_rate=1e-2),
    "training": TrainingConfig(epochs=1, batch_size=2, accumulation=1, max_steps=2, remat="none"),
}
"""Two whole steps: nothing is filled up, whatever the number of processes."""

TRAINS = """
import sys
from pathlib import Path
from medllm.config import PreferenceLoss, TrainingConfig
from parity_tests.verified_runs import train
from tests.torch_ref.test_torch_processes import EVEN

given, runs = map(Path, sys.argv[1:])
training = TrainingConfig(epochs=2, batch_size=4, accumulation=1, checkpoint_every=1, remat="none")
loss = PreferenceLoss(beta=0.5, alpha=0.3, nll_reduction="micro_batch_tokens")
train("cpt", "torch", given, runs / "cpt", training=training)
train("rpo", "torch", given, runs / "rpo", training=training, loss=loss)
train("cpt", "torch", given, runs / "even", **EVEN)
"""


def launch(count, *words):
    """Run python with these words, in one process or several, to its end."""
    Job.of([sys.executable, *words], "torch", count, OMP_NUM_THREADS="1").end()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two processes trained, of five rows and five pairs: the second step of an epoch is filled up from the first."""
    folder = tmp_path_factory.mktemp("processes")
    given = inputs(folder / "given", write_tiny_model(folder, TinyModel(), torch.float32))
    for file in (given / "documents.jsonl", given / "preferences.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    launch(2, "-c", TRAINS, str(given), str(folder))
    return folder


def test_two_processes_train_what_one_trains_and_one_of_them_writes(runs, tmp_path):
    two, one = runs / "even", train("cpt", "torch", runs / "given", tmp_path / "one", **EVEN)
    logged, alone = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (two, one))
    assert [line["step"] for line in logged] == [line["step"] for line in alone] == [1, 2]
    for name in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose([line[name] for line in logged], [line[name] for line in alone], rtol=1e-5)
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (two, one)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", ["cpt", "rpo"])
def test_what_two_processes_train_is_proved_in_float64(runs, stage):
    lines = (runs / stage / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    certificate = verified(runs / stage)
    assert certificate.verdict == "proved", certificate.headline()
    steps = proved_steps(certificate)
    assert [one.where for one in steps] == ["step 1", "step 2", "step 3", "step 4"]
    assert "loss, gradient norm, learning rate, first moment, second moment, update" in steps[3].said


ANSWERED = """
import os
import sys
from medllm.cli import main

made = []
import torch_ref
module = sys.modules["torch_ref.generate"]
plain = module._continue
module._continue = lambda *given: made.append(len(given[2])) or plain(*given)
folder, run, base = sys.argv[1:]
common = f"--engine torch --model.path {base} --model.dtype float32 --batch_size 2 --problems {folder}/problems.jsonl".split()
sampling = "--shot_count 1 --problems_until 2030 --sampling.samples 2 --sampling.max_new_tokens 8".split()
assert main(["curate", *common, *sampling, "--run", f"{run}/curate"]) == 0
print(sum(made), file=open(f"{run}.{os.environ.get('RANK', 'alone')}", "w"))
assert main(["evaluate", *common, "--method", "options", "--limit", "5", "--run", f"{run}/options"]) == 0
"""


def test_two_processes_share_the_answers_and_write_what_one_writes(tmp_path):
    write_problems(tmp_path / "problems.jsonl", exam_problems(make_world(), 8)[:6])
    for count in (1, 2):
        launch(count, "-c", ANSWERED, str(tmp_path), str(tmp_path / str(count)), str(BASE))
    for file in ("curate/preferences.jsonl", "curate/answers.journal", "options/options.journal"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()
    assert json.loads((tmp_path / "2" / "curate" / "result.json").read_text())["problems"] == 6
    made = [int((tmp_path / name).read_text()) for name in ("1.alone", "2.0", "2.1")]
    assert made == [12, 6, 6]


@pytest.mark.parametrize(("name", "gpus"), [("cpt_4xa100", 4), ("rpo_2xa100", 2)])
def test_accelerate_reads_the_launch_files(name, gpus):
    config = load_config_from_file(str(Path(torch_ref.__file__).parent / "accelerate" / f"{name}.yaml"))
    assert (config.num_processes, config.mixed_precision) == (gpus, "bf16")
    assert config.distributed_type == "MULTI_GPU"
