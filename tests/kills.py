"""Processes that are to be killed: started, alone or several that meet, and waited for."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.meeting import variables
from tests.server_process import free_port

ROOT = Path(__file__).resolve().parents[1]


def start(words: list[str], *, first: Callable[[], None] | None = None, **environment: str) -> subprocess.Popen[str]:
    """A command, which meets no proxy and no accelerator; ``first`` is called in its process."""
    quiet = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    env = {**quiet, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=first)


class Job:
    """One process, or several that work together."""

    def __init__(self, *processes: subprocess.Popen[str]):
        self.processes = processes
        # All are read all the time: one that cannot print stands still, and the others wait for it.
        self.readers = ThreadPoolExecutor(len(processes))
        self.printed = [self.readers.submit(process.communicate) for process in processes]

    @classmethod
    def of(cls, words: list[str], engine: str = "", count: int = 1, **environment: str) -> Job:
        """A command, in so many processes of an engine that meet."""
        port = free_port()
        return cls(*(start(words, **environment, **variables(engine, port, index, count)) for index in range(count)))

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        self.readers.shutdown()

    def poll(self) -> int | None:
        """The exit code of one that has ended; None while all run."""
        return next((code for process in self.processes if (code := process.poll()) is not None), None)

    def ask(self, number: signal.Signals) -> None:
        """Send all of them a signal."""
        for process in self.processes:
            process.send_signal(number)

    def kill(self, draw: random.Random) -> None:
        """Kill all of them: at once, or one some time before the others. Before that none has failed."""
        with self:
            ended = {process.poll() for process in self.processes}
            for number, process in enumerate(draw.sample(self.processes, len(self.processes))):
                if number:
                    time.sleep(draw.choice((0.0, draw.uniform(0, 1))))
                process.kill()
        assert ended <= {None, 0}, "\n".join(printed.result()[1] for printed in self.printed)

    def ended(self, index: int, seconds: float) -> tuple[int, str, str]:
        """Exit code, output and errors of a process that ends within ``seconds``."""
        out, errors = self.printed[index].result(seconds)
        return self.processes[index].returncode, out, errors

    def end(self, code: int = 0, seconds: float = 300) -> str:
        """Let them come to their ends, with this exit code; what the first wrote to its standard error."""
        with self:
            ends = [self.ended(index, seconds) for index in range(len(self.processes))]
        assert {found for found, _, _ in ends} == {code}, "\n".join(said for _, _, said in ends)
        return ends[0][2]


def until(holds: Callable[[], bool], process: Job | subprocess.Popen[Any]) -> None:
    """Wait for it, or for the end of the process."""
    ends = time.monotonic() + 240
    while not holds() and process.poll() is None:
        assert time.monotonic() < ends, "it takes too long"
        time.sleep(0.002)
