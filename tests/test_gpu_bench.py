"""``scripts/gpu_bench.sh``: what it counts, what it does when something fails, and all of it once on tiny shapes."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jax_medllm.model
from jax_medllm.adapters import variables
from jax_medllm.batches import PreferenceData, cpt_step
from jax_medllm.batches import plan_steps as steps_of
from jax_medllm.decoder import CHUNK, Decoder
from jax_medllm.device_bench import random_model
from jax_medllm.linear import LoraParam
from jax_medllm.model import Qwen2, Qwen2Config
from jax_medllm.train import cpt_loss_fn, preference_loss_fn
from medllm.bench import arithmetic, device
from medllm.bench.device_shapes import PAIRS, RESPONSES, SMOKE, DeviceShape, device_shape
from medllm.bench.shapes import ModelShape
from medllm.child import run_in_child, run_process
from medllm.config import LoraConfig, PreferenceLoss, RematPolicy, TrainingConfig
from medllm.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_bench.sh"
GIB = 2**30


def seen(row: list[int]) -> int:
    """Pairs of a row given as segments, where 2, 3, … also see 1: by looking at every pair."""
    return sum(
        key <= query and (row[key] == row[query] or row[key] == 1)
        for query, key in itertools.product(range(len(row)), repeat=2)
    )


def test_pairs_that_see_each_other_are_counted_as_a_look_at_every_pair_counts_them():
    assert arithmetic.cpt_step(3, 11).visible == 3 * seen([1] * 11)
    assert arithmetic.grouped_step(7, 4, 3).visible == seen([1] * 7 + [2] * 4 + [3] * 4 + [4] * 4)
    assert arithmetic.paired_step(7, 4, 5).visible == 10 * seen([1] * 11)


def test_a_group_has_half_the_tokens_of_its_pairs_or_less():
    shape = device_shape("72b", 139 * GIB)
    group = arithmetic.grouped_step(shape.prompt, shape.response, RESPONSES)
    pairs = arithmetic.paired_step(shape.prompt, shape.response, len(PAIRS))
    assert (group.tokens, pairs.tokens) == (3072, 12288)


# Wide enough that sums and roots are a few per cent of the products. A program counts the body of a loop once: two layers are
# one, which is why they are not one (a loop of one pass is no loop, and what it computes twice is computed once).
COUNTED = ModelShape(layers=2, width=256, mlp=704, heads=4, kv_heads=2, vocabulary=1024, rank=8)
ONE_LAYER = ModelShape(layers=1, width=256, mlp=704, heads=4, kv_heads=2, vocabulary=1024, rank=8)


@pytest.fixture
def whole_attention(monkeypatch):
    """Attention over all pairs at once: in chunks it is a loop, of which the compiler's analysis would count one pass."""

    def attend(q, k, v, visible):
        wide = [jnp.repeat(part, q.shape[2] // part.shape[2], axis=2) for part in (k, v)]
        return jnp.einsum("bhqt,bthx->bqhx", jax.nn.softmax(jnp.einsum("bqhx,bthx->bhqt", q, wide[0])), wide[1])

    monkeypatch.setattr(jax_medllm.model, "attend", attend)


def compiled_flops(loss_fn, batch) -> float:
    """Operations of a loss and its gradients in the program XLA makes of them, from its own analysis."""

    def build() -> Qwen2:
        config = Qwen2Config.from_hf(COUNTED.config())
        return Qwen2(config, lora=LoraConfig(rank=COUNTED.rank), dtype=jnp.float32, rngs=nnx.Rngs(0))

    graph, trainable, *others = nnx.split(nnx.eval_shape(build), LoraParam, ...)

    def gradients(trainable, frozen, batch):
        return jax.value_and_grad(lambda part: loss_fn(nnx.merge(graph, part, frozen), batch)[0])(trainable)

    cost = jax.jit(gradients).lower(trainable, others[0], batch).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@pytest.mark.parametrize("remat", get_args(RematPolicy))
def test_operations_of_a_cpt_step_are_those_xla_counts(whole_attention, remat):
    work = DeviceShape("counted", COUNTED, 1, 192, 0, 0, 1, 1)
    rows, config = work.cpt_rows(1), TrainingConfig(epochs=1, batch_size=1, accumulation=1)
    batch = cpt_step(rows, steps_of(1, config)[0])[0]
    found = compiled_flops(partial(cpt_loss_fn, remat=remat), batch)
    counted = arithmetic.training_flops(ONE_LAYER, arithmetic.Step(192, 192**2, 191), remat)
    assert counted <= found <= 1.06 * counted


def test_operations_of_a_preference_step_are_those_xla_counts(whole_attention):
    work = DeviceShape("counted", COUNTED, 1, 1, 96, 32, 1, 1)
    data = PreferenceData([work.group()], TrainingConfig(epochs=1, batch_size=1, accumulation=1))
    batch = data.step(data.plan()[0])[0]
    found = compiled_flops(partial(preference_loss_fn, loss_config=PreferenceLoss(), remat="layer"), batch)
    tokens = batch.responses.tokens.shape[1]
    step = arithmetic.grouped_step(96, 32, RESPONSES)
    assert step.tokens <= tokens + 1
    # The row is padded, and the head looks at all of it.
    counted = arithmetic.training_flops(ONE_LAYER, arithmetic.Step(tokens, tokens**2, tokens, reference=True))
    assert counted <= found <= 1.06 * counted


@pytest.mark.parametrize("size", ["72b", "7b"])
def test_bytes_of_a_decoding_step_are_those_of_the_arrays_it_reads(size):
    shape = device_shape(size, 139 * GIB)

    def build() -> Qwen2:
        config = Qwen2Config.from_hf(shape.model.config())
        return Qwen2(config, quantization="nf4", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    arrays = variables(nnx.eval_shape(build))
    read = sum(
        math.prod(variable.shape) * variable.dtype.itemsize for path, variable in arrays.items() if path[0] != "embed_tokens"
    )
    assert arithmetic.decode_bytes(shape.model, 0, 0) == pytest.approx(read, rel=1e-7)


def test_bytes_of_a_cache_are_those_of_the_decoders():
    model = random_model(SMOKE.model, adapter=False)
    held = jax.tree.leaves(Decoder(model, end=0).empty(SMOKE.decode_rows, SMOKE.decode_tokens).own)
    tokens = SMOKE.decode_tokens + CHUNK
    cache = arithmetic.decode_bytes(SMOKE.model, SMOKE.decode_rows, tokens) - arithmetic.decode_bytes(SMOKE.model, 0, 0)
    assert cache == sum(part.nbytes for part in held)


def test_a_device_with_less_memory_gets_a_72b_with_fewer_layers_and_says_so():
    assert device_shape("72b", 139 * GIB).model.layers == 80
    smaller = device_shape("72b", 47 * GIB)
    assert smaller.model.layers == 40
    assert "40 of 80 layers" in smaller.name
    assert device_shape("72b", 72.8 * GIB).model.layers == 80  # what JAX may take of an H100
    assert device_shape("7b", 47 * GIB).model == device_shape("7b", 139 * GIB).model


FOUND = {
    "rates": {"device": "a GPU", "memory_bytes": 139 * GIB, "matrix_flops": 8e14, "copy_bytes": 4e12},
    "cpt": {"step_s": 4.0, "steps_s": [4.0, 4.1, 3.9], "compile_s": 30.0, "peak_bytes": 60 * GIB, "units": 4096},
    "rpo": {"step_s": 4.0, "steps_s": [4.0], "compile_s": 30.0, "peak_bytes": 60 * GIB, "units": 1},
    "decode": {"step_s": 0.02, "steps_s": [0.02], "compile_s": 9.0, "peak_bytes": 60 * GIB, "units": 32},
}


def answers(monkeypatch, failing=()):
    """Children that answer at once, but for those that fail."""

    def child(module, name, settings, **_):
        engine = module.split("_")[0]
        if (engine, name) in failing:
            raise RuntimeError("the child process ended early: OutOfMemoryError: tried to allocate 9 GiB\nmore")
        found = dict(FOUND[name])
        return {**found, "units": found["units"] / len(PAIRS)} if (engine, name) == ("torch", "rpo") else found

    monkeypatch.setattr(device, "run_in_child", child)


def test_a_part_that_fails_says_why_and_the_others_go_on(monkeypatch):
    answers(monkeypatch, failing={("torch", "rpo")})
    saved = []
    result = device.bench_device(smoke=False, sizes=["72b"], parts=["cpt", "rpo", "decode"], save=saved.append)
    failed = [found for found in result["parts"] if not found["ok"]]
    assert [(found["part"], found["engine"]) for found in failed] == [("rpo", "torch")]
    assert len(result["parts"]) == 7
    assert len(saved) == 8
    text = device.table(result)
    assert any("torch" in line and line.endswith("OutOfMemoryError: tried to allocate 9 GiB") for line in text)
    missing = [one for one in result["targets"] if one["found"] is None]
    assert [one["target"] for one in missing] == [
        "72B rpo: rate, JAX over torch",
        "72B rpo: peak memory, JAX over torch",
    ]
    assert all(one["met"] is None for one in missing)


def test_targets_are_judged_by_what_was_measured(monkeypatch):
    answers(monkeypatch)
    result = device.bench_device(smoke=False, sizes=["72b"], parts=["cpt", "rpo", "decode"])
    met = {one["target"]: (one["found"], one["met"]) for one in result["targets"]}
    shape = device_shape("72b", 139 * GIB)
    work = arithmetic.training_flops(shape.model, arithmetic.cpt_step(1, 4096))
    assert met["72B cpt: share of the matrix rate"] == (pytest.approx(work / 4.0 / 8e14), work / 4.0 / 8e14 >= 0.6)
    assert met["72B cpt: rate, JAX over torch"] == (1.0, False)
    assert met["72B cpt: peak memory, JAX over torch"] == (1.0, True)
    assert met["72B rpo: rate, JAX over torch"] == (pytest.approx(3.0), False)
    read = arithmetic.decode_bytes(shape.model, 32, 1024)
    assert met["72B decode: share of the copy bandwidth"] == (pytest.approx(read / 0.02 / 4e12), True)
    # 72B parameters forward, again, and backward: about three forward passes of 2 operations a parameter and token.
    assert work == pytest.approx(3 * 2 * 70e9 * 4096, rel=0.1)


def test_ended_from_outside_it_still_prints_what_it_has(monkeypatch, capsys, tmp_path):
    answers(monkeypatch)
    answered = device.run_in_child

    def child(module, name, settings, **given):
        if name == "rpo":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return answered(module, name, settings, **given)

    monkeypatch.setattr(device, "run_in_child", child)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert device.main(["--sizes", "7b", "--parts", "cpt", "rpo", "--out", str(tmp_path / "gpu.json")]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("stopped early")
    assert sum(line.startswith("7B     cpt") for line in lines) == 2
    assert json.loads((tmp_path / "gpu.json").read_text())["stopped"]


def test_what_no_time_is_left_for_is_not_begun(monkeypatch):
    answers(monkeypatch)
    result = device.bench_device(smoke=False, sizes=["7b"], parts=["cpt"], limit=device._LEAST + 0.5)
    assert all(found["ok"] for found in result["parts"])
    with pytest.raises(UserError, match="time for everything is up"):
        device.bench_device(smoke=False, sizes=["7b"], parts=["cpt"], limit=1.0)


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    def child(*_, **__):
        raise UserError("no GPU here")

    monkeypatch.setattr(device, "run_in_child", child)
    assert device.main([]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "--smoke" in said[0]


def test_a_folder_that_is_not_there_is_refused_before_anything_is_measured(tmp_path, capsys):
    assert device.main(["--out", str(tmp_path / "absent" / "gpu.json")]) == 2
    assert "absent" in capsys.readouterr().err


def test_a_child_that_sees_no_gpu_refuses_to_measure_the_host():
    given = {"side": 8, "copied": 64, "smoke": False}
    with pytest.raises(UserError, match="JAX sees no GPU"):
        run_in_child("jax_medllm.device_bench", "rates", given, environment={**os.environ, "JAX_PLATFORMS": "cpu"})


def test_the_last_line_of_a_failed_child_is_its_error():
    with pytest.raises(RuntimeError, match="ended early: TypeError: "):
        run_in_child(
            "jax_medllm.device_bench",
            "cpt",
            {"shape": SMOKE.to_json() | {"name": ["72B"], "rows": "one"}, "seconds": 1, "smoke": True},
        )


def test_a_child_past_its_time_is_ended_with_its_own_children(tmp_path):
    mark = tmp_path / "mark"
    script = f"(sleep 2; touch {mark}) & sleep 60"
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="not done after 1 s"):
        run_process(["bash", "-c", script], timeout=1, environment=os.environ)
    assert time.monotonic() - begun < 2
    time.sleep(1.5)
    assert not mark.exists()


@pytest.mark.slow
def test_everything_runs_once_on_tiny_shapes(tmp_path):
    out = tmp_path / "gpu.json"
    environment = {**os.environ, "MEDLLM_PYTHON": sys.executable, "PYTHONPATH": ""}
    command = ["bash", str(SCRIPT), "--smoke", "--out", str(out)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    parts = {(found["part"], found["engine"]): found for found in result["parts"]}
    assert set(parts) == {
        *itertools.product(("rates", "cpt", "rpo"), ("jax", "torch")),
        ("decode", "jax"),
        ("parity", None),
    }
    assert all(found["ok"] for found in parts.values())
    assert "skipped" in parts["parity", None]["tests"]
    uniform = math.log(SMOKE.model.vocabulary)
    for engine in ("jax", "torch"):
        # Random weights know nothing: a token costs ln V, and RPO's two terms are ln 2 and alpha times that.
        assert parts["cpt", engine]["loss"] == pytest.approx(uniform, rel=0.03)
        assert parts["rpo", engine]["loss"] == pytest.approx(math.log(2) + 10 * uniform, rel=0.03)
        assert 1 <= len(parts["cpt", engine]["steps_s"]) <= 3
    assert parts["rpo", "torch"]["flops"] * len(PAIRS) > 2 * parts["rpo", "jax"]["flops"]
    for found in parts.values():
        assert "share" not in found or 0 < found["share"] < 2
    assert result["targets"] == []
    lines = done.stdout.strip().splitlines()
    assert lines[-1].startswith("gpu_bench:")
    assert sum(line.startswith("smoke ") and " tokens/s " in line for line in lines) == 3
    assert Path(f"{out}.log").stat().st_size > 0
