"""What ``scripts/gpu_bench.sh`` measures of the JAX engine, each in a process of its own (:mod:`medllm.bench.device`).

Weights are random and made on the device, already packed: no dense stack ever exists. Steps are the product's own
(:func:`jax_medllm.train.loop.make_step`, :class:`jax_medllm.generate.cached_decoder.Decoder`), fed with arrays in place of
files. Beside what a training step took stands what a plan says of the same step, by the compiler of the device that is here.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_medllm.generate.cached_decoder import CHUNK, Decoder
from jax_medllm.mesh.layout import Layout
from jax_medllm.model.attention import Backend, backend_for, using
from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.plan.probe import planned, probe
from jax_medllm.train.batches import PreferenceData, cpt_step, plan_steps
from jax_medllm.train.loop import cpt_loss_fn, preference_loss_fn
from jax_medllm.train.timed_steps import STEPS, call_seconds, copy_bytes, timed_training
from jax_medllm.weights.random import random_model
from medllm.bench.device_shapes import RESPONSES, DeviceShape
from medllm.bench.shapes import ModelShape
from medllm.config import PreferenceLoss, Sampling, TrainingConfig
from medllm.errors import UserError
from medllm.host.child import serve
from medllm.host.memory import peak_resident_bytes
from medllm.plan.request import held_word


def rates(*, side: int, copied: int, smoke: bool) -> dict[str, Any]:
    """What the device can do: operations a second of a bf16 product ``side``³, bytes a second of a copy, read and written."""
    device = _device(smoke)
    keys = jax.random.split(jax.random.key(0), 2)
    left, right = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys)
    return {
        "device": device.device_kind,
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "matrix_flops": 2 * side**3 / call_seconds(jax.jit(jnp.matmul), left, right),
        "copy_bytes": copy_bytes(copied),
    }


def cpt(*, shape: dict[str, Any], seconds: float, smoke: bool, attention: Backend | None = None) -> dict[str, Any]:
    """A continued-pretraining step; ``attention`` by a backend of one's choice."""
    device, work = _device(smoke), DeviceShape.from_json(shape)
    config = TrainingConfig(epochs=1, batch_size=work.rows, accumulation=1)
    rows = work.cpt_rows(1)
    batches = cpt_step(rows, plan_steps(len(rows.tokens), config)[0])
    loss_fn = partial(cpt_loss_fn, remat=work.remat)
    found = _trained(device, work, "cpt", loss_fn, batches, seconds, attention)
    return {**found, "units": rows.tokens.size}


def rpo(*, shape: dict[str, Any], seconds: float, smoke: bool, attention: Backend | None = None) -> dict[str, Any]:
    """A preference step over one problem with all its pairs; ``attention`` by a backend of one's choice."""
    device, work = _device(smoke), DeviceShape.from_json(shape)
    data = PreferenceData([work.group()], TrainingConfig(epochs=1, batch_size=1, accumulation=1))
    loss_fn = partial(preference_loss_fn, loss_config=PreferenceLoss(), remat=work.remat)
    found = _trained(device, work, "rpo", loss_fn, data.batches(data.steps[0]), seconds, attention)
    return {**found, "units": 1}


def calibrate(*, shape: dict[str, Any], seconds: float, smoke: bool, attention: Backend | None = None) -> dict[str, Any]:
    """The probe of ``medllm plan --calibrate`` with the layers and rows of a CPT step of this shape."""
    _device(smoke)
    with using(attention):
        found = probe(stage="cpt", settings=_settings(DeviceShape.from_json(shape), "cpt"), kind=None, seconds=seconds)
    return {name: found[name] for name in ("matrix_flops", "copy_bytes", "probes", "versions", "products")}


def decode(*, shape: dict[str, Any], seconds: float, smoke: bool) -> dict[str, Any]:
    """Tokens a second of greedy generation from NF4, every row with ``decode_tokens`` random keys and values behind it."""
    device, work = _device(smoke), DeviceShape.from_json(shape)
    decoder = Decoder(_model(work.model, adapter=False), ends=(work.model.vocabulary,))  # an end that is never drawn
    slots = _running(decoder, work.decode_rows, work.decode_tokens, room=(STEPS + 1) * CHUNK)
    held = sum(part.nbytes for part in jax.tree.leaves(slots.own))
    times: list[float] = []
    while len(times) <= STEPS and (len(times) < 2 or sum(times[1:]) < seconds):
        begun = time.perf_counter()
        slots, written = jax.block_until_ready(decoder.extend(slots, None, Sampling()))
        times.append(time.perf_counter() - begun)
    made = np.asarray(written)
    if not ((made >= 0) & (made < work.model.vocabulary)).all():
        raise RuntimeError("generation drew something that is no token")
    chunk = statistics.median(times[1:])
    return {
        "step_s": chunk / CHUNK,
        "steps_s": [seconds / CHUNK for seconds in times[1:]],
        "compile_s": max(0.0, times[0] - chunk),
        "peak_bytes": _peak(device),
        "units": work.decode_rows,
        "cache_bytes": held,
    }


def _model(shape: ModelShape, *, adapter: bool) -> DenseDecoder:
    rank = shape.rank if adapter else None
    return random_model(shape.architecture, quantization=shape.quantization, dtype=shape.dtype, rank=rank)


def _trained(
    device: jax.Device,
    work: DeviceShape,
    stage: str,
    loss_fn: Callable[..., Any],
    batches: Any,
    seconds: float,
    attention: Backend | None,
) -> dict[str, Any]:
    """Steps at each depth of the shape; what is not of each depth is of the deepest, peak memory and plan among it."""
    depths = []
    with using(attention):
        for layers in work.depths or (work.model.layers,):
            one = replace(work, model=replace(work.model, layers=layers), depths=())
            model = _model(one.model, adapter=True)
            backend = backend_for(jax.ShapeDtypeStruct((1, 1, 1, model.config.head_dim), model.dtype))
            found = timed_training(model, loss_fn, batches, seconds / max(1, len(work.depths)))
            depths.append({"layers": layers, "step_s": found["step_s"], "steps_s": found["steps_s"]})
            del model
        peak = _peak(device)  # before anything more is compiled: a compiler that tries kernels takes memory for them
        layout = Layout.of("fsdp=1", "", [device])
        plan = planned(stage, _settings(one, stage), layout)
    compiled = {"compile_s": found["compile_s"], "loss": found["loss"], "grad_norm": found["grad_norm"]}
    return {**compiled, "depths": depths, "peak_bytes": peak, "attention": backend, "remat": work.remat, "plan": plan}


def _settings(work: DeviceShape, stage: str) -> dict[str, Any]:
    """The shape as a plan's settings have it."""
    settings = {
        "model": work.model.architecture.to_hf(),
        "quantization": held_word(work.model.quantization, work.model.dtype),
        "rank": work.model.rank,
        "remat": work.remat,
        "accumulation": 1,
    }
    if stage == "cpt":
        return {**settings, "rows": work.rows, "length": work.length}
    return {**settings, "rows": 1, "prompt": work.prompt, "responses": RESPONSES, "response": work.response}


def _running(decoder: Decoder, rows: int, tokens: int, room: int) -> Any:
    """Slots in the middle of their texts: random keys and values in place of those of a prompt."""
    slots = decoder.empty(rows, tokens + room)

    @jax.jit
    def drawn(slots: Any) -> Any:
        leaves, tree = jax.tree.flatten((slots.own, slots.hidden))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        return jax.tree.unflatten(tree, [_by_layer(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])

    own, hidden = drawn(slots)
    return replace(slots, own=own, hidden=hidden, length=jnp.full(rows, tokens, jnp.int32), finished=jnp.zeros(rows, bool))


def _by_layer(key: jax.Array, like: jax.Array) -> jax.Array:
    keys = jax.random.split(key, like.shape[0])
    return jax.lax.map(lambda one: jax.random.normal(one, like.shape[1:], like.dtype), keys)


def _device(smoke: bool) -> jax.Device:
    device = jax.devices()[0]
    if not smoke and device.platform != "gpu":
        raise UserError(f"JAX sees no GPU here, only {device.platform}; install its CUDA plugin: pip install 'jax[cuda12]'")
    return device


def _peak(device: jax.Device) -> int:
    """Most bytes of device memory in use at a time; of this process where the device is the host."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use") or peak_resident_bytes()


if __name__ == "__main__":
    sys.exit(serve({"rates": rates, "cpt": cpt, "rpo": rpo, "decode": decode, "calibrate": calibrate}, sys.argv[1:]))
