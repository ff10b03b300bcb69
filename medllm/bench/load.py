"""``medllm bench load``: how fast a checkpoint opens, and how much memory that takes beyond the opened model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from medllm.bench.engines import measure
from medllm.errors import UserError
from medllm.model_directory import write_model
from medllm.quantization import Quantization
from medllm.random_model import qwen2_config, random_tensors

ALLOWANCE = 1_200_000_000
"""Bytes that opening a model may take beyond the model itself, interpreter and libraries included."""
_SHARD = 2_000_000_000
_POOL = 1 << 22
# Published shapes of Qwen2.5 (7B, 3B, 0.5B), then a small one: width, mlp, query heads, key/value heads, vocabulary.
_SHAPES = (
    (3584, 18944, 28, 4, 152064),
    (2048, 11008, 16, 2, 151936),
    (896, 4864, 14, 2, 151936),
    (256, 1024, 4, 2, 8192),
)


def bench_load(
    gigabytes: float = 6.0,
    engine: str = "jax",
    quantization: Quantization = "nf4",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write a random bf16 checkpoint into a temporary folder, open it in a fresh process, and report seconds and memory.

    ``within`` says whether the whole process stayed below the model's size + 1.2 GB.

    Raises:
        UserError: the size is not positive, or the engine is not installed.
    """
    if not gigabytes > 0:
        raise UserError(f"--gigabytes is {gigabytes}; a positive size is needed")
    config = checkpoint_config(gigabytes * 1e9)
    with tempfile.TemporaryDirectory(prefix="medllm-bench-") as scratch:
        folder = Path(scratch) / "model"
        say(f"bench: writing {gigabytes:g} GB, {config['num_hidden_layers']} layers of width {config['hidden_size']}")
        write_model(folder, config, random_tensors(config, _drawn_from_pool()), shard_bytes=_SHARD)
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


def checkpoint_config(size: float) -> dict[str, Any]:
    """Configuration of a model of about ``size`` bytes in bf16: the widest shape whose embeddings do not dominate it."""
    for width, mlp, heads, kv_heads, vocabulary in _SHAPES:
        embeddings = 2 * 2 * vocabulary * width
        layer = 2 * width * (2 * width + 2 * width * kv_heads // heads + 3 * mlp)
        if embeddings <= 0.4 * size:
            break
    layers = max(1, round((size - embeddings) / layer))
    return qwen2_config(
        width=width, mlp=mlp, layers=layers, heads=heads, kv_heads=kv_heads, vocabulary=vocabulary, dtype="bfloat16"
    )


def _drawn_from_pool() -> Callable[..., np.ndarray]:
    """N(0, 0.02²) in bf16, cut from a few million numbers at random offsets: drawing all of them would take minutes."""
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(_POOL, np.float32)).astype(ml_dtypes.bfloat16)

    def draw(*shape: int) -> np.ndarray:
        return np.resize(np.roll(pool, int(rng.integers(_POOL))), shape)

    return draw
