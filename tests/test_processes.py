"""Two processes with four devices each do what one process with one device does, and neither outlives the other for long."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jax_medllm import processes
from medllm.adapter_directory import read_adapter
from medllm.cli import main
from medllm.errors import UserError
from medllm.exam.loaders import write_problems
from medllm.mini.problems import exam_problems, shot_problems, train_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world

MESH = ("--mesh", "fsdp=4,tensor=2")  # each process holds half of the rows, and half of the weights
OTHER_MESH = ("--mesh", "data=2,fsdp=2,tensor=2")
MODEL = ("--model.path", str(BASE), "--model.dtype", "float32", "--model.quantization", "nf4")
TRAINING = ("--lora.rank", "4", "--optimizer.learning_rate", "1e-3", "--training.accumulation", "1", "--training.epochs", "2")
HEARTBEAT = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve rows of text, two problems to learn from, and an exam of five questions."""
    folder = tmp_path_factory.mktemp("data")
    world = make_world()
    words = " ".join(str(number) for number in range(2000, 2600))
    (folder / "text.txt").write_text(words[: 12 * 60], encoding="utf-8")
    write_problems(folder / "train.jsonl", train_problems(world, 1)[:2])
    write_problems(folder / "exam.jsonl", exam_problems(world, 1)[:5])
    write_problems(folder / "shots.jsonl", shot_problems(world, 3))
    return folder


def cpt(data: Path, run: Path, *more: str) -> list[str]:
    corpus = ("--corpus.documents", str(data / "text.txt"), "--corpus.length", "64", "--training.batch_size", "6")
    return ["cpt", *MODEL, *TRAINING, *corpus, "--run", str(run), *more]


def stages(data: Path, out: Path, adapter: Path, *more: str) -> list[list[str]]:
    """Curation, preference training on top of ``adapter``, and the exam in both ways."""
    shots = ("--shots", str(data / "shots.jsonl"))
    exam = ("--problems", str(data / "exam.jsonl"))
    sampled = ("--sampling.samples", "3", "--sampling.max_new_tokens", "24", "--sampling.temperature", "1.0")
    return [
        ["curate", *MODEL, *shots, "--problems", str(data / "train.jsonl"), *sampled, "--run", str(out / "curate"), *more],
        ["rpo", *MODEL, *TRAINING, "--training.batch_size", "1", "--model.adapter", str(adapter), "--run", str(out / "rpo")]
        + ["--preferences", str(out / "curate" / "preferences.jsonl"), *more],
        ["evaluate", *MODEL, *shots, *exam, "--sampling.max_new_tokens", "24", "--run", str(out / "exam"), *more],
        ["evaluate", *MODEL, *exam, "--method", "options", "--run", str(out / "options"), *more],
    ]


class Pair:
    """Two processes of four devices each on this machine.

    Args:
        command: Words after ``python -m`` for each.
        settings: Environment variables of both.
    """

    def __init__(self, *command: list[str], **settings: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        environment = {
            **os.environ,
            **{"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"},
            **{processes.ADDRESS: address, processes.COUNT: "2", processes.HEARTBEAT: str(HEARTBEAT), **settings},
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", *command[index]],
                env={**environment, processes.INDEX: str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def ended(self, index: int, seconds: float) -> tuple[int, str, str]:
        """Exit code, output and errors of a process that ends within ``seconds``."""
        process = self.processes[index]
        out, errors = process.communicate(timeout=seconds)
        return process.returncode, out, errors


@pytest.fixture(scope="module")
def work(data, tmp_path_factory):
    """Folders of the same stages in one process and in two, and what the second of the two printed."""
    folder = tmp_path_factory.mktemp("work")
    one, two = folder / "one", folder / "two"
    for words in [
        cpt(data, one / "cpt"),
        cpt(data, folder / "to-two", "--training.max_steps", "2"),
        *stages(data, one, one / "cpt" / "adapter"),
    ]:
        assert main(words) == 0
    commands = [
        cpt(data, two / "cpt", *MESH),
        cpt(data, folder / "to-one", "--training.max_steps", "2", *MESH),
        cpt(data, folder / "to-two", "--resume", "true", *OTHER_MESH),
        *stages(data, two, one / "cpt" / "adapter", *MESH),
    ]
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    with Pair(*[["tests.process_engine", str(folder / "commands.json")]] * 2) as pair:
        ends = [pair.ended(index, 300) for index in range(2)]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert main(cpt(data, folder / "to-one", "--resume", "true")) == 0
    return folder, ends


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def adapters_apart(one: Path, other: Path) -> float:
    """The largest norm of the difference of two adapters' matrices, relative to the matrix."""
    first, second = (read_adapter(run / "adapter").tensors for run in (one, other))
    assert first.keys() == second.keys()
    return max(float(np.linalg.norm(second[name] - value) / np.linalg.norm(value)) for name, value in first.items())


@pytest.mark.parametrize("stage", ["cpt", "rpo"])
def test_two_processes_train_as_one(stage, work):
    """Adapters after a few steps differ by more than one step's rounding: Adam divides small gradients by themselves."""
    folder, _ = work
    one, two = (lines(folder / side / stage / "metrics.jsonl") for side in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert adapters_apart(folder / "one" / stage, folder / "two" / stage) < 1e-3


def test_two_processes_write_what_one_writes(work):
    folder, _ = work
    for file in ("curate/preferences.jsonl", "exam/predictions.jsonl"):
        one, two = ((folder / side / file).read_text(encoding="utf-8") for side in ("one", "two"))
        assert one == two
        assert one.count("\n") >= 2
    nll = [[row["nll"] for row in json.loads((folder / side / "options" / "result.json").read_text())["results"]] for side in ("one", "two")]
    assert np.allclose(*map(np.concatenate, nll), rtol=1e-5, atol=0)


@pytest.mark.parametrize("run", ["to-one", "to-two"])
def test_a_checkpoint_goes_on_with_another_number_of_processes(run, work):
    folder, _ = work
    assert [line["step"] for line in lines(folder / run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert adapters_apart(folder / "one" / "cpt", folder / run) < 1e-3


def test_only_the_first_process_prints(work):
    _, ((_, first, _), (_, second, errors)) = work
    said = [line for line in second.splitlines() if "[Gloo]" not in line]
    assert (said, errors) == ([], "")
    assert sum(line.startswith(("cpt:", "curate:", "rpo:", "evaluate:")) for line in first.splitlines()) == 7
