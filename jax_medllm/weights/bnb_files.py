"""Packed weights in the files bitsandbytes writes: the tensors of a ``Linear4bit`` in a state dict.

- ``NAME``: the codes, uint8 [out · in / 2, 1]; where ``bnb_4bit_quant_storage`` is another type, the same bytes seen as that
- ``NAME.absmax`` and, with double quantization, ``NAME.nested_absmax``: the scales, flat
- ``NAME.quant_map``, ``NAME.nested_quant_map``: the tables of codes, the same in every weight
- ``NAME.quant_state.bitsandbytes__nf4``: uint8, JSON of the kind, block sizes, offset, and the dense weight's type and shape

Which of them a kind has is said by :mod:`jax_medllm.model.quantized_weight`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_medllm.model.quantized_weight import KINDS, QuantizedWeight
from medllm.errors import UserError
from medllm.model.directory import ModelDirectory
from medllm.quantization import BLOCK, DESCRIPTION, PACKINGS, Quantization


@dataclass(frozen=True)
class Stored:
    """What a directory says of a packed weight.

    Attributes:
        kind: How it is packed.
        shape: Of the weight: [out, in].
        numbers: The parts that are numbers of its description.
    """

    kind: type[QuantizedWeight]
    shape: tuple[int, int]
    numbers: Mapping[str, float]


def suffixes(kind: type[QuantizedWeight]) -> tuple[str, ...]:
    """What follows a weight's name in the names of the tensors that stand beside it."""
    return (*(part.suffix for part in kind.parts.values() if part.suffix), *kind.tables, DESCRIPTION)


def stored(directory: ModelDirectory, name: str) -> Stored | None:
    """How a weight is packed; None where it is dense, or not there.

    Raises:
        UserError: it is quantized in a way that is not read.
    """
    marks = {"fp4": f"{name}.quant_state.bitsandbytes__fp4", "int8": f"{name.removesuffix('weight')}SCB"}
    for found, mark in marks.items():
        if mark in directory:
            raise _not_read(directory, mark, name, f"is stored in bitsandbytes' {found}", ", ".join(("dense", *KINDS)))
    description, state = f"{name}{DESCRIPTION}", directory.description(name)
    if state is None:
        return None
    nested = {kind.described.get("nested_blocksize"): kind for kind in KINDS.values()}
    for key, read in {"quant_type": ("nf4",), "blocksize": (BLOCK,), "nested_blocksize": tuple(nested)}.items():
        if (value := state.get(key)) not in read:
            raise _not_read(
                directory, description, name, f"has {key} {value}", " and ".join(str(one or "none") for one in read)
            )
    kind = nested[state.get("nested_blocksize")]
    shape: Any = state.get("shape")
    numbers: dict[str, Any] = {part: state.get(declared.key) for part, declared in kind.parts.items() if declared.key}
    sizes = [*shape, *numbers.values()] if isinstance(shape, list) and len(shape) == 2 else [None]
    if not all(isinstance(size, int | float) for size in sizes):
        said = "".join(f" and {part} {number}" for part, number in numbers.items())
        raise UserError(f"{directory.path}: {description} gives shape {shape}{said}; two sizes and a number fit")
    return Stored(kind, (shape[0], shape[1]), numbers)


def read_packed(directory: ModelDirectory, name: str) -> QuantizedWeight:
    """A packed weight as it is on disk, its arrays in numpy.

    Raises:
        UserError: it is of a kind that is not read, or a part of it is missing or of another size than its shape needs.
    """
    found = stored(directory, name)
    if found is None:
        raise UserError(f"{directory.path}: {name} is not packed; a weight with {name}{DESCRIPTION} beside it was expected")
    for suffix, table in found.kind.tables.items():
        if not np.array_equal(directory.read(f"{name}{suffix}"), table):
            raise UserError(f"{directory.path}: {name}{suffix} is not bitsandbytes' own table; only that one is read")
    shapes = found.kind.shapes(*found.shape)

    def part(key: str) -> np.ndarray | np.generic:
        declared, suffix = getattr(shapes, key), found.kind.parts[key].suffix
        if suffix is None:
            return declared.dtype.type(found.numbers[key])
        held = np.ascontiguousarray(directory.read(f"{name}{suffix}"))
        expected = declared.size * declared.dtype.itemsize
        if held.nbytes != expected:
            needed = f"a weight of shape {list(found.shape)} needs {expected}"
            raise UserError(f"{directory.path}: {name}{suffix} has {held.nbytes} bytes; {needed}")
        return held.reshape(-1).view(declared.dtype).reshape(declared.shape)

    return found.kind(**{key: part(key) for key in found.kind.parts})


def packed_parts(name: str, weight: QuantizedWeight, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one weight as ``save_pretrained`` stores them, byte for byte.

    Args:
        name: Of the dense weight.
        weight: Its parts.
        dtype: Type the dense weight had, to which bitsandbytes dequantizes it.
    """
    arrays = {part: np.asarray(getattr(weight, part)) for part in weight.parts}
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": np.dtype(dtype).name, "shape": list(weight.shape)}
    state |= weight.described
    for part, declared in weight.parts.items():
        if declared.suffix is None:
            state[declared.key] = float(arrays[part])
        else:
            yield f"{name}{declared.suffix}", arrays[part].reshape((-1,) if declared.suffix else (-1, 1))
    yield from ((f"{name}{suffix}", table) for suffix, table in weight.tables.items())
    yield f"{name}{DESCRIPTION}", np.frombuffer(json.dumps(state).encode(), np.uint8)


def packed_config(config: Mapping[str, Any], quantization: Quantization, dtype: Any) -> dict[str, Any]:
    """``config.json`` of a model whose linear layers are packed, from that of the dense model: what transformers writes."""
    name = np.dtype(dtype).name
    return {
        **config,
        "torch_dtype" if "torch_dtype" in config else "dtype": name,
        "quantization_config": {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": name,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": PACKINGS[quantization].double,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": None,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        },
    }


def _not_read(directory: ModelDirectory, tensor: str, name: str, found: str, read: str) -> UserError:
    return UserError(f"{directory.file(tensor)}: {name} {found}; {read} can be read")
