"""A CPU cut into devices, for child processes: how many a process has is settled when JAX starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

NOT_OPTIMIZED = " ".join(
    (
        "--xla_backend_optimization_level=0",  # without LLVM's passes
        "--xla_cpu_use_fusion_emitters=false",  # nor MLIR's some hundred for each fusion
        "--xla_cpu_parallel_codegen_split_count=1",  # each core has another test's work
    )
)
"""Of ``XLA_FLAGS``: without what is most of the time to compile for a processor."""

OPTIMIZED = {"xla_backend_optimization_level": 3}
"""Compiler options, over those: as for a user, where it is tested that a compiler does not round otherwise."""

_CHECKED = "import conftest, runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
"""As ``python -m``, with annotations checked as they are in the tests' own process."""


def environment(devices: int) -> dict[str, str]:
    """The variables of a process with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {NOT_OPTIMIZED}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def found_on_eight(module: str, *arguments: str) -> Any:
    """What ``python -m module arguments`` prints in its last line, as JSON, where it has eight devices."""
    command = [sys.executable, "-c", _CHECKED, module, *arguments]
    done = subprocess.run(command, env=environment(8), capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Involuntary full rematerialization" not in done.stderr, "XLA gathers a whole array to lay it out anew"
    return json.loads(done.stdout.splitlines()[-1])
