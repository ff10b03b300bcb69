"""Trainings that are killed, stopped and damaged, and go on.

::

    python -m tests.killed_training jax cpt 20
    python -m tests.killed_training jax cpt 20 2

kills one run so often with SIGKILL, each time when a further part of it is done, with a checkpoint at every step, and prints a
line: what was seen, and how far the adapter is from that of a run that was left alone. With one number more, 2, two processes
train together, and are killed together or one some time before the other.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medllm.mini.study import BASE
from medllm.model.adapter import read_adapter
from medllm.preferences.records import Preference, Sample, write_preferences
from tests.kills import Job, until
from tests.meeting import options as meeting

STEPS = 24
_WORDS = "the fever went down after rest and water while a cough and a cold stayed with them for days".split()


def inputs(stage: str, folder: Path, processes: int = 1) -> list[str]:
    """Files of a document, or a problem, for each step of each process, and the options that name them."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(_WORDS, k=20)) for _ in range(STEPS * processes)]
    if stage == "cpt":
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "documents.jsonl").write_text(lines, encoding="utf-8")
        return f"--corpus.documents {folder / 'documents.jsonl'} --corpus.length 32 --training.max_steps {STEPS}".split()
    problems = [
        Preference(f"p{number}", f"Question {number}: {text}\n", Sample(f" {text} yes", "a"), (), (Sample(" no", "b"),))
        for number, text in enumerate(texts)
    ]
    write_preferences(folder / "preferences.jsonl", problems)
    return ["--preferences", str(folder / "preferences.jsonl")]


def command(engine: str, stage: str, options: list[str], run: Path, processes: int = 1) -> list[str]:
    """A command that trains a little in each step and keeps a checkpoint of each."""
    loop = f"--training.epochs 1 --training.batch_size {processes} --training.accumulation 1 --training.checkpoint_every 1"
    model = f"--model.path {BASE} --model.dtype float32 --lora.rank 4 --optimizer.learning_rate 1e-3"
    head = [sys.executable, "-m", "medllm", stage, "--engine", engine, "--run", str(run)]
    return [*head, *model.split(), *loop.split(), *options, *meeting(engine, processes)]


def finish(words: list[str]) -> str:
    """Let a command come to its end; what it wrote to its standard error."""
    return Job.of(words).end()


def steps(run: Path) -> list[int]:
    """Those in the whole lines of a log."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [json.loads(line)["step"] for line in lines]


def apart(run: Path, whole: Path) -> float:
    """The largest difference between the adapters of two runs."""
    found, expected = (read_adapter(folder / "adapter").tensors for folder in (run, whole))
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - value).max()) for name, value in expected.items())


def same_end(run: Path, whole: Path) -> float:
    """The two runs ended alike, and nothing half-written is left; the largest difference between their adapters."""
    assert steps(run) == steps(whole)
    assert not [path for path in run.rglob("*") if ".part" in path.name or "orbax-checkpoint-tmp" in path.name]
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, whole)]
    assert results[0]["steps"] == results[1]["steps"]
    assert results[0]["loss"] == results[1]["loss"]
    assert results[0]["rate"] > 0
    return apart(run, whole)


@dataclass(frozen=True)
class Trial:
    """A training in a folder, by one process or by several together, to be left alone, killed and stopped."""

    engine: str
    stage: str
    folder: Path
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.engine}, {self.stage}" + (f", {self.processes} processes" if self.processes > 1 else "")

    def start(self, name: str) -> Job:
        """Begin the run of that name, or go on with it."""
        given = inputs(self.stage, self.folder, self.processes)
        words = command(self.engine, self.stage, given, self.folder / name, self.processes)
        return Job.of(words, self.engine, self.processes)

    def whole(self) -> None:
        """Leave one alone; the others are held against it."""
        self.start("whole").end()

    def kill(self, kills: int) -> str:
        """Kill a run so often, and look at its end. What was seen, in a line."""
        run, draw, seen = self.folder / "killed", random.Random(1), []
        for number in range(kills):
            job = self.start("killed")
            least = number * STEPS // kills
            until(lambda least=least: max(steps(run), default=0) >= least and run.exists(), job)
            time.sleep(draw.uniform(0, 0.1))
            job.kill(draw)
            seen.append(max(steps(run), default=0))
        if not (run / "result.json").exists():
            said = self.start("killed").end()
            assert "going on at step" in said or "no checkpoint yet" in said, said
        return f"{self}: killed after steps {seen}; adapters apart by {same_end(run, self.folder / 'whole'):.1e}"

    def stop(self, number: signal.Signals = signal.SIGTERM) -> str:
        """Ask a run to stop in its middle, go on as it says, and look at its end. What was seen, in a line."""
        run, job = self.folder / "stopped", self.start("stopped")
        until(lambda: max(steps(run), default=0) >= 3, job)
        asked = time.monotonic()
        job.ask(number)
        said = job.end()
        took = time.monotonic() - asked
        assert not (run / "result.json").exists()
        first, last = said.strip().splitlines()[-2:]
        assert first == f"medllm: {number.name}: saving after this step; a second one ends at once"
        done = steps(run)[-1]
        told = f"medllm: stopped after step {done} of {STEPS}, which is saved; go on with: medllm {self.stage} --engine"
        assert last.startswith(told)
        assert f"going on at step {done} of {STEPS}" in self.start("stopped").end()
        distance = same_end(run, self.folder / "whole")
        return f"{self}: stopped after step {done} in {took:.1f} s; adapters apart by {distance:.1e}"


def main(engine: str, stage: str, kills: str, processes: str = "1") -> None:
    """The command of the module's docstring."""
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(engine, stage, Path(name), int(processes))
        trial.whole()
        print(trial.kill(int(kills)), flush=True)
        print(trial.stop(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
