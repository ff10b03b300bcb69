"""``scripts/gpu_bench.sh`` on tiny shapes: the script itself once, and every part of it."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

from jax_medllm.plan import probe
from jax_medllm.train.timed_steps import copy_bytes
from medllm.bench import device
from medllm.bench.device_shapes import SMOKE
from medllm.host.child import run_in_child

SCRIPT = Path(__file__).parents[3] / "scripts" / "gpu_bench.sh"


def in_this_process(module, name, settings, **more):
    """In place of most children: the same module run as a program, given the same words and answering in the same line.

    No time is left for steps, so that each engine times one, and the reference in the first way that it can be set.
    """
    if name == "rates":
        return run_in_child(module, name, settings, **more)
    settings = settings if name == "check" else {**settings, "seconds": 0.0}
    words, printed = [module, name, json.dumps(settings)], io.StringIO()
    with mock.patch.object(sys, "argv", words), redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0, name
    return json.loads(printed.getvalue().splitlines()[-1])


def test_the_script_is_the_bench_with_its_words(tmp_path):
    environment = {**os.environ, "MEDLLM_PYTHON": sys.executable, "PYTHONPATH": ""}
    command = ["bash", str(SCRIPT), "--smoke", "--out", "absent/gpu.json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.partition(":")[0]) == (2, "gpu_bench"), done.stderr
    assert "--out absent/gpu.json: its folder does not exist" in done.stderr


@pytest.mark.slow
def test_everything_runs_once_on_tiny_shapes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(device, "run_in_child", in_this_process)
    monkeypatch.setattr(probe, "copy_bytes", lambda size: copy_bytes(2**20))
    assert device.main(["--smoke", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["preflight"]) == {"versions", "jax", "torch"}
    assert set(result["preflight"]["jax"]["errors"]) == {"attention by xla", "NF4 product"}
    parts = {(found["part"], found["engine"]): found for found in result["parts"]}
    assert set(parts) == {
        *itertools.product(("rates", "cpt", "rpo"), ("jax", "torch")),
        ("decode", "jax"),
        ("calibrate", "jax"),
        ("parity", None),
    }
    assert all(found["ok"] for found in parts.values())
    assert re.match(r"\d+/\d+ tests collected", parts["parity", None]["tests"])
    uniform = math.log(SMOKE.model.vocabulary)
    for engine in ("jax", "torch"):
        # Random weights know nothing: a token costs ln V, and RPO's two terms are ln 2 and alpha times that.
        assert parts["cpt", engine]["loss"] == pytest.approx(uniform, rel=0.03)
        assert parts["rpo", engine]["loss"] == pytest.approx(math.log(2) + 10 * uniform, rel=0.03)
        assert [one["layers"] for one in parts["cpt", engine]["depths"]] == list(SMOKE.depths)
        assert parts["cpt", engine]["extrapolated"]
    assert any("step_s" in way for way in parts["rpo", "torch"]["tried"])
    assert parts["cpt", "jax"]["plan"]["flops"] > 0
    for found in parts.values():
        assert "share" not in found or 0 < found["share"] < 2
    assert result["targets"] == []
    table = capsys.readouterr().out.strip().rpartition("\n\n")[2].splitlines()
    assert sum(line.startswith("smoke ") and " tokens/s " in line for line in table) == 3
    assert table[-1].startswith("gpu_bench:")
    children = re.findall(r"^\$ .* -m (\S+) rates", Path(f"{out}.log").read_text("utf-8"), re.MULTILINE)
    assert children == ["jax_medllm.bench.device", "torch_ref.device_bench"]
