"""Times functions and optimizer steps on whatever device there is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.model.linear import LoraParam
from jax_medllm.train.loop import make_step
from medllm.config import OptimizerConfig

STEPS = 3
"""Steps that are timed, after one that is not; fewer where the time for them is up, at least one."""
_SCHEDULE = 1000


def timed_training(model: DenseDecoder, loss_fn: Callable[..., Any], batches: Any, seconds: float) -> dict[str, Any]:
    """Time optimizer steps after a first one, which compiles; the adapter and AdamW's state change as in a run.

    Args:
        model: With the adapter that is trained; the steps take its memory.
        loss_fn: ``(model, batch) -> (loss, metrics)``.
        batches: The micro-batches of a step.
        seconds: After which no further step is begun.

    Returns:
        ``step_s`` (the median), ``steps_s``, ``compile_s``, and ``loss`` and ``grad_norm`` of the last.

    Raises:
        RuntimeError: the loss or its gradient is not finite.
    """
    graph, trainable, *others = nnx.split(model, LoraParam, ...)
    step = make_step(graph, loss_fn, OptimizerConfig(), _SCHEDULE)
    moments = step.init(trainable)
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
    }


def call_seconds(function: Callable[..., jax.Array], *arguments: jax.Array, repeats: int = 7, calls: int = 5) -> float:
    """Seconds of one call, median of ``repeats``; ``calls`` are sent off together so that sending them costs nothing."""
    jax.block_until_ready([function(*arguments) for _ in range(2)])
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(calls):
            last = function(*arguments)
        last.block_until_ready()
        times.append((time.perf_counter() - begun) / calls)
    return statistics.median(times)


def copy_bytes(size: int) -> float:
    """Bytes a second of a copy on the device, read and written, of an array of ``size`` bytes."""
    words = jax.random.bits(jax.random.key(2), (size // 4,), jnp.uint32)
    return 2 * words.nbytes / call_seconds(jax.jit(lambda array: array ^ 1), words)
