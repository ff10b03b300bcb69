"""A measurement in a process of its own: ``python -m jax_medllm.bench NAME SETTINGS`` prints one line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from medllm.engine import require
from medllm.errors import UserError

_MODULES = {"jax": ("jax_medllm.bench", "jax")}


def measure(engine: str, name: str, **settings: Any) -> dict[str, Any]:
    """Run the measurement ``name`` of an engine in a fresh process and return what it found.

    Raises:
        UserError: the engine is not installed, or refuses the settings (its own one-line reason).
        RuntimeError: the process failed.
    """
    module, package = _MODULES[engine]
    require(f"engine '{engine}'", package, package)
    command = [sys.executable, "-m", module, name, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stderr.strip().splitlines()
    if done.returncode == 2 and said:
        raise UserError(said[-1])
    if done.returncode != 0:
        reason = said[-1] if said else f"exit code {done.returncode}"  # a process the kernel ends for its memory says nothing
        raise RuntimeError(f"the measuring process ended early: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def serve(measurements: Mapping[str, Callable[..., dict[str, Any]]], argv: list[str]) -> int:
    """The child's side: run the measurement named in ``argv`` with the settings that follow it."""
    name, settings = argv
    try:
        found = measurements[name](**json.loads(settings))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0
