"""Two processes with four devices each do what one process with one device does, and neither outlives the other for long."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from jax_medllm.mesh import processes
from medllm.cli import main
from medllm.errors import UserError
from medllm.exam.loaders import write_problems
from medllm.mini.problems import exam_problems, shot_problems, train_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world
from medllm.model.adapter import read_adapter
from parity_tests.verified_runs import proved_steps, verified
from tests.forced_devices import environment
from tests.kills import Job, start
from tests.meeting import variables
from tests.server_process import free_port

MESH = ("--mesh", "fsdp=4,tensor=2")  # each process holds half of the rows, and half of the weights
OTHER_MESH = ("--mesh", "data=2,fsdp=2,tensor=2")
MODEL = ("--model.path", str(BASE), "--model.dtype", "float32")
TRAINING = ("--lora.rank", "4", "--training.accumulation", "1", "--training.epochs", "2", "--training.remat", "none")
HEARTBEAT = 5
TWO_MINUTES = 120
"""What is promised; on two busy cores it can take most of one (docs/sharding.md)."""


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
    preferences = ("--preferences", str(out / "curate" / "preferences.jsonl"), "--training.batch_size", "1")
    options = ("--method", "options", "--model.quantization", "nf4")
    sampled = ("--sampling.samples", "3", "--sampling.max_new_tokens", "16", "--sampling.temperature", "1.0")
    return [
        ["curate", *MODEL, *shots, "--problems", str(data / "train.jsonl"), *sampled, "--run", str(out / "curate"), *more],
        ["rpo", *MODEL, *TRAINING, *preferences, "--model.adapter", str(adapter), "--run", str(out / "rpo"), *more],
        ["evaluate", *MODEL, *exam, "--shot_count", "0", "--sampling.max_new_tokens", "16", "--run", str(out / "exam"), *more],
        ["evaluate", *MODEL, *exam, *options, "--run", str(out / "options"), *more],
    ]


def wait_for(file: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end, f"{file} does not appear"
        time.sleep(0.1)


def by_hand(port: int, index: int) -> dict[str, str]:
    return variables("jax", port, index, 2)


def as_slurm(port: int, index: int) -> dict[str, str]:
    """What ``srun`` sets and JAX reads."""
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    task = {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
    return {processes.COUNT: "auto", "JAX_COORDINATOR_PORT": str(port), **step, **task}


def hears_interrupts() -> None:
    """In a child: what a shell starts in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def pair(*commands: Sequence[str], launcher: Callable[[int, int], dict[str, str]] = by_hand) -> Job:
    """Two processes of four devices each on this machine.

    Args:
        commands: Words after ``python -m`` for each.
        launcher: What tells them of one another.
    """
    port, common = free_port(), {**environment(4), processes.HEARTBEAT: str(HEARTBEAT)}
    heads = [[sys.executable, "-m", *command] for command in commands]
    started = (start(words, first=hears_interrupts, **common | launcher(port, index)) for index, words in enumerate(heads))
    return Job(*started)


@pytest.fixture(scope="module")
def work(data, tmp_path_factory):
    """The folder of all runs, and how the two processes ended.

    Continued pretraining is run three times: in one process, begun in two and ended in one, and begun in one and ended in two;
    and once with what fits the devices, of which the second process has small ones.
    """
    folder = tmp_path_factory.mktemp("work")
    one, two = folder / "one", folder / "two"
    half = ("--training.max_steps", "2")
    whole, to_one, to_two = (cpt(data, folder / name) for name in ("whole", "to-one", "to-two"))
    for words in [whole, [*to_two, *half], *stages(data, one, folder / "whole" / "adapter")]:
        assert main(words) == 0
    commands = [
        [*to_one, *half, *MESH],
        [*to_two, "--resume", "true", *OTHER_MESH],
        *stages(data, two, folder / "whole" / "adapter", *MESH),
    ]
    commands.append([*cpt(data, folder / "auto", "--training.max_steps", "1", *MESH), "--training.remat", "auto"])
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    large, small = (["tests.process_engine", str(folder / "commands.json"), available] for available in ("1e15", "1"))
    with pair(large, small) as job:
        ends = [job.ended(index, 900) for index in range(2)]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert main([*to_one, "--resume", "true"]) == 0
    return folder, ends


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def adapters_apart(one: Path, other: Path) -> float:
    """The largest norm of the difference of two adapters' matrices, relative to the matrix."""
    first, second = (read_adapter(run / "adapter").tensors for run in (one, other))
    assert first.keys() == second.keys()
    return max(float(np.linalg.norm(second[name] - value) / np.linalg.norm(value)) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expected", "found"), [("whole", "to-one"), ("whole", "to-two"), ("one/rpo", "two/rpo")], ids=["to-one", "to-two", "rpo"]
)
def test_two_processes_train_as_one_and_go_on_with_each_others_checkpoints(expected, found, work):
    """Adapters after a few steps differ by more than one step's rounding: Adam divides small gradients by themselves."""
    folder, _ = work
    one, two = (lines(folder / run / "metrics.jsonl") for run in (expected, found))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert adapters_apart(folder / expected, folder / found) < 1e-3


@pytest.mark.parametrize("run", ["to-two", "two/rpo"])
def test_steps_of_two_processes_are_proved_in_float64(work, run):
    folder, _ = work
    certificate = verified(folder / run, steps=1)
    assert certificate.verdict == "proved", certificate.headline()
    last = proved_steps(certificate)[-1]
    assert last.where == "step 4"
    assert "loss, gradient norm, learning rate" in last.said


def test_two_processes_write_what_one_writes(work):
    folder, _ = work
    for file in ("curate/preferences.jsonl", "exam/predictions.jsonl"):
        one, two = ((folder / side / file).read_text(encoding="utf-8") for side in ("one", "two"))
        assert one == two
        assert one.count("\n") >= 2
    one, two = (json.loads((folder / side / "options" / "result.json").read_text())["results"] for side in ("one", "two"))
    assert np.allclose([row["nll"] for row in two], [row["nll"] for row in one], rtol=1e-5, atol=0)


def test_what_is_kept_for_the_backward_pass_is_what_fits_the_smallest_device_of_all_processes(work):
    folder, _ = work
    assert json.loads((folder / "auto" / "result.json").read_text())["remat"] == "layer"


def test_only_the_first_process_prints(work):
    _, ((_, first, _), (_, second, _)) = work
    said = [re.findall("^(cpt|curate|rpo|evaluate):", out, re.MULTILINE) for out in (first, second)]  # Gloo prints too
    assert said == [["cpt", "cpt", "curate", "rpo", "evaluate", "evaluate", "cpt"], []]


@pytest.mark.parametrize(
    ("sent", "launcher"), [(signal.SIGKILL, by_hand), (signal.SIGINT, as_slurm)], ids=["killed", "interrupted"]
)
def test_a_process_that_ends_early_ends_the_other(sent, launcher, data, tmp_path):
    run = tmp_path / "run"
    command = ["medllm", *cpt(data, run, "--training.epochs", "10000", *MESH)]
    with pair(command, command, launcher=launcher) as job:
        wait_for(run / "metrics.jsonl")
        job.processes[1].send_signal(sent)
        other, _, errors = job.ended(0, TWO_MINUTES)
        own, _, said = job.ended(1, TWO_MINUTES)
    if sent == signal.SIGKILL:
        assert other != 0
        assert "another task died" in errors or "medllm: failed: JaxRuntimeError" in errors, errors
        assert own == -sent
    else:  # asked to stop: both agree on the step, save, and say how to go on
        assert (other, own) == (0, 0), errors
        assert "go on with: medllm cpt" in said + errors
    assert not (run / "result.json").exists()


def test_a_process_that_stays_alone_says_who_was_to_come():
    code = "from jax_medllm.mesh import processes; processes._MEETING_SECONDS = 1; processes.join('fsdp=-1')"
    alone = {**environment(4), **by_hand(free_port(), 0)}
    done = subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("medllm: ")]
    assert re.search(r"2 processes were to meet at 127.0.0.1:\d+, and have not within 1 s; start all of them", line)


@pytest.mark.parametrize(
    ("found", "mesh", "message"),
    [
        (
            {"ADDRESS": "localhost:1234", "COUNT": "2"},
            "fsdp=-1",
            "is set without JAX_PROCESS_ID; several processes need all three",
        ),
        ({"COUNT": "2"}, "fsdp=-1", "without JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        ({"ADDRESS": "localhost:1234", "COUNT": "two", "INDEX": "0"}, "fsdp=-1", "JAX_NUM_PROCESSES=two: a whole number"),
        ({"ADDRESS": "localhost:1234", "COUNT": "2", "INDEX": "2"}, "fsdp=-1", "a number from 0 to JAX_NUM_PROCESSES - 1"),
        ({"ADDRESS": "localhost", "COUNT": "2", "INDEX": "0"}, "fsdp=-1", "host:port of process 0 is needed"),
        (
            {"ADDRESS": "localhost:1234", "COUNT": "2", "INDEX": "0"},
            "",
            "there is no mesh to spread the stage over; add --mesh",
        ),
        ({"COUNT": "auto"}, "", "there is no mesh to spread the stage over; add --mesh"),
    ],
)
def test_a_wrong_setup_is_one_clear_line(found, mesh, message, monkeypatch):
    for name in ("ADDRESS", "COUNT", "INDEX"):
        monkeypatch.setenv(getattr(processes, name), found.get(name, ""))
    with pytest.raises(UserError, match=message):
        processes.join(mesh)
