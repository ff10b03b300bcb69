"""One layer of a model directory, presented as a directory of its own, so that the JAX loader reads it and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes import functional as bnb

from jax_medllm.model.quantized_weight import KINDS
from jax_medllm.weights.bnb_files import suffixes
from medllm.architecture import EMBEDDING, NORM, layer_path
from medllm.config import ALL_LINEAR, LoraConfig
from medllm.model.adapter import Adapter, module_name
from medllm.model.directory import ModelDirectory
from medllm.quantization import BLOCK, DESCRIPTION, PACKINGS, Quantization
from medllm_parity.torch_layer import to_torch

_AROUND = (EMBEDDING, NORM)


class LayerView(ModelDirectory):
    """Layer ``index`` of a directory as layer 0 of a model of one layer and one token.

    Args:
        directory: The whole model.
        index: The layer that is shown.
        quantization: Other than ``none``, quantize the linear kinds of a dense directory with bitsandbytes and show them as a
            packed directory would. On a CPU bitsandbytes looks scales up in a table and misses the nearest one in a few of a
            thousand; both stacks must have the same codes for their arithmetic to be compared.
        dtype: To which weights are rounded before they are quantized.
    """

    def __init__(self, directory: ModelDirectory, index: int, quantization: Quantization, dtype: torch.dtype):
        self.path = directory.path
        shown = {"num_hidden_layers": 1, "vocab_size": 1, "tie_word_embeddings": True, "quantization_config": None}
        self.config = {**directory.config, **shown}  # names of layers in a quantization are those of the whole model
        self._directory = directory
        self._prefix = f"{layer_path(index)}."
        self.kind = KINDS.get(quantization)
        self._dtype = dtype
        self._made: dict[str, np.ndarray] = {}

    def names(self) -> list[str]:
        """Names of all tensors."""
        shown = [self._shown(name) for name in self._directory.names() if name.startswith(self._prefix)]
        return [*_AROUND, *shown, *(f"{name}{part}" for name in shown if self._quantizes(name) for part in self._suffixes())]

    @property
    def packed(self) -> bool:
        """Whether what is dense in it is so by choice."""
        return self._directory.packed

    def __contains__(self, name: str) -> bool:
        stem, part = self._split(name)
        return name in _AROUND or self._name(name) in self._directory or (bool(part) and self._quantizes(stem))

    def file(self, name: str) -> Path:
        """The file that holds a tensor, or the weight it is made of."""
        return self._directory.file(self._name(self._split(name)[0]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if name in _AROUND or self._quantizes(self._split(name)[0]):
            return self.read(name).shape
        return self._directory.shape(self._name(name))

    def dtype(self, name: str) -> np.dtype:
        """Stored type of a tensor."""
        if name in _AROUND or self._quantizes(self._split(name)[0]):
            return self.read(name).dtype
        return self._directory.dtype(self._name(name))

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        if name in _AROUND:
            width = int(self.config["hidden_size"])
            return np.zeros((1, width) if name == EMBEDDING else (width,), np.float32)
        stem, _ = self._split(name)
        if self._quantizes(stem):
            if name not in self._made:
                self._made |= self._quantized(stem)
            return self._made[name]
        return self._directory.read(self._name(name))

    def read_slice(self, name: str, index: Any) -> np.ndarray:
        """Part of a tensor."""
        if name in _AROUND or self._quantizes(self._split(name)[0]):
            return self.read(name)[index]
        return self._directory.read_slice(self._name(name), index)

    def dense(self, name: str) -> torch.Tensor | None:
        """The weight that is quantized to show ``name``, in the type it is quantized from; None where it is not."""
        return to_torch(self._directory.read(self._name(name)), self._dtype) if self._quantizes(name) else None

    def _shown(self, name: str) -> str:
        return f"{layer_path(0)}.{name.removeprefix(self._prefix)}"

    def _name(self, shown: str) -> str:
        return f"{self._prefix}{shown.removeprefix(f'{layer_path(0)}.')}"

    def _quantizes(self, shown: str) -> bool:
        """Whether a weight is dense on disk and shown in 4 bits."""
        if self.kind is None or self._directory.packed or not shown.endswith(tuple(f".{kind}.weight" for kind in ALL_LINEAR)):
            return False
        name = self._name(shown)
        return name in self._directory and f"{name}{DESCRIPTION}" not in self._directory

    def _quantized(self, shown: str) -> dict[str, np.ndarray]:
        assert self.kind is not None
        double = PACKINGS[self.kind.name].double
        packed, state = bnb.quantize_4bit(self.dense(shown), blocksize=BLOCK, quant_type="nf4", compress_statistics=double)
        parts = {part: tensor.numpy() for part, tensor in state.as_dict(packed=True).items()}
        return {shown: packed.numpy(), **{f"{shown}.{part}": value for part, value in parts.items()}}

    def _suffixes(self) -> tuple[str, ...]:
        return suffixes(self.kind) if self.kind else ()

    def _split(self, name: str) -> tuple[str, str]:
        """A tensor's name without the part of a packed weight it is, and that part."""
        for part in self._suffixes():
            if name.endswith(f".weight{part}"):
                return name.removesuffix(part), part
        return name, ""


def adapter_view(adapter: Adapter, index: int) -> Adapter | None:
    """The part of an adapter that is on layer ``index``, as an adapter of a model of one layer; None where there is none."""
    prefix, shown = (f"base_model.model.{layer_path(layer)}." for layer in (index, 0))
    tensors = {shown + name.removeprefix(prefix): tensor for name, tensor in adapter.tensors.items() if name.startswith(prefix)}
    if not tensors:
        return None
    lora = adapter.lora
    covered = {kind: module for kind in ALL_LINEAR if lora.covers(module := module_name(index, kind))}
    ranks = {kind: lora.rank_of(module) for kind, module in covered.items()}
    alphas = {kind: lora.scaling_of(module) * _divisor(lora, ranks[kind]) for kind, module in covered.items()}
    first = next(iter(covered))
    return Adapter(
        LoraConfig(ranks[first], alphas[first], tuple(covered), lora.rslora, lora.seed, ranks, alphas), tensors, adapter.path
    )


def _divisor(lora: LoraConfig, rank: int) -> float:
    return rank**0.5 if lora.rslora else float(rank)
