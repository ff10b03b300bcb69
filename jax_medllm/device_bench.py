"""What ``scripts/gpu_bench.sh`` measures of the JAX engine, each in a process of its own (:mod:`medllm.bench.device`).

Weights are random and made on the device, already packed: no dense stack ever exists. Steps are the product's own
(:func:`jax_medllm.train.make_step`, :class:`jax_medllm.decoder.Decoder`), fed with arrays in place of files.
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
from flax import nnx

from jax_medllm.adapters import Path, assign, variables
from jax_medllm.attention import Backend, backend_for, using
from jax_medllm.batches import PreferenceData, cpt_step, plan_steps
from jax_medllm.decoder import CHUNK, Decoder
from jax_medllm.linear import LoraParam, LoraScaling
from jax_medllm.model import Qwen2, Qwen2Config
from jax_medllm.nf4 import CODES
from jax_medllm.optimizer import learning_rate, make_optimizer
from jax_medllm.train import cpt_loss_fn, make_step, preference_loss_fn
from medllm.bench.device_shapes import DeviceShape
from medllm.bench.shapes import ModelShape
from medllm.child import serve
from medllm.config import LoraConfig, OptimizerConfig, PreferenceLoss, Sampling, TrainingConfig
from medllm.errors import UserError
from medllm.process_memory import peak_resident_bytes

STEPS = 3
"""Steps that are timed, after one that is not; fewer where the time for them is up, at least one."""
_SPREAD = 0.02
"""Standard deviation of the random weights."""
_SCHEDULE = 1000


def rates(*, side: int, copied: int, smoke: bool) -> dict[str, Any]:
    """What the device can do: operations a second of a bf16 product ``side``³, bytes a second of a copy, read and written."""
    device = _device(smoke)
    keys = jax.random.split(jax.random.key(0), 3)
    left, right = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys[:2])
    words = jax.random.bits(keys[2], (copied // 4,), jnp.uint32)
    product = _seconds(jax.jit(jnp.matmul), left, right)
    copy = _seconds(jax.jit(lambda array: array ^ 1), words)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "device": device.device_kind,
        "memory_bytes": limit,
        "matrix_flops": 2 * side**3 / product,
        "copy_bytes": 2 * words.nbytes / copy,
    }


def cpt(*, shape: dict[str, Any], seconds: float, smoke: bool, attention: Backend | None = None) -> dict[str, Any]:
    """A continued-pretraining step; ``attention`` by a backend of one's choice."""
    device, work = _device(smoke), DeviceShape.from_json(shape)
    config = TrainingConfig(epochs=1, batch_size=work.rows, accumulation=1)
    rows = work.cpt_rows(1)
    batches = cpt_step(rows, plan_steps(len(rows.tokens), config)[0])
    loss_fn = partial(cpt_loss_fn, remat="layer")
    with using(attention):
        found = _trained(random_model(work.model, adapter=True), loss_fn, batches, seconds)
    return {**found, "peak_bytes": _peak(device), "units": rows.tokens.size}


def rpo(*, shape: dict[str, Any], seconds: float, smoke: bool, attention: Backend | None = None) -> dict[str, Any]:
    """A preference step over one problem with all its pairs; ``attention`` by a backend of one's choice."""
    device, work = _device(smoke), DeviceShape.from_json(shape)
    config = TrainingConfig(epochs=1, batch_size=1, accumulation=1)
    data = PreferenceData([work.group()], config)
    loss_fn = partial(preference_loss_fn, loss_config=PreferenceLoss(), remat="layer")
    with using(attention):
        found = _trained(random_model(work.model, adapter=True), loss_fn, data.step(data.plan()[0]), seconds)
    return {**found, "peak_bytes": _peak(device), "units": 1}


def decode(*, shape: dict[str, Any], seconds: float, smoke: bool) -> dict[str, Any]:
    """Tokens a second of greedy generation from NF4, every row with ``decode_tokens`` random keys and values behind it."""
    device, work = _device(smoke), DeviceShape.from_json(shape)
    decoder = Decoder(random_model(work.model, adapter=False), end=work.model.vocabulary)  # an end that is never drawn
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


def random_model(shape: ModelShape, *, adapter: bool) -> Qwen2:
    """A model of this shape with random weights, filled in one compiled program that never holds a dense stack.

    Codes are uniform, so a weight's spread is that of the sixteen codes times its scale; scales vary by a quarter.
    """
    lora = LoraConfig(rank=shape.rank, alpha=2 * shape.rank) if adapter else None

    def build() -> Qwen2:
        config = Qwen2Config.from_hf(shape.config())
        return Qwen2(config, lora=lora, quantization=shape.quantization, dtype=shape.dtype, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(build)
    made = nnx.Any(LoraParam, LoraScaling)
    base = {path: (variable.shape, variable.dtype) for path, variable in variables(model, nnx.Not(made)).items()}

    @jax.jit
    def fill() -> tuple[dict[Path, jax.Array], Any]:
        keys = jax.random.split(jax.random.key(0), len(base))
        drawn = {path: _drawn(key, path, *declared) for key, (path, declared) in zip(keys, base.items(), strict=True)}
        return drawn, nnx.state(build(), made)  # of what ``build`` makes only the adapter leaves, so nothing else is computed

    drawn, adapters = jax.block_until_ready(fill())
    assign(model, drawn | {path: variable[...] for path, variable in nnx.to_flat_state(adapters)})
    return model


def _drawn(key: jax.Array, path: Path, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    scale = _SPREAD / float(np.sqrt(np.mean(CODES**2)))
    if dtype == jnp.uint8:  # codes, a layer at a time: a whole stack has more elements than 32 bits count
        return jax.lax.map(lambda layer: jax.random.bits(layer, shape[1:], jnp.uint8), jax.random.split(key, shape[0]))
    if path[-1] in ("nested_absmax", "offset"):
        return jnp.full(shape, scale if path[-1] == "offset" else scale / 4, dtype)
    if str(path[-2]).endswith("norm"):
        return jnp.ones(shape, dtype)
    return (_SPREAD * jax.random.normal(key, shape, dtype)).astype(dtype)


def _trained(model: Qwen2, loss_fn: Callable[..., Any], batches: Any, seconds: float) -> dict[str, Any]:
    """Time steps after a first one, which compiles; the adapter and AdamW's state change as in a run."""
    config = OptimizerConfig()
    optimizer = make_optimizer(config, _SCHEDULE)
    graph, trainable, *others = nnx.split(model, LoraParam, ...)
    step = make_step(graph, loss_fn, optimizer, partial(learning_rate, config, _SCHEDULE))
    moments = optimizer.init(trainable)
    batches = jax.tree.map(jnp.asarray, batches)
    times: list[float] = []
    while len(times) <= STEPS and (len(times) < 2 or sum(times[1:]) < seconds):
        begun = time.perf_counter()
        trainable, moments, metrics = jax.block_until_ready(step(trainable, moments, jnp.int32(len(times)), others[0], batches))
        times.append(time.perf_counter() - begun)
    loss, norm = float(metrics.loss.loss), float(metrics.grad_norm)
    if not (np.isfinite(loss) and np.isfinite(norm)):
        raise RuntimeError(f"the loss is {loss} and its gradient's norm {norm}")
    timed = times[1:]
    median = statistics.median(timed)
    return {
        "step_s": median,
        "steps_s": timed,
        "compile_s": max(0.0, times[0] - median),
        "loss": loss,
        "grad_norm": norm,
        "attention": backend_for(jax.ShapeDtypeStruct((1, 1, 1, model.config.head_dim), model.dtype)),
    }


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


def _seconds(function: Callable[..., jax.Array], *arguments: jax.Array, repeats: int = 7, calls: int = 5) -> float:
    """Of one call, median of ``repeats``; ``calls`` are sent off together so that sending them costs nothing."""
    jax.block_until_ready([function(*arguments) for _ in range(2)])
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(calls):
            last = function(*arguments)
        last.block_until_ready()
        times.append((time.perf_counter() - begun) / calls)
    return statistics.median(times)


def _device(smoke: bool) -> jax.Device:
    device = jax.devices()[0]
    if not smoke and device.platform != "gpu":
        raise UserError(f"JAX sees no GPU here, only {device.platform}; install its CUDA plugin: pip install 'jax[cuda12]'")
    return device


def _peak(device: jax.Device) -> int:
    """Most bytes of device memory in use at a time; of this process where the device is the host."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use") or peak_resident_bytes()


if __name__ == "__main__":
    sys.exit(serve({"rates": rates, "cpt": cpt, "rpo": rpo, "decode": decode}, sys.argv[1:]))
