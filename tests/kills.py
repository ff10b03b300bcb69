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
from typing import Protocol

from tests.meeting import variables
from tests.server_process import free_port

ROOT = Path(__file__).resolve().parents[1]


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    """A command, which meets no proxy and no accelerator."""
    quiet = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    env = {**quiet, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Job:
    """One command, run by a process or by several together."""

    def __init__(self, words: list[str], engine: str = "", processes: int = 1, **environment: str):
        port = free_port()
        told = [variables(engine, port, index, processes) for index in range(processes)]
        self.processes = [start(words, **environment, **own) for own in told]
        # All are read all the time: one that cannot print stands still, and the others wait for it.
        self.readers = ThreadPoolExecutor(processes)
        self.printed = [self.readers.submit(process.communicate) for process in self.processes]

    def poll(self) -> int | None:
        """The exit code of one that has ended; None while all run."""
        return next((code for process in self.processes if (code := process.poll()) is not None), None)

    def ask(self, number: signal.Signals) -> None:
        """Send all of them a signal."""
        for process in self.processes:
            process.send_signal(number)

    def kill(self, draw: random.Random) -> None:
        """Kill all of them: at once, or one some time before the others. Before that none has failed."""
        ended = {process.poll() for process in self.processes}
        for number, process in enumerate(draw.sample(self.processes, len(self.processes))):
            if number:
                time.sleep(draw.choice((0.0, draw.uniform(0, 1))))
            process.kill()
        said = [printed.result()[1] for printed in self.printed]
        assert ended <= {None, 0}, "\n".join(said)

    def end(self, code: int = 0) -> str:
        """Let them come to their ends, with this exit code; what the first wrote to its standard error."""
        try:
            said = [printed.result(timeout=240)[1] for printed in self.printed]
        finally:
            for process in self.processes:
                process.kill()
        assert {process.returncode for process in self.processes} == {code}, "\n".join(said)
        return said[0]


class Ends(Protocol):
    """What may have come to its end."""

    def poll(self) -> int | None:
        """Its exit code; None before."""


def until(holds: Callable[[], bool], process: Ends) -> None:
    """Wait for it, or for the end of the process."""
    ends = time.monotonic() + 240
    while not holds() and process.poll() is None:
        assert time.monotonic() < ends, "it takes too long"
        time.sleep(0.002)
