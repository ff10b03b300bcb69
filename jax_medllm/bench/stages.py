"""The measurements of ``medllm bench`` that run in a process of their own (:mod:`medllm.host.child`)."""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_medllm.bench.floor import floor
from jax_medllm.bench.operations import recorded
from jax_medllm.model import linear
from jax_medllm.model.decoder import LoraParam
from jax_medllm.train.batches import CptBatch
from jax_medllm.train.compilation import compile_seconds
from jax_medllm.train.loop import cpt_loss_fn, make_step
from jax_medllm.weights.blueprint import Blueprint
from jax_medllm.weights.read import load_model
from medllm.bench.shapes import ModelShape
from medllm.bench.work import measurements
from medllm.config import LoraConfig, ModelConfig, OptimizerConfig
from medllm.host.child import serve
from medllm.host.memory import peak_resident_bytes, resident_bytes


def load(**model: Any) -> dict[str, Any]:
    """Seconds and bytes of opening a model; ``model`` are the fields of :class:`medllm.config.ModelConfig`."""
    jnp.zeros(()).block_until_ready()  # the backend has its threads and buffers before anything is counted
    baseline = resident_bytes()
    start = time.perf_counter()
    arrays = jax.block_until_ready(jax.tree.leaves(nnx.state(load_model(ModelConfig(**model)))))
    seconds = time.perf_counter() - start
    result = sum(array.nbytes for array in arrays)
    return {
        "seconds": seconds,
        "result_bytes": result,
        "baseline_rss_bytes": baseline,
        "peak_rss_bytes": peak_resident_bytes(),
    }


def matmul(rows: int, inner: int, columns: int, repeats: int = 20) -> dict[str, Any]:
    """The rate of an fp32 product [rows, inner] x [columns, inner]ᵀ as the model takes it: a yardstick for the rest."""
    keys = jax.random.split(jax.random.key(0))
    x, weight = (jax.random.normal(key, shape) for key, shape in zip(keys, [(rows, inner), (columns, inner)], strict=True))
    product = jax.jit(linear.matmul)
    product(x, weight).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, weight).block_until_ready()
        times.append(time.perf_counter() - start)
    return {"gflops": 2 * rows * inner * columns / statistics.median(times) / 1e9}


def compile_step(model: dict[str, Any], rows: int = 8, length: int = 256) -> dict[str, Any]:
    """Seconds to compile a CPT step, traced already; of the model there are shapes alone."""
    shape = ModelShape(**model)
    blueprint = Blueprint(shape.architecture, LoraConfig(rank=shape.rank), quantization=shape.quantization, dtype=shape.dtype)
    graph, trainable, *others = nnx.split(blueprint.model(), LoraParam, ...)
    step = make_step(graph, cpt_loss_fn, OptimizerConfig(), total_steps=100)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = CptBatch(tokens, tokens, tokens, jax.ShapeDtypeStruct((), jnp.float32))
    index = jax.ShapeDtypeStruct((), jnp.int32)
    traced = step.trace(trainable, jax.eval_shape(step.init, trainable), index, others[0], batch)
    lowered = [part.lower() for part in traced]
    start = time.perf_counter()
    for part in lowered:
        part.compile()
    return {"seconds": time.perf_counter() - start}


def profiler(folder: str) -> AbstractContextManager[Any]:
    """Writes a trace for TensorBoard and Perfetto into ``folder``; Python's own calls, which would fill it, are left out."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options)


if __name__ == "__main__":
    stages = measurements("jax", profiler, compile_seconds)
    stages = {name: partial(recorded, stage) for name, stage in stages.items()}
    sys.exit(serve({"load": load, "matmul": matmul, "compile_step": compile_step, "floor": floor, **stages}, sys.argv[1:]))
