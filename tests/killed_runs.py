"""Runs that are killed, and go on: client or server, at moments spread over the run.

::

    python -m tests.killed_runs 10
    python -m tests.killed_runs 10 torch 2

prints a line a case: all of them, or those of an engine's processes, which are killed together or one some time before the
other. A kill is SIGKILL; looked at are the journal, the log of the server, and what the finished run wrote.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from medllm.exam.loaders import write_problems
from medllm.journal import JOURNAL
from medllm.mini.problems import exam_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world
from tests.kills import ROOT, Job, until
from tests.meeting import options
from tests.server_process import free_port

AT_A_TIME, SAMPLES = 2, 2
STAGES = {
    "curate": f"--shot_count 1 --problems_until 2030 --sampling.samples {SAMPLES}".split(),
    "evaluate": "--shot_count 0 --template curation --explanation true".split(),
}
OUTPUT = {"curate": "preferences.jsonl", "evaluate": "predictions.jsonl"}


def problems(folder: Path, count: int) -> Path:
    """A file of so many problems with explanations."""
    write_problems(folder / "problems.jsonl", exam_problems(make_world(), max(8, count // 4))[:count])
    return folder / "problems.jsonl"


def command(stage: str, engine: str, file: Path, run: Path, processes: int = 1) -> list[str]:
    """A command that runs ``stage`` with little in each batch."""
    own = f"--model.path {BASE} --model.dtype float32 --batch_size 2 --sampling.max_new_tokens 24"
    if engine == "openai":
        own = f"--model.path rule --server.concurrency {AT_A_TIME} --server.retries 1"
    head = [sys.executable, "-m", "medllm", stage, "--engine", engine, "--problems", str(file), "--run", str(run)]
    return [*head, *STAGES[stage], *own.split(), *options(engine, processes)]


class Served:
    """A server in a process of its own, on one port."""

    def __init__(self, folder: Path, delay: float):
        self.port = free_port()
        self.log, self.delay = folder / "server.log", delay
        self.log.touch()
        self.environment = {"OPENAI_BASE_URL": f"http://127.0.0.1:{self.port}/v1", "OPENAI_API_KEY": "none"}

    def asked(self) -> list[tuple[str, int]]:
        """Prompt, by its digest, and seed of each request that came."""
        return [(row["asked"], row["seed"]) for row in map(json.loads, self.log.read_text().splitlines())]

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        words = [sys.executable, "-m", "tests.fake_server", str(self.port), str(self.log), str(self.delay)]
        with subprocess.Popen(words, cwd=ROOT) as process:
            try:
                until(lambda: _listens(self.port), process)
                yield process
            finally:
                process.kill()


def kept(run: Path) -> list[tuple[str, int]]:
    """Prompt, by its digest, and sample of the whole lines of a journal."""
    file = run / JOURNAL
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [(row["prompt"], row["sample"]) for row in map(json.loads, lines)]


def answered(stage: str, run: Path) -> set[str]:
    """The prompts that have all their answers."""
    samples = SAMPLES if stage == "curate" else 1
    return {prompt for prompt, number in Counter(prompt for prompt, _ in kept(run)).items() if number == samples}


def outputs(stage: str, run: Path) -> tuple[bytes, dict[str, Any]]:
    """What a finished run says, but for how long it took and how often it tried."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    result.pop("seconds")
    (result["server"] or {}).pop("retries", None)
    return (run / OUTPUT[stage]).read_bytes(), result


def kill_the_client(
    stage: str, engine: str, folder: Path, kills: int, *, count: int, delay: float = 0.03, processes: int = 1
) -> str:
    """Kill a run so often, each time when a further part of it is kept. What was seen, in a line."""
    file, draw = problems(folder, count), random.Random(1)
    served = Served(folder, delay) if engine == "openai" else None

    def begin(name: str) -> Job:
        words = command(stage, engine, file, folder / name, processes)
        return Job.of(words, engine, processes, **(served.environment if served else {}))

    with served.running() if served else nullcontext():
        begin("whole").end()
        asked_whole = served.asked() if served else []
        seen, there = [], []
        total = len(kept(folder / "whole"))
        for kill in range(kills):
            job = begin("run")
            least = max(1, total * (kill + 1) // (kills + 1))
            until(lambda least=least: len(kept(folder / "run")) >= least, job)
            job.kill(draw)
            seen.append(len(kept(folder / "run")))
            there.append((len(served.asked()) if served else 0, answered(stage, folder / "run")))
        assert "medllm: going on at " in begin("run").end()
    journal = Counter(kept(folder / "run"))
    assert journal.keys() == Counter(kept(folder / "whole")).keys()
    if served:
        assert set(journal.values()) == {1}, journal.most_common(3)
        assert not any(prompt in done for before, done in there for prompt, _ in served.asked()[before:]), "asked again"
        more = Counter(served.asked()[len(asked_whole) :]) - Counter(asked_whole)
        assert sum(more.values()) <= kills * AT_A_TIME, more
    assert outputs(stage, folder / "run") == outputs(stage, folder / "whole")
    who = engine if processes == 1 else f"{engine}, {processes} processes"
    again = ", none asked for again" if served else ""
    return f"{stage}, {who}: client killed with {seen} of {total} answers kept; outputs equal{again}"


def kill_the_server(stage: str, folder: Path, kills: int, *, count: int, delay: float = 0.03) -> str:
    """Kill the server so often: the run ends with exit code 2, says what is kept, and goes on. What was seen, in a line."""
    file, served = problems(folder, count), Served(folder, delay)
    with served.running():
        Job.of(command(stage, "openai", file, folder / "whole"), **served.environment).end()
    requests, words, seen = len(served.asked()), command(stage, "openai", file, folder / "run"), []
    for kill in range(kills):
        with served.running() as server:
            job = Job.of(words, **served.environment)
            until(lambda least=requests + requests * (kill + 1) // (kills + 1): len(served.asked()) >= least, job)
            server.send_signal(signal.SIGKILL)
            server.wait()
            said = job.end(code=2)
        full = len(answered(stage, folder / "run"))
        assert "no answer (APIConnectionError); tried " in said, said
        assert f"; {full} of {count} problems are kept, the same command goes on" in said, said
        seen.append(full)
    with served.running():
        Job.of(words, **served.environment).end()
    assert set(Counter(kept(folder / "run")).values()) == {1}
    more = Counter(served.asked()[requests:]) - Counter(served.asked()[:requests])
    assert sum(more.values()) <= kills * AT_A_TIME, more
    assert outputs(stage, folder / "run") == outputs(stage, folder / "whole")
    return f"{stage}: server killed with {seen} of {count} problems kept; outputs equal, each answer kept once"


def _listens(port: int) -> bool:
    with socket.socket() as other:
        return other.connect_ex(("127.0.0.1", port)) == 0


def main(kills: str, engine: str = "", processes: str = "1") -> None:
    """Every case, so many kills each; or those of one engine, in so many processes."""
    for stage in STAGES:
        for one in (engine,) if engine else ("openai", "jax", "torch"):
            with tempfile.TemporaryDirectory() as folder:
                said = kill_the_client(stage, one, Path(folder), int(kills), count=4 * int(kills), processes=int(processes))
                print(said, flush=True)
        if not engine:
            with tempfile.TemporaryDirectory() as folder:
                print(kill_the_server(stage, Path(folder), int(kills), count=4 * int(kills)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
