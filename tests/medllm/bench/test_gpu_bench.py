"""``scripts/gpu_bench.sh``: what it counts, and what it does when something fails."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import time
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jax_medllm.model.decoder
from jax_medllm.generate.cached_decoder import CHUNK, Decoder
from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.model.linear import LoraParam
from jax_medllm.train.batches import PreferenceData, cpt_step
from jax_medllm.train.batches import plan_steps as steps_of
from jax_medllm.train.loop import cpt_loss_fn, preference_loss_fn
from jax_medllm.weights.adapters import variables
from jax_medllm.weights.random import random_model
from medllm.bench import arithmetic, device, device_goals, device_table
from medllm.bench.device_shapes import PAIRS, RESPONSES, SMOKE, DeviceShape, device_shape
from medllm.bench.shapes import ModelShape
from medllm.config import LoraConfig, PreferenceLoss, RematPolicy, TrainingConfig
from medllm.errors import UserError
from medllm.host.child import run_in_child, run_process

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
    shape = device_shape("72b", "rpo", 139 * GIB)
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

    monkeypatch.setattr(jax_medllm.model.decoder, "attend", attend)


def compiled_flops(loss_fn, batch) -> float:
    """Operations of a loss and its gradients in the program XLA makes of them, from its own analysis."""

    def build() -> DenseDecoder:
        return DenseDecoder(COUNTED.architecture, lora=LoraConfig(rank=COUNTED.rank), dtype=jnp.float32, rngs=nnx.Rngs(0))

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
    batch = data.batches(data.steps[0])[0]
    found = compiled_flops(partial(preference_loss_fn, loss_config=PreferenceLoss(), remat="layer"), batch)
    tokens = batch.responses.tokens.shape[1]
    step = arithmetic.grouped_step(96, 32, RESPONSES)
    assert step.tokens <= tokens + 1
    # The row is padded, and the head looks at all of it.
    counted = arithmetic.training_flops(ONE_LAYER, arithmetic.Step(tokens, tokens**2, tokens, reference=True), "layer")
    assert counted <= found <= 1.06 * counted


@pytest.mark.parametrize("size", ["72b", "7b"])
def test_bytes_of_a_decoding_step_are_those_of_the_arrays_it_reads(size):
    shape = device_shape(size, "decode", 139 * GIB)

    def build() -> DenseDecoder:
        return DenseDecoder(shape.model.architecture, quantization="nf4", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    arrays = variables(nnx.eval_shape(build))
    read = sum(
        math.prod(variable.shape) * variable.dtype.itemsize for path, variable in arrays.items() if path[0] != "embed_tokens"
    )
    assert arithmetic.decode_bytes(shape.model, 0, 0) == pytest.approx(read, rel=1e-7)


def test_bytes_of_a_cache_are_those_of_the_decoders():
    model = random_model(SMOKE.model.architecture, quantization="nf4", dtype="bfloat16", rank=None)
    held = jax.tree.leaves(Decoder(model, ends=(0,)).empty(SMOKE.decode_rows, SMOKE.decode_tokens).own)
    tokens = SMOKE.decode_tokens + CHUNK
    cache = arithmetic.decode_bytes(SMOKE.model, SMOKE.decode_rows, tokens) - arithmetic.decode_bytes(SMOKE.model, 0, 0)
    assert cache == sum(part.nbytes for part in held)


def test_operations_without_recomputation_are_those_of_two_thirds():
    """Forward, and backward alike for a frozen base; what is computed again is a forward pass less one product."""
    shape = device_shape("7b", "cpt", 139 * GIB)
    step = arithmetic.cpt_step(1, 4096)
    with_, without = (arithmetic.training_flops(shape.model, step, remat) for remat in ("layer", "none"))
    assert without == pytest.approx(4 * 6.5e9 * 4096 + 4 * 152064 * 3584 * 4095, rel=0.1)
    assert 0.2 < (with_ - without) / with_ < 1 / 3


def test_a_device_with_less_memory_generates_with_fewer_layers_and_says_so():
    assert device_shape("72b", "decode", 139 * GIB).model.layers == 80
    smaller = device_shape("72b", "decode", 47 * GIB)
    assert smaller.model.layers == 40
    assert "40 of 80 layers" in smaller.name
    assert device_shape("72b", "decode", 72.8 * GIB).model.layers == 80  # what JAX may take of an H100
    assert device_shape("7b", "decode", 47 * GIB).model == device_shape("7b", "decode", 139 * GIB).model


def test_the_7b_is_trained_on_dense_weights_and_the_72b_by_depth():
    assert device_shape("7b", "cpt", 139 * GIB).model.quantization == "none"
    deep = device_shape("72b", "cpt", 139 * GIB)
    assert (deep.model.quantization, deep.model.layers, deep.depths) == ("nf4", 80, (4, 12))
    assert DeviceShape.from_json(json.loads(json.dumps(deep.to_json()))) == deep


def trained(*steps: tuple[int, float], units: float, **more) -> dict:
    """What a training part finds: seconds of a step at each number of layers."""
    depths = [{"layers": layers, "step_s": seconds, "steps_s": [seconds] * 3} for layers, seconds in steps]
    return {"depths": depths, "compile_s": 30.0, "peak_bytes": 40 * GIB, "units": units, **more}


PLAN = {"layers": 28, "flops": 3e14, "bytes": 1e12, "gib": 40.4}
PROBES = [
    {"layers": layers, "flops": layers * 1e13 + 2e13, "bytes": layers * 3e10 + 1e11, "step_s": 0.02 * layers + 0.04}
    for layers in (2, 4)
]
FOUND = {
    "rates": {"device": "NVIDIA H100 80GB HBM3", "memory_bytes": 79 * GIB, "matrix_flops": 8e14, "copy_bytes": 3e12},
    ("7B", "cpt"): trained((28, 0.55), units=8192, plan=PLAN),
    ("72B NF4", "cpt"): trained((4, 0.28), (12, 0.68), units=4096, plan={**PLAN, "layers": 12}),
    ("7B NF4", "rpo"): trained((28, 0.5), units=1, plan=PLAN),
    ("72B NF4", "rpo"): trained((4, 0.28), (12, 0.68), units=1, plan={**PLAN, "layers": 12}),
    "calibrate": {"matrix_flops": 6e14, "copy_bytes": 3e12, "probes": PROBES, "versions": {}, "products": []},
    "decode": {"step_s": 0.02, "steps_s": [0.02], "compile_s": 9.0, "peak_bytes": 60 * GIB, "units": 32},
}


def answers(monkeypatch, failing=(), on="NVIDIA H100 80GB HBM3"):
    """Children that answer at once, but for those that fail. The reference takes twice as long, and as much memory."""

    def child(module, name, settings, **_):
        engine = module.split("_")[0]
        if (engine, name) in failing:
            raise RuntimeError("the child process ended early: OutOfMemoryError: tried to allocate 9 GiB\nmore")
        if name in ("cpt", "rpo"):
            found = dict(FOUND[settings["shape"]["name"], name])
            if engine == "torch":
                slow = [(one["layers"], 2 * one["step_s"]) for one in found["depths"]]
                ways = [
                    {"variant": "slow", "error": "OutOfMemoryError: no"},
                    {"variant": "quick", "step_s": 1.0, "peak_bytes": GIB},
                ]
                found = trained(*slow, units=found["units"] / (len(PAIRS) if name == "rpo" else 1), tried=ways, variant="quick")
            return found
        found = dict(FOUND[name])
        return {**found, "device": on} if name == "rates" else found

    monkeypatch.setattr(device, "run_in_child", child)
    monkeypatch.setattr(device, "preflight", lambda *_, **__: {"versions": {}})


def test_what_is_worth_most_comes_first(monkeypatch):
    answers(monkeypatch)
    result = device.bench_device(smoke=False, parts=["cpt", "calibrate", "rpo", "decode"])
    ran = list(dict.fromkeys((found["model"], found["part"]) for found in result.parts[2:]))
    assert ran == [
        ("7B", "cpt"),
        ("72B NF4", "cpt"),
        ("7B NF4", "rpo"),
        ("72B NF4", "decode"),
        ("7B", "calibrate"),
        ("7B NF4", "decode"),
        ("72B NF4", "rpo"),
    ]


def test_one_engine_runs_by_itself(monkeypatch):
    answers(monkeypatch)
    result = device.bench_device(smoke=False, parts=["cpt", "rpo", "decode"], engines=["jax"])
    assert {found["engine"] for found in result.parts} == {"jax"}
    over = next(one for one in result.targets if "best torch" in one.target)
    assert (over.found, over.met) == (None, None)


def test_a_part_that_fails_says_why_and_the_others_go_on(monkeypatch):
    answers(monkeypatch, failing={("torch", "rpo")})
    saved = []
    result = device.bench_device(smoke=False, sizes=["7b"], parts=["cpt", "rpo", "decode"], save=saved.append)
    failed = [found for found in result.parts if not found["ok"]]
    assert [(found["part"], found["engine"]) for found in failed] == [("rpo", "torch")]
    assert len(result.parts) == 7
    assert len(saved) == 8
    text = device_table.table(result)
    assert any("torch" in line and line.endswith("OutOfMemoryError: tried to allocate 9 GiB") for line in text)
    missing = [one for one in result.targets if one.found is None]
    assert [one.target for one in missing] == [
        "7B NF4 rpo: problems/s, JAX over the best torch",
        "7B NF4 rpo: peak memory, JAX over torch",
    ]
    assert all(one.met is None for one in missing)


def judged(result) -> dict[str, tuple[float | None, bool | None]]:
    return {one.target: (one.found, one.met) for one in result.targets}


def test_goals_are_judged_by_what_was_measured(monkeypatch):
    answers(monkeypatch)
    result = device.bench_device(smoke=False, parts=["cpt", "calibrate", "rpo", "decode"])
    found = judged(result)
    assert found["7B cpt: tokens/s"] == (pytest.approx(8192 / 0.55), True)
    # 0.05 s a layer and 0.08 s beside them.
    assert found["72B NF4 cpt: tokens/s by depth"] == (pytest.approx(4096 / (80 * 0.05 + 0.08)), False)
    assert found["7B NF4 rpo: problems/s, JAX over the best torch"] == (pytest.approx(6.0), True)
    assert found["7B cpt: peak memory, JAX over torch"] == (1.0, False)
    assert found["7B cpt: memory, plan against run, off by"] == (pytest.approx(0.01), True)
    read = arithmetic.decode_bytes(device_shape("72b", "decode", 79 * GIB).model, 32, 1024)
    assert found["72B NF4 decode: share of the copy bandwidth"] == (
        pytest.approx(read / 0.02 / 3e12),
        read / 0.02 / 3e12 >= 0.6,
    )
    # The plan's operations are those of the probe's layers: 28 of 0.02 s and 0.04 s beside them, against 0.55 s.
    assert found["7B cpt: time, plan after calibration against run, off by"] == (pytest.approx(0.60 / 0.55 - 1), True)
    text = "\n".join(device_table.table(result))
    assert "extrapolated from 4 and 12 to 80 layers" in text
    assert "tokens/s (extrapolated)" in text
    assert "7B cpt torch, slow: OutOfMemoryError: no" in text
    assert "7B cpt torch, quick: 1 s a step, peak 1.0 GiB (in the table)" in text


def test_a_goal_of_another_device_is_not_judged(monkeypatch):
    answers(monkeypatch, on="NVIDIA H200")
    result = device.bench_device(smoke=False, sizes=["7b"], parts=["cpt"])
    assert judged(result)["7B cpt: tokens/s"] == (pytest.approx(8192 / 0.55), None)
    assert any("a goal of an H100: not judged" in line and "14,895" in line for line in device_table.table(result))
    assert judged(result)["7B cpt: peak memory, JAX over torch"][1] is False


def test_a_step_that_was_run_whole_is_not_extrapolated():
    assert device_goals.at_depth([{"layers": 28, "step_s": 2.0, "steps_s": [2.0]}], 28)["extrapolated"] is False
    with pytest.raises(RuntimeError, match="nothing to extrapolate from"):
        device_goals.at_depth([{"layers": n, "step_s": 1.0, "steps_s": [1.0]} for n in (4, 12)], 80)


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
    assert all(found["ok"] for found in result.parts)
    with pytest.raises(UserError, match="time for everything is up"):
        device.bench_device(smoke=False, sizes=["7b"], parts=["cpt"], limit=1.0)


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    def child(*_, **__):
        raise UserError("no GPU here")

    monkeypatch.setattr(device, "run_in_child", child)
    assert device.main([]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said == ["gpu_bench: pre-flight: torch: no GPU here; --engines jax measures without it"]


def test_a_folder_that_is_not_there_is_refused_before_anything_is_measured(tmp_path, capsys):
    assert device.main(["--out", str(tmp_path / "absent" / "gpu.json")]) == 2
    assert "absent" in capsys.readouterr().err


def test_a_child_that_sees_no_gpu_refuses_to_measure_the_host():
    given = {"side": 8, "copied": 64, "smoke": False}
    with pytest.raises(UserError, match="JAX sees no GPU"):
        run_in_child("jax_medllm.bench.device", "rates", given, environment={**os.environ, "JAX_PLATFORMS": "cpu"})


def test_the_last_line_of_a_failed_child_is_its_error():
    with pytest.raises(RuntimeError, match="ended early: TypeError: "):
        run_in_child(
            "jax_medllm.bench.device",
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
