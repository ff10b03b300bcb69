"""Lets a profile of this process name the operations of a compiled program, on CPUs too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medllm.bench.profile import PROGRAMS

_FLAG = "--xla_cpu_enable_xprof_traceme=true"


def recorded(stage: Callable[..., dict[str, Any]], *, profile: str | None, **settings: Any) -> dict[str, Any]:
    """Run ``stage``; where it writes a trace into the folder ``profile``, every operation is in it, and beside it in
    ``programs`` stands the text of every program compiled.

    Nothing may have been computed in this process before: XLA reads its flags once.
    """
    if profile is None:
        return stage(profile=None, **settings)
    with tempfile.TemporaryDirectory(prefix="medllm-programs-") as dumped:
        _set_flags(f"--xla_dump_to={dumped}", "--xla_dump_hlo_as_text")
        found = stage(profile=profile, **settings)
        _keep_programs(Path(dumped), Path(profile) / PROGRAMS)
    return found


def _set_flags(*flags: str) -> None:
    given = os.environ.get("XLA_FLAGS", "").split()
    backend = _backend([*given, _FLAG])
    os.environ["XLA_FLAGS"] = " ".join([*given, *flags, *([_FLAG] if backend else [])])
    if "cpu" in (backend or _backend(given) or ""):
        # Else jaxlib's profiler may look for a GPU, and end the process where there is none.
        os.environ["JAX_PLATFORMS"] = "cpu"


def _backend(flags: list[str]) -> str | None:
    """The platform that computes with ``flags``; None where this jaxlib does not know them, which ends a process."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    tried = subprocess.run(command, env={**os.environ, "XLA_FLAGS": " ".join(flags)}, capture_output=True, text=True)
    return tried.stdout.strip() if tried.returncode == 0 else None


def _keep_programs(dumped: Path, folder: Path) -> None:
    if folder.exists():  # of an earlier profile
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for file in dumped.glob("*after_optimizations.txt"):
        shutil.copy(file, folder)
