"""The measurements of ``medllm bench`` that run in a process of their own (:mod:`medllm.bench.child`)."""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_medllm.weights import load_model
from medllm.bench.child import serve
from medllm.bench.memory import peak_resident_bytes, resident_bytes
from medllm.config import ModelConfig


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


if __name__ == "__main__":
    sys.exit(serve({"load": load}, sys.argv[1:]))
