"""The reference engine in several processes, against itself in one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

import torch_ref
from medllm.exam.loaders import write_problems
from medllm.mini.problems import exam_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world

pytest_plugins = ["tests.small_torch_model"]


TWO_PROCESSES = """
import sys
import numpy as np
from medllm.config import LoraConfig, ModelConfig, OptimizerConfig, TrainingConfig
from medllm.stage_config import CptConfig
from medllm.corpus.packing import pack
from medllm.run import Run
from torch_ref import TorchEngine

config = CptConfig(
    ModelConfig(sys.argv[1], dtype="float32"), sys.argv[2], lora=LoraConfig(rank=4, alpha=8), optimizer=OptimizerConfig(1e-2),
    training=TrainingConfig(epochs=1, batch_size=2, accumulation=2),
)
rows = pack([np.arange(1, length) for length in (20, 14, 16, 24, 17, 18, 21, 22)], 24, 0)
assert len(rows.tokens) == 8
with Run(config.run, config) as run:
    TorchEngine(config.model).train_cpt(rows, config, run)
"""


def launch(count, *words):
    """Run python with these words, in one process or several, to its end."""
    port = free_port()
    launched = [
        subprocess.Popen(
            [sys.executable, *words],
            env={
                **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
                **({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)} if count > 1 else {}),
                **({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if count > 1 else {}),
            },
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]  # fmt: skip
    for process in launched:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-2000:]


def test_two_processes_train_what_one_trains_and_one_of_them_writes(folder, tmp_path):
    for count in (1, 2):
        launch(count, "-c", TWO_PROCESSES, str(folder), str(tmp_path / str(count)))
    logs = ((tmp_path / count / "metrics.jsonl").read_text().splitlines() for count in "12")
    one, two = ([json.loads(line) for line in log] for log in logs)
    assert [line["step"] for line in two] == [line["step"] for line in one] == [1, 2]
    for name in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose([line[name] for line in two], [line[name] for line in one], rtol=1e-5)
    adapters = [load_file(tmp_path / count / "adapter" / "adapter_model.safetensors") for count in "12"]
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, atol=1e-5, rtol=0)


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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
