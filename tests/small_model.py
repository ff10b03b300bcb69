"""The JAX tests' model: two layers, grouped queries, everything too small to take time."""

from __future__ import annotations

import dataclasses
from typing import Any

from medllm.architecture import Architecture
from medllm.rotary import RotaryRule

_SMALL = Architecture(
    family="qwen2",
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rotary=RotaryRule(1e4),
    biased=("q_proj", "k_proj", "v_proj"),
    rms_norm_eps=1e-6,
    tie_embeddings=True,
    max_positions=128,
)


def small_config(**changes: Any) -> Architecture:
    """Its sizes, with ``changes``."""
    return dataclasses.replace(_SMALL, **changes)
