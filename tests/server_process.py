"""A server of somebody else's in a process of its own, for a test to ask."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 120.0
"""Seconds until it has to answer."""


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def up(
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    answers: str,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[str]:
    """The address of its API, from when it answers at the path ``answers`` to the end of the block."""
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, cwd=cwd)
        try:
            _await(process, f"http://127.0.0.1:{port}{answers}", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


def _await(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    ends = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except OSError:
            assert process.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
            assert time.monotonic() < ends, f"no answer in {PATIENCE:g} s: {log.read_text()[-2000:]}"
            time.sleep(0.1)
