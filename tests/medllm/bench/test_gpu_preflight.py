"""The pre-flight of ``scripts/gpu_bench.sh``: each of its checks fails on what it is there to find, in one line."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path

import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

from jax_medllm.bench import preflight as jax_preflight
from jax_medllm.model import attention
from medllm.bench import preflight
from medllm.bench.device_shapes import SMOKE
from medllm.errors import UserError
from medllm.model.files import WEIGHTS
from torch_ref.preflight import leave_nf4

LOSS = math.log(SMOKE.model.vocabulary)


def children(**changes):
    """A runner of checks that answers, or fails, at once."""

    def child(module, settings, seconds):
        engine = module.split("_")[0]
        found = changes.get(engine, {"loss": LOSS})
        if isinstance(found, Exception):
            raise found
        return {**found, "seconds": seconds, "settings": settings}

    return child


def test_the_reference_leaves_a_weight_that_the_other_is_held_against():
    found = preflight.preflight(("jax", "torch"), 90.0, children(), attention="xla")
    assert list(found) == ["versions", "torch", "jax"]
    assert found["jax"]["settings"]["nf4"] == found["torch"]["settings"]["nf4"] is not None
    assert found["jax"]["settings"]["attention"] == "xla"
    assert "bitsandbytes" in found["versions"]
    assert found["torch"]["seconds"] <= 90.0


def test_with_one_engine_nothing_of_the_other_is_asked_for():
    found = preflight.preflight(("jax",), 90.0, children(torch=RuntimeError("was run")))
    assert "bitsandbytes" not in found["versions"]
    assert found["jax"]["settings"]["nf4"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"torch": RuntimeError("the child process ended early: ModuleNotFoundError: No module named 'trl'\nmore")},
            "pre-flight: torch: the child process ended early: ModuleNotFoundError: No module named 'trl'; "
            "--engines jax measures without it",
        ),
        (
            {"jax": UserError("attention by cudnn is off")},
            "pre-flight: jax: attention by cudnn is off",
        ),
        ({"jax": {"loss": 9.0}}, "pre-flight: jax: a tiny step has the loss 9; 6.238 (ln 512) is expected"),
        ({"jax": {"loss": math.nan}}, "pre-flight: jax: a tiny step has the loss nan; 6.238 (ln 512) is expected"),
        ({"jax": RuntimeError("not done after 40 s")}, "pre-flight: jax: not done after 40 s"),
    ],
)
def test_what_fails_stops_everything_with_its_reason_in_one_line(changes, said):
    with pytest.raises(UserError) as stopped:
        preflight.preflight(("jax", "torch"), 90.0, children(**changes))
    assert str(stopped.value) == said


def test_a_missing_package_is_named_before_anything_is_run(monkeypatch):
    found = importlib.metadata.version

    def version(name):
        if name == "trl":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r"torch needs the package 'trl', which is not installed; --engines jax measures"):
        preflight.preflight(("jax", "torch"), 90.0, children(torch=RuntimeError("was run")))


def test_parity_takes_both_engines():
    with pytest.raises(UserError, match="the part parity compares both engines"):
        preflight.preflight(("jax",), 90.0, children(), parity=True)


def test_attention_is_held_against_float64(monkeypatch):
    assert 0 < jax_preflight.check_attention("xla") < jax_preflight.TOLERANCE
    attend = attention.attend
    monkeypatch.setattr(jax_preflight, "attend", lambda q, k, v, visible: attend(q, k, v * 1.05, visible))
    with pytest.raises(UserError, match=r"attention by xla: its output is off float64 by 0\.0"):
        jax_preflight.check_attention("xla")


def test_attention_that_forgets_the_prompt_of_a_group_is_found(monkeypatch):
    attend = attention.attend

    def forgetful(q, k, v, visible):
        return attend(q, k, v, attention.Visibility(visible.segments))

    monkeypatch.setattr(jax_preflight, "attend", forgetful)
    with pytest.raises(UserError, match="is off float64"):
        jax_preflight.check_attention("xla")


def test_a_backend_that_cannot_run_here_says_so():
    with pytest.raises(UserError, match="attention by cudnn does not run: "):
        jax_preflight.check_attention("cudnn")


@pytest.fixture
def left(tmp_path) -> str:
    """What bitsandbytes leaves on this machine."""
    leave_nf4(str(tmp_path / "nf4"))
    return str(tmp_path / "nf4")


def test_nf4_is_held_against_bitsandbytes_own_bytes(left):
    assert 0 < jax_preflight.check_nf4(left) < jax_preflight.TOLERANCE


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("packed", "1 of 32768 bytes are not bitsandbytes' (cpu)"),
        ("dequantized", "1 of 65536 dequantized weights are not bitsandbytes' (cpu)"),
        ("product", "the product of bitsandbytes is off float64"),
    ],
)
def test_one_byte_or_one_product_that_is_another_is_found(left, name, said):
    file = Path(left) / WEIGHTS
    stored = load_file(file)
    changed = stored[name].copy()
    changed.flat[5] = changed.flat[5] ^ 0x10 if name == "packed" else changed.flat[5] + 10
    save_file({**stored, name: changed}, file)
    with pytest.raises(UserError) as stopped:
        jax_preflight.check_nf4(left)
    assert said in str(stopped.value)


def test_a_product_of_ours_that_is_off_is_found(left, monkeypatch):
    monkeypatch.setattr(jax_preflight, "nf4_matmul", lambda x, weight: jnp.zeros((x.shape[0], weight.packed.shape[0])))
    with pytest.raises(UserError, match="the product of JAX is off float64 by 1;"):
        jax_preflight.check_nf4(left)
