"""Processes that are to be killed: started, and waited for."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    """A command, which meets no proxy and no accelerator."""
    quiet = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    env = {**quiet, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(holds: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Wait for it, or for the end of the process."""
    ends = time.monotonic() + 240
    while not holds() and process.poll() is None:
        assert time.monotonic() < ends, "it takes too long"
        time.sleep(0.002)
