"""The attention kernel, and a training step with it, compile for TPUs that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ALL_SCORES = 64 * 4096**2 * 4
"""Bytes of all scores of a row of 4,096 tokens and 64 heads."""

KERNELS = {"bfloat16": 3, "float32": 3, "step": 4, "step that keeps attention": 3}
"""One forward, two backward, and one more forward where a layer keeps nothing."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "device", "programs"),
    [
        ("v5e:2x2", "TPU v5 lite", ["bfloat16", "step", "step that keeps attention"]),
        ("v6e:2x2", "TPU v6 lite", ["bfloat16", "float32"]),
    ],
)
def test_it_compiles_for_a_tpu_that_is_not_there(topology, device, programs):
    pytest.importorskip(
        "libtpu", reason="libtpu, of the extra 'test', compiles for TPUs; it is built for Linux on x86-64 alone"
    )
    command = [sys.executable, "-m", "tests.tpu_programs", topology, *programs]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["device"] == device
    assert {name: program["kernels"] for name, program in found["programs"].items()} == {
        name: KERNELS[name] for name in programs
    }
    assert all(program["temporary"] < ALL_SCORES / 4 for program in found["programs"].values())
