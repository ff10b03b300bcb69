"""Weights in and out: Hugging Face models, PEFT adapters, bitsandbytes 4-bit directories.

One rule maps an array of the model to its tensors on disk, in both directions: the path of attributes is Hugging Face's
module path, orientation included, and an array below ``layers`` is the stack of one tensor a layer. Tensors are read one at a
time into their place in the stack, so the host holds one tensor, not the model.

A model's own adapter (``ModelConfig.adapter``) stays a frozen low-rank term beside the weight, as PEFT computes it, and is
never added to quantized weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_medllm.linear import FrozenLoraParam, Lora, LoraParam, Quantization
from jax_medllm.model import Qwen2, Qwen2Config
from jax_medllm.nf4 import NF4Weight, dequantize, quantize
from medllm.config import LoraConfig, ModelConfig
from medllm.errors import UserError
from medllm.model_directory import Adapter, ModelDirectory, read_adapter

Path = tuple[Any, ...]
_ADAPTER_PREFIX = "base_model.model."
_PACKED_STATE = ".quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes: an array of the model, a layer of it (None: the whole array), and the shape expected on disk."""

    path: Path
    layer: int | None
    shape: tuple[int, ...]


def load_model(model: ModelConfig, *, lora: LoraConfig | None = None) -> Qwen2:
    """Open a model directory, with the adapter the configuration names (frozen) and a fresh one to train where asked.

    Raises:
        UserError: the directory is not a supported Qwen2, or a tensor is missing, superfluous or of another shape.
    """
    return read_model(
        ModelDirectory(model.path),
        lora=lora,
        adapter=read_adapter(model.adapter) if model.adapter else None,
        quantization=model.quantization,
        dtype=jnp.dtype(model.dtype),
    )


def read_model(
    directory: ModelDirectory,
    *,
    lora: LoraConfig | None = None,
    adapter: Adapter | None = None,
    quantization: Quantization = "none",
    dtype: Any = jnp.float32,
) -> Qwen2:
    """As :func:`load_model`, from opened directories and in any floating type.

    A bitsandbytes NF4 directory is read as it is when ``quantization`` is ``nf4``. Dense weights are rounded to ``dtype``
    before they are quantized, as bitsandbytes does.

    Raises:
        UserError: as for :func:`load_model`.
    """
    config = Qwen2Config.from_hf(directory.config)
    frozen = None if adapter is None else LoraConfig(adapter.rank, adapter.alpha, adapter.targets, adapter.rslora)
    build = partial(
        Qwen2, config, lora=lora, frozen_lora=frozen, quantization=quantization, dtype=dtype, rngs=nnx.Rngs(0)
    )
    model = nnx.eval_shape(build)
    slots = tensor_slots(model)
    _check_tensors(directory, slots, config)
    arrays = {path: _zeros(value) for path, value in _flat(model, nnx.Not(LoraParam)).items()}
    for name, slot in slots.items():
        _place(arrays, slot, directory, name, model.dtype)
    if adapter is not None:
        arrays |= _adapter_arrays(model, FrozenLoraParam, adapter)
    if lora is not None:
        # Only the adapter leaves the compiled function, so the random base weights are never computed.
        arrays |= {path: v[...] for path, v in _flat_state(jax.jit(lambda: nnx.state(build(), LoraParam))()).items()}
    return _filled(model, arrays)


def tensor_slots(model: Qwen2) -> dict[str, Slot]:
    """Hugging Face tensor name → where it goes in the model, for every base tensor."""
    slots: dict[str, Slot] = {}
    for path, variable in _flat(model, nnx.Any(nnx.Param, *_packed_types())).items():
        if isinstance(variable, LoraParam) or (_is_packed(path) and path[-1] != "packed"):
            continue
        shape = tuple(variable.shape)
        if _is_packed(path):
            path, shape = path[:-1], (*shape[:-1], 2 * shape[-1])
        if path[0] == "layers":
            slots |= {_tensor_name(path, layer): Slot(path, layer, shape[1:]) for layer in range(shape[0])}
        else:
            slots[_tensor_name(path, None)] = Slot(path, None, shape)
    return slots
