"""Small random models of every family, and adapters, written by transformers and PEFT themselves.

Nothing in them is zero or one where a real model's would not be: biases, norm weights and LoRA's B are random, so that a term
left out, or scaled wrongly, shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from medllm.config import ALL_LINEAR

VOCAB = 96
WINDOW = 6  # shorter than most documents of the tests' rows


def _rope(kind: str, **scaling: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **scaling}}


KINDS: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2, yarn": {"model_type": "qwen2"} | _rope("yarn", factor=4.0, original_max_position_embeddings=64),
    "qwen2, window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3, biased": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "qwen3, yarn": {"model_type": "qwen3", "head_dim": 16}
    | _rope("yarn", factor=8.0, original_max_position_embeddings=128, beta_fast=16.0, attention_factor=1.3),
    "llama": {"model_type": "llama"},
    "llama 3": {"model_type": "llama"}
    | _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "llama, biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True} | _rope("linear", factor=3.0),
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, window": {"model_type": "mistral", "sliding_window": WINDOW},
}
"""What the models of the tests may be → how that differs from a plain one in its configuration."""


@dataclass(frozen=True)
class TinyModel:
    """A shape to test with, of one of :data:`KINDS`. Widths are multiples of 64 so that the model can be quantized."""

    kind: str = "qwen2"
    tied: bool = False
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    hidden: int = 64
    mlp: int = 128
    context: int = 512
    seed: int = 0

    @property
    def name(self) -> str:
        """A folder name that says what is in it."""
        sizes = f"{self.heads}q{self.kv_heads}kv-{self.layers}x{self.hidden}-{self.context}"
        kind = self.kind.replace(", ", "-").replace(" ", "-")
        return f"{kind}-{'tied' if self.tied else 'untied'}-{sizes}-{self.seed}"


def write_tiny_model(folder: Path, shape: TinyModel, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model below ``folder`` and return its directory."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
        **_rope("default"),
        **KINDS[shape.kind],
    }
    generator = torch.Generator().manual_seed(shape.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name or "lm_head" in name else parameter.shape[-1] ** -0.5))
    out = folder / f"{shape.name}-{str(dtype).removeprefix('torch.')}"
    model.to(dtype).save_pretrained(out)
    return out


def write_tiny_adapter(
    base: Path,
    out: Path,
    *,
    rank: int = 4,
    alpha: float = 6.0,
    targets: tuple[str, ...] | str = ALL_LINEAR,
    rslora: bool = False,
    seed: int = 7,
    **more: Any,
) -> Path:
    """Write a PEFT adapter for the model in ``base`` whose A and B are both random; ``more`` are PEFT's own settings."""
    modules = targets if isinstance(targets, str) else list(targets)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, use_rslora=rslora, task_type="CAUSAL_LM", **more),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5 / 2)
    model.save_pretrained(out)
    return out
