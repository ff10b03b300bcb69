"""``medllm bench load``: how fast a checkpoint opens, and how much memory that takes beyond the opened model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from medllm.architecture import Architecture
from medllm.bench.engines import measure
from medllm.errors import UserError
from medllm.host.progress import Say
from medllm.model.directory import write_model
from medllm.model.random import random_tensors
from medllm.published import PUBLISHED, qwen2
from medllm.quantization import Quantization

ALLOWANCE = 1_200_000_000
"""Bytes that opening a model may take beyond the model itself, interpreter and libraries included."""
_SHARD = 2_000_000_000
_POOL = 1 << 22
_MODELS = (*(PUBLISHED[name] for name in ("qwen2.5-7b", "qwen2.5-3b", "qwen2.5-0.5b")), qwen2(1, 256, 1024, 4, 2, 8192))
"""Whose layers a checkpoint may have, the widest first."""


def bench_load(gigabytes: float, engine: str, quantization: Quantization, say: Say = lambda line: None) -> dict[str, Any]:
    """Write a random bf16 checkpoint into a temporary folder, open it in a fresh process, and report seconds and memory.

    ``within`` says whether the whole process stayed below the model's size + 1.2 GB.

    Raises:
        UserError: the size is not positive, or the engine is not installed.
    """
    if not gigabytes > 0:
        raise UserError(f"--gigabytes is {gigabytes}; a positive size is needed")
    model = checkpoint_model(gigabytes * 1e9)
    with tempfile.TemporaryDirectory(prefix="medllm-bench-") as scratch:
        folder = Path(scratch) / "model"
        say(f"bench: writing {gigabytes:g} GB, {model.num_layers} layers of width {model.hidden_size}")
        config = model.to_hf() | {"torch_dtype": "bfloat16"}
        write_model(folder, config, random_tensors(model, _drawn_from_pool()), shard_bytes=_SHARD)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found = measure(engine, "load", path=str(folder), quantization=quantization, dtype="bfloat16")
    gib = {f"{name}_gib": found[f"{name}_bytes"] / 2**30 for name in ("result", "baseline_rss", "peak_rss")}
    return {
        "engine": engine,
        "quantization": quantization,
        "gigabytes": size / 1e9,
        "seconds": found["seconds"],
        "gigabytes_per_second": size / 1e9 / found["seconds"],
        **gib,
        "within": found["peak_rss_bytes"] <= found["result_bytes"] + ALLOWANCE,
    }


def summary(found: dict[str, Any]) -> str:
    """The result in a line."""
    return (
        f"bench load: {found['gigabytes']:.2f} GB in {found['seconds']:.1f} s ({found['gigabytes_per_second']:.2f} GB/s); "
        f"peak {found['peak_rss_gib']:.2f} GiB for a model of {found['result_gib']:.2f} GiB, "
        f"{'within' if found['within'] else 'beyond'} its size + 1.2 GB"
    )


def checkpoint_model(size: float) -> Architecture:
    """A model of about ``size`` bytes in bf16: the widest whose embeddings do not dominate it, with a head of its own."""
    for model in _MODELS:
        embeddings = 2 * 2 * model.vocab_size * model.hidden_size
        layer = 2 * model.linear_parameters / model.num_layers
        if embeddings <= 0.4 * size:
            break
    return replace(model, num_layers=max(1, round((size - embeddings) / layer)), tie_embeddings=False)


def _drawn_from_pool() -> Callable[..., np.ndarray]:
    """N(0, 0.02²) in bf16, cut from a few million numbers at random offsets: drawing all of them would take minutes."""
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(_POOL, np.float32)).astype(ml_dtypes.bfloat16)

    def draw(*shape: int) -> np.ndarray:
        return np.resize(np.roll(pool, int(rng.integers(_POOL))), shape)

    return draw
