"""Model folders that say more than one thing: a copy of a sound one with something changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from medllm.architecture import EMBEDDING, HEAD
from medllm.model.files import WEIGHTS

Tensors = dict[str, torch.Tensor]
SKIPPED = ("lm_head", "model.layers.0.mlp", "layers.2.mlp.down_proj", "v_proj", r"model\.layers\.1\.self_attn\.o.*")
"""The layers of :func:`partly_dense_model` that are dense: by the beginning, the end and a pattern of their names."""


def changed(
    source: Path, out: Path, tensors: Callable[[Tensors], Any] = lambda _: None, config: Mapping[str, Any] | None = None
) -> Path:
    """A copy of a folder with other tensors, or with other entries in its config."""
    shutil.copytree(source, out)
    held = load_file(out / WEIGHTS)
    save_file(tensors(held) or held, out / WEIGHTS, {"format": "pt"})
    said = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(said | dict(config or {})))
    return out


def partly_dense_model(source: Path, out: Path) -> Path:
    """A 4-bit folder that transformers was told to leave :data:`SKIPPED` out of."""
    return _packed_by_transformers(source, out, SKIPPED)


def packed_head_model(source: Path, out: Path, *, double: bool = True) -> Path:
    """A 4-bit folder in which transformers packed every linear layer, the output matrix among them."""
    return _packed_by_transformers(source, out, (), double=double)


def _packed_by_transformers(source: Path, out: Path, skipped: Sequence[str], *, double: bool = True) -> Path:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, llm_int8_skip_modules=list(skipped)
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map="cpu", quantization_config=settings)
    model.save_pretrained(out)
    return out


def own_head(tensors: Tensors) -> None:
    """An output matrix beside the embedding it is said to be tied to."""
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()


def embedding_as_head(tensors: Tensors) -> None:
    """The tied table under the name of the output matrix."""
    tensors[HEAD] = tensors.pop(EMBEDDING)


def head_twice(tensors: Tensors) -> None:
    """The tied table under both names."""
    tensors[HEAD] = tensors[EMBEDDING].clone()


def without_prefix(tensors: Tensors) -> Tensors:
    """The names a decoder without a head saves."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_another_prefix(tensors: Tensors) -> Tensors:
    """The names a model inside another saves."""
    return {f"model.{name}": tensor for name, tensor in tensors.items()}
