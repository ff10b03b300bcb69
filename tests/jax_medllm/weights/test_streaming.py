"""Opening a checkpoint: read a piece at a time, quantized on the way, and measured by ``medllm bench load``."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from jax_medllm.weights import read as weights
from jax_medllm.weights.adapters import variables
from jax_medllm.weights.read import read_model
from medllm.bench import load
from medllm.bench.load import ALLOWANCE, bench_load, checkpoint_model
from medllm.cli import main
from medllm.mini.study import BASE
from medllm.model.directory import ModelDirectory
from medllm.model.random import random_tensors


class Watched(ModelDirectory):
    """Notes how many numbers are read at once, and refuses whole tensors."""

    largest = 0

    def read(self, name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read as a whole")

    def read_slice(self, name: str, index: slice) -> np.ndarray:
        part = super().read_slice(name, index)
        self.largest = max(self.largest, part.size)
        return part


def test_a_model_read_and_quantized_in_pieces_is_the_model_read_whole(monkeypatch):
    whole = variables(read_model(ModelDirectory(BASE), quantization="nf4"))
    directory = Watched(BASE)
    monkeypatch.setattr(weights, "_PIECE", 5000)
    pieces = variables(read_model(directory, quantization="nf4"))
    assert directory.largest <= 5000
    assert pieces.keys() == whole.keys()
    for path, variable in whole.items():
        np.testing.assert_array_equal(pieces[path][...], variable[...], err_msg=str(path))


@pytest.mark.parametrize("gigabytes", [0.05, 1.0, 6.0, 30.0])
def test_a_generated_checkpoint_has_about_the_size_asked_for(gigabytes):
    shapes = random_tensors(checkpoint_model(gigabytes * 1e9), lambda *shape: np.broadcast_to(np.float16(0), shape))
    size = sum(2 * math.prod(value.shape) for _, value in shapes)
    assert size == pytest.approx(gigabytes * 1e9, rel=0.06)


def test_bench_load_opens_a_checkpoint_in_a_process_of_its_own(tmp_path, capsys):
    assert main(["bench", "load", "--gigabytes", "0.05", "--json", str(tmp_path / "result.json")]) == 0
    assert "GB/s" in capsys.readouterr().out.splitlines()[-1]
    found = json.loads((tmp_path / "result.json").read_text())
    model = checkpoint_model(0.05e9)
    dense = 2 * 2 * model.vocab_size * model.hidden_size
    packed = (found["gigabytes"] * 1e9 - dense) / 2 * 4.127 / 8
    assert found["result_gib"] * 2**30 == pytest.approx(dense + packed, rel=0.02)
    assert 0 < found["baseline_rss_gib"] < found["peak_rss_gib"] < 1.5
    assert found["gigabytes_per_second"] == pytest.approx(found["gigabytes"] / found["seconds"])
    assert found["within"] is True


def test_a_process_beyond_the_allowance_is_said_to_be(monkeypatch):
    measured = {"seconds": 1.0, "result_bytes": 10**9, "baseline_rss_bytes": 0}
    for extra, within in ((ALLOWANCE, True), (ALLOWANCE + 1, False)):
        peak = measured | {"peak_rss_bytes": 10**9 + extra}
        monkeypatch.setattr(load, "measure", lambda *_, peak=peak, **__: peak)
        assert bench_load(0.02, "jax", "nf4")["within"] is within


def test_a_size_that_is_not_positive_is_refused(capsys):
    assert main(["bench", "load", "--gigabytes", "0"]) == 2
    assert "--gigabytes" in capsys.readouterr().err
