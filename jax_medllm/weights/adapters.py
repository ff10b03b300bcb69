"""Adapters in and out of a model: PEFT's tensors, one a layer, against stacks over the layers.

A stack is as wide as its widest layer: a layer of a smaller rank, or without an adapter, is filled up with zeros. They stay
zero in training, since each matrix's padding meets the other's in the product and so has no gradient, and weight decay of zero
is zero. What is written has the padding cut off again.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_medllm.mesh.layout import place_parameter
from jax_medllm.mesh.processes import whole
from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.model.linear import FrozenLoraParam, LoraParam
from medllm.config import LoraConfig
from medllm.errors import UserError
from medllm.model.adapter import Adapter, module_name, tensor_name

Path = tuple[Any, ...]

TRAINED: Path = ("lora",)
REFERENCE: Path = ("reference_lora",)


def frozen(index: int) -> Path:
    """Where in a linear layer the model's adapter number ``index`` is; the trained one is at ``TRAINED``."""
    return ("frozen_loras", index)


def adapter_tensors(model: DenseDecoder) -> dict[str, np.ndarray]:
    """The trained adapter under PEFT's names, fp32: A [rank, in] and B [out, rank] of each layer and target.

    Of several processes all call it, and each has the whole adapter.
    """
    if model.lora is None:
        return {}
    tensors = {}
    for path, variable in variables(model, LoraParam).items():
        stack = whole(variable[...])
        for layer, module, rank in _adapted(model.lora, path, variable.shape[0]):
            tensors[tensor_name(module, path[-1])] = stack[layer][_unpadded(path[-1], rank)]
    return tensors


def adapter_arrays(model: DenseDecoder, adapter: Adapter, place: Path) -> dict[Path, jax.Array]:
    """The stacked arrays of ``adapter`` at ``place`` in the linear layers, each tensor checked against the model.

    Raises:
        UserError: a tensor is missing, superfluous or misshapen.
    """
    unused = dict(adapter.tensors)
    arrays = {}
    for path, variable in variables(model, LoraParam if place == TRAINED else FrozenLoraParam).items():
        if path[-1 - len(place) : -1] != place:
            continue
        stack = np.zeros(variable.shape, variable.dtype)
        for layer, module, rank in _adapted(adapter.lora, path, variable.shape[0]):
            name, matrix = tensor_name(module, path[-1]), path[-1]
            tensor = unused.pop(name, None)
            if tensor is None:
                raise UserError(f"{adapter.path}: the adapter has no tensor {name}; was it trained on a smaller model?")
            here = stack[layer][_unpadded(matrix, rank)]
            if tensor.shape != here.shape:
                raise UserError(f"{adapter.path}: {name} has shape {tensor.shape}; this model needs {here.shape}")
            here[...] = tensor
        arrays[path] = place_parameter(stack, variable, path)
    if unused:
        raise UserError(f"{adapter.path}: the adapter holds {next(iter(unused))}, for which this model has no place")
    return arrays


def frozen_update(model: DenseDecoder, arrays: dict[Path, Any], module: Path, layer: int) -> np.ndarray | None:
    """Sum of the scaled products of the frozen adapters of one weight, [out, in]; None where it has none.

    Args:
        model: The model.
        arrays: Its :func:`variables`.
        module: Path of the linear layer.
        layer: Which layer of the stack.
    """
    total = None
    for index in range(len(model.frozen_loras)):
        stem = (*module, *frozen(index))
        if (*stem, "A") in arrays:
            a, b, scaling = (np.asarray(arrays[*stem, part][layer]) for part in ("A", "B", "scaling"))
            total = scaling * (b @ a) + (0 if total is None else total)
    return total


def variables(model: DenseDecoder, kind: Any = ...) -> dict[Path, Any]:
    """Path → variable, for those of ``kind``."""
    return dict(nnx.to_flat_state(nnx.state(model) if kind is ... else nnx.state(model, kind)))


def assign(model: DenseDecoder, arrays: dict[Path, jax.Array]) -> None:
    """Set variables of the model, abstract or filled, to ``arrays``."""
    found = {path: variable.replace(arrays[path]) for path, variable in variables(model).items() if path in arrays}
    nnx.update(model, nnx.from_flat_state(found))


def _adapted(lora: LoraConfig, path: Path, layers: int) -> list[tuple[int, str, int]]:
    """(layer, module, rank) of each layer of a stack that carries an adapter."""
    modules = [module_name(layer, path[2]) for layer in range(layers)]
    return [(layer, module, rank) for layer, module in enumerate(modules) if (rank := lora.rank_of(module))]


def _unpadded(matrix: str, rank: int) -> tuple[slice, ...]:
    return (slice(rank),) if matrix == "A" else (slice(None), slice(rank))
