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


def test_two_processes_train_what_one_trains_and_one_of_them_writes(folder, tmp_path):
    for count, port in ((1, None), (2, free_port())):
        launched = [
            subprocess.Popen(
                [sys.executable, "-c", TWO_PROCESSES, str(folder), str(tmp_path / str(count))],
                env={
                    **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
                    **({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)} if port else {}),
                    **({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if port else {}),
                },
                stderr=subprocess.PIPE,
            )
            for rank in range(count)
        ]  # fmt: skip
        for process in launched:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()[-2000:]
    logs = ((tmp_path / count / "metrics.jsonl").read_text().splitlines() for count in "12")
    one, two = ([json.loads(line) for line in log] for log in logs)
    assert [line["step"] for line in two] == [line["step"] for line in one] == [1, 2]
    for name in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose([line[name] for line in two], [line[name] for line in one], rtol=1e-5)
    adapters = [load_file(tmp_path / count / "adapter" / "adapter_model.safetensors") for count in "12"]
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "gpus"), [("cpt_4xa100", 4), ("rpo_2xa100", 2)])
def test_accelerate_reads_the_launch_files(name, gpus):
    config = load_config_from_file(str(Path(torch_ref.__file__).parent / "accelerate" / f"{name}.yaml"))
    assert (config.num_processes, config.mixed_precision) == (gpus, "bf16")
    assert config.distributed_type == "MULTI_GPU"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
