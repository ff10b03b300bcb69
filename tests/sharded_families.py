"""Part of the mesh tests' child process: models of every family answer on a mesh of forced devices, against one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_medllm.generate.cached_decoder import Decoder
from jax_medllm.generate.queue import generate
from jax_medllm.generate.scorer import Scorer
from jax_medllm.mesh.layout import Layout, in_use
from jax_medllm.model.quantized_weight import NF4Weight
from jax_medllm.model.rows import MULTIPLE
from jax_medllm.weights.bnb_files import packed_parts
from jax_medllm.weights.read import read_model, write_quantized
from medllm.architecture import HEAD, PROJECTIONS, Architecture
from medllm.config import LoraConfig, Sampling
from medllm.engine import Continuation
from medllm.model.directory import ModelDirectory, write_model
from medllm.quantization import Quantization
from medllm.rotary import Llama3, RotaryRule
from tests.sharded_training import gradients_of
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

DENSE = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
"""What the folder of :func:`partly_packed` does not pack."""


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


def partly_packed(folder: Path) -> Path:
    """A llama in 4 bits, its output matrix too, but for :data:`DENSE`."""
    model = replace(FAMILIES["llama"], vocab_size=512)
    dense, packed = write(model, folder / "dense"), folder / "packed"
    write_quantized(dense, packed, "nf4", "float32")
    whole, codes = ModelDirectory(dense), ModelDirectory(packed)
    kept = [f"{module}.weight" for module in DENSE]
    tensors = {name: codes.read(name) for name in codes.names() if not name.startswith((HEAD, *kept))}
    tensors |= {name: whole.read(name) for name in kept}
    tensors |= dict(packed_parts(HEAD, NF4Weight.quantize(jnp.asarray(whole.read(HEAD))), "float32"))
    settings = codes.config["quantization_config"] | {"llm_int8_skip_modules": list(DENSE)}
    write_model(folder / "partly", codes.config | {"quantization_config": settings}, tensors.items())
    return folder / "partly"


def gradients_apart(folder: Path) -> float:
    """Largest difference of a training step's gradients on the mesh and on one device, relative to the largest gradient."""

    def gradients() -> list[np.ndarray]:
        model = read_model(ModelDirectory(folder), lora=LoraConfig(rank=4, alpha=8), quantization="nf4")
        return jax.tree.leaves(gradients_of("cpt", model, jax.devices() if in_use() else None)[1])

    alone = gradients()
    with Layout.of(MESH).in_use():
        spread = gradients()
    return max(float(np.abs(a - b).max()) for a, b in zip(alone, spread, strict=True)) / max(
        float(np.abs(a).max()) for a in alone
    )


def answers(folder: Path, quantization: Quantization) -> tuple[list[tuple[int, ...]], list[np.ndarray]]:
    """Greedy continuations of eight prompts that begin alike, in four slots, and log-probabilities of four options of three."""
    rng = np.random.default_rng(1)
    shared = rng.integers(1, 64, MULTIPLE).tolist()
    prompts = [shared + rng.integers(1, 64, length).tolist() for length in (3, 12, 7, 9, 5, 8, 4, 11)]
    model = read_model(ModelDirectory(folder), quantization=quantization)
    found = generate(Decoder(model, (model.config.vocab_size,)), prompts, Sampling(max_new_tokens=12), str, 4)
    asked = [Continuation(tuple(prompt[:20]), (option, 7)) for prompt in prompts[:3] for option in range(3, 7)]
    return [generation.tokens for (generation,) in found], Scorer(model).logprobs(asked, 12)


def compared(folder: Path) -> dict[str, dict[str, Any]]:
    """By family and quantization, and of a folder that is partly packed, what :func:`answered` finds."""
    written = {family: write(model, folder / family) for family, model in FAMILIES.items()}
    cases = {f"{family} {kind}": answered(path, kind) for family, path in written.items() for kind in QUANTIZATIONS}
    partly = partly_packed(folder)
    return cases | {"partly packed": answered(partly, "nf4") | {"gradients": gradients_apart(partly)}}


def answered(folder: Path, quantization: Quantization) -> dict[str, Any]:
    """The texts of one device and of the mesh, and how far log-probabilities are apart."""
    texts, logprobs = answers(folder, quantization)
    with Layout.of(MESH).in_use():
        other_texts, other_logprobs = answers(folder, quantization)
    apart = max(float(np.abs(a - b).max()) for a, b in zip(logprobs, other_logprobs, strict=True))
    return {"texts": texts, "on the mesh": other_texts, "logprobs": apart}
