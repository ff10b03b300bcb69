"""Part of the mesh tests' child process: models of every family answer on a mesh of forced devices, against one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_medllm.generate.cached_decoder import Decoder
from jax_medllm.generate.queue import generate
from jax_medllm.generate.scorer import Scorer
from jax_medllm.mesh.layout import Layout
from jax_medllm.model.rows import MULTIPLE
from jax_medllm.weights.read import read_model
from medllm.architecture import PROJECTIONS, Architecture
from medllm.config import Sampling
from medllm.engine import Continuation
from medllm.model.directory import ModelDirectory, write_model
from medllm.quantization import Quantization
from medllm.rotary import Llama3, RotaryRule
from tests.small_model import small_config

MESH = "data=2,fsdp=2,tensor=2"

# 192 inputs of down_proj are three blocks of 64: over two devices a block is cut.
_SIZES = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_heads": 8, "num_kv_heads": 4}
_STRETCHED = RotaryRule(1e4, Llama3(8.0, 1.0, 4.0, 64))

FAMILIES: Mapping[str, Architecture] = {
    "qwen3": small_config(**_SIZES, family="qwen3", head_dim=32, biased=()),
    "llama": small_config(
        **_SIZES, family="llama", head_dim=16, biased=tuple(PROJECTIONS), rotary=_STRETCHED, tie_embeddings=False
    ),
    "mistral": small_config(**_SIZES, family="mistral", head_dim=16, biased=(), window=11),
}
"""Models that show what a family has of its own: norms of heads wider than their share of the width; biases everywhere and
stretched positions, untied; a window shorter than a prompt."""

QUANTIZATIONS: tuple[Quantization, ...] = ("none", "nf4")


def write(model: Architecture, folder: Path) -> Path:
    """A directory of the model with random weights, none of them zero or one where it would not show."""
    rng = np.random.default_rng(0)
    scales = {"linear": 0.1, "table": 0.2, "bias": 0.3, "norm": 0.2}
    tensors = {
        name: (scales[one.kind] * rng.standard_normal(one.shape) + (one.kind == "norm")).astype(np.float32)
        for name, one in model.tensors.items()
    }
    write_model(folder, model.to_hf(), tensors.items())
    return folder


def answers(folder: Path, quantization: Quantization) -> tuple[list[tuple[int, ...]], list[np.ndarray]]:
    """Greedy continuations of eight prompts that begin alike, in four slots, and log-probabilities of four options of three."""
    rng = np.random.default_rng(1)
    shared = rng.integers(1, 64, MULTIPLE).tolist()
    prompts = [shared + rng.integers(1, 64, length).tolist() for length in (3, 12, 7, 9, 5, 8, 4, 11)]
    model = read_model(ModelDirectory(folder), quantization=quantization)
    found = generate(Decoder(model, (64,)), prompts, Sampling(max_new_tokens=12), str, 4)
    asked = [Continuation(tuple(prompt[:20]), (option, 7)) for prompt in prompts[:3] for option in range(3, 7)]
    return [generation.tokens for (generation,) in found], Scorer(model).logprobs(asked, 12)


def compared(folder: Path) -> dict[str, dict[str, Any]]:
    """By family and quantization: the texts of one device and of :data:`MESH`, and how far log-probabilities are apart."""
    found = {}
    for family, model in FAMILIES.items():
        written = write(model, folder / family)
        for quantization in QUANTIZATIONS:
            texts, logprobs = answers(written, quantization)
            with Layout.of(MESH).in_use():
                other_texts, other_logprobs = answers(written, quantization)
            apart = max(float(np.abs(a - b).max()) for a, b in zip(logprobs, other_logprobs, strict=True))
            found[f"{family} {quantization}"] = {"texts": texts, "on the mesh": other_texts, "logprobs": apart}
    return found
