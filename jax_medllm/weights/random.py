"""Models with random weights, for measurements: made on the device, already packed, so that no dense stack ever exists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.model.linear import LoraParam, LoraScaling
from jax_medllm.model.nf4 import CODES
from jax_medllm.model.quantized_weight import KINDS
from jax_medllm.weights.adapters import Path, assign, variables
from jax_medllm.weights.blueprint import Blueprint
from medllm.architecture import Architecture
from medllm.config import LoraConfig
from medllm.quantization import Quantization

SPREAD = 0.02
"""Standard deviation of the weights."""
_PIECES = 64


def random_model(
    config: Architecture, *, quantization: Quantization, dtype: Literal["float32", "bfloat16"], rank: int | None
) -> DenseDecoder:
    """A model with random weights, filled in one compiled program.

    Codes are uniform, so a weight's spread is that of the sixteen codes times its scale.

    Args:
        config: Its sizes, and what its family fixes.
        quantization: How the linear layers are held.
        dtype: Of dense weights, and of the computation.
        rank: Of a LoRA adapter on all linear layers; None for a model without one.
    """
    lora = LoraConfig(rank=rank, alpha=2 * rank) if rank else None
    blueprint = Blueprint(config, lora=lora, quantization=quantization, dtype=dtype)
    model = blueprint.model()
    made = nnx.Any(LoraParam, LoraScaling)
    scale = SPREAD / float(np.sqrt(np.mean(CODES**2)))
    levels = KINDS[quantization].typical(scale) if quantization in KINDS else {}
    base = {path: (variable.shape, variable.dtype) for path, variable in variables(model, nnx.Not(made)).items()}

    @jax.jit
    def fill() -> tuple[dict[Path, jax.Array], Any]:
        keys = jax.random.split(jax.random.key(0), len(base))
        drawn = {path: _drawn(key, path, *declared, levels) for key, (path, declared) in zip(keys, base.items(), strict=True)}
        return drawn, nnx.state(blueprint.build(), made)  # only the adapter leaves, so nothing else is computed

    drawn, adapters = jax.block_until_ready(fill())
    assign(model, drawn | {path: variable[...] for path, variable in nnx.to_flat_state(adapters)})
    return model


def _drawn(key: jax.Array, path: Path, shape: tuple[int, ...], dtype: Any, levels: Mapping[str, float]) -> jax.Array:
    if dtype == jnp.uint8:
        return _by_layer(key, shape, lambda layer, rest: jax.random.bits(layer, rest, jnp.uint8))
    if path[-1] in levels:
        return jnp.full(shape, levels[path[-1]], dtype)
    if str(path[-2]).endswith("norm"):
        return jnp.ones(shape, dtype)

    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return (SPREAD * jax.random.normal(key, shape, dtype)).astype(dtype)

    if len(shape) == 2:  # the embedding and the head, in pieces: drawing needs several times the memory of what is drawn
        pieces = math.gcd(shape[0], _PIECES)
        return _by_layer(key, (pieces, shape[0] // pieces, shape[1]), normal).reshape(shape)
    return _by_layer(key, shape, normal) if len(shape) == 3 else normal(key, shape)


def _by_layer(key: jax.Array, shape: tuple[int, ...], draw: Any) -> jax.Array:
    """A layer at a time: a whole stack has more elements than 32 bits count, and its random bits more bytes than it."""
    return jax.lax.map(lambda layer: draw(layer, shape[1:]), jax.random.split(key, shape[0]))
