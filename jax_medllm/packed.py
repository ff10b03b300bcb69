"""NF4 weights in the files bitsandbytes writes: the tensors of a ``Linear4bit`` in a state dict.

- ``NAME``: uint8 [out · in / 2, 1]; where ``bnb_4bit_quant_storage`` is another type, the same bytes seen as that type
- ``NAME.absmax``: uint8 [blocks]; ``NAME.nested_absmax``: fp32 [nested blocks]
- ``NAME.quant_map``, ``NAME.nested_quant_map``: fp32 [16] and [256], the two tables, the same in every weight
- ``NAME.quant_state.bitsandbytes__nf4``: uint8, JSON of the kind, block sizes, offset, and the dense weight's type and shape
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jax_medllm.nf4 import BLOCK, CODES, NESTED_BLOCK, NF4Weight, dynamic_map, weight_shapes
from medllm.errors import UserError
from medllm.model_directory import ModelDirectory

PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
_STATE = PARTS[-1]


def is_packed(directory: ModelDirectory, name: str) -> bool:
    """Whether a weight is stored in NF4.

    Raises:
        UserError: it is quantized in a way that is not read.
    """
    marks = {"fp4": f"{name}.quant_state.bitsandbytes__fp4", "int8": f"{name.removesuffix('weight')}SCB"}
    for kind, mark in marks.items():
        if mark in directory:
            raise UserError(f"{directory.path}: {name} is stored in bitsandbytes' {kind}; only dense and nf4 weights are read")
    return f"{name}{_STATE}" in directory


def packed_shape(directory: ModelDirectory, name: str) -> tuple[int, ...]:
    """Shape [out, in] of the weight a 4-bit tensor stands for.

    Raises:
        UserError: it is of a kind that is not read.
    """
    return tuple(_state(directory, name)["shape"])


def read_packed(directory: ModelDirectory, name: str) -> NF4Weight:
    """A 4-bit weight as it is on disk, its arrays in numpy.

    Raises:
        UserError: it is of a kind that is not read, or a part of it is missing or of another size than its shape needs.
    """
    state = _state(directory, name)
    shapes = weight_shapes(*state["shape"])
    for suffix, table in ((".quant_map", CODES), (".nested_quant_map", dynamic_map())):
        if not np.array_equal(directory.read(f"{name}{suffix}"), table):
            raise UserError(f"{directory.path}: {name}{suffix} is not bitsandbytes' own table; only that one is read")

    def part(suffix: str, shape: Any) -> np.ndarray:
        stored = np.ascontiguousarray(directory.read(f"{name}{suffix}"))
        expected = shape.size * shape.dtype.itemsize
        if stored.nbytes != expected:
            needed = f"a weight of shape {state['shape']} needs {expected}"
            raise UserError(f"{directory.path}: {name}{suffix} has {stored.nbytes} bytes; {needed}")
        return stored.reshape(-1).view(shape.dtype).reshape(shape.shape)

    return NF4Weight(
        packed=part("", shapes.packed),
        absmax_codes=part(".absmax", shapes.absmax_codes),
        nested_absmax=part(".nested_absmax", shapes.nested_absmax),
        offset=np.float32(state["nested_offset"]),
    )


def packed_parts(name: str, weight: NF4Weight, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one weight as ``save_pretrained`` stores them, byte for byte.

    Args:
        name: Of the dense weight.
        weight: Its parts.
        dtype: Type the dense weight had, to which bitsandbytes dequantizes it.
    """
    packed, absmax_codes, nested_absmax = (
        np.asarray(part) for part in (weight.packed, weight.absmax_codes, weight.nested_absmax)
    )
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": np.dtype(dtype).name,
        "shape": [packed.shape[0], 2 * packed.shape[1]],
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": float(np.asarray(weight.offset)),
    }
    described = np.frombuffer(json.dumps(state).encode(), np.uint8)
    stored = (absmax_codes.reshape(-1), CODES, nested_absmax, dynamic_map(), described)
    yield name, packed.reshape(-1, 1)
    yield from ((f"{name}{suffix}", value) for suffix, value in zip(PARTS, stored, strict=True))


def packed_config(config: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """``config.json`` of a model whose linear layers are NF4, from that of the dense model: what transformers writes."""
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
            "bnb_4bit_use_double_quant": True,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": None,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        },
    }


def _state(directory: ModelDirectory, name: str) -> dict[str, Any]:
    """bitsandbytes' description of a 4-bit weight, checked."""
    try:
        state = json.loads(directory.read(f"{name}{_STATE}").tobytes())
        found = {key: state.get(key) for key in ("quant_type", "blocksize", "nested_blocksize")}
        shape, offset = state.get("shape"), state.get("nested_offset")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{directory.path}: {name}{_STATE} is not the JSON bitsandbytes writes; copy it again") from error
    if found["nested_blocksize"] is None:
        raise UserError(
            f"{directory.path}: {name} is nf4 without double quantization; save it with bnb_4bit_use_double_quant=True, "
            "or open the dense model"
        )
    for key, expected in {"quant_type": "nf4", "blocksize": BLOCK, "nested_blocksize": NESTED_BLOCK}.items():
        if found[key] != expected:
            raise UserError(f"{directory.path}: {name} has {key} {found[key]}; only {expected} is read")
    if not (isinstance(shape, list) and len(shape) == 2 and isinstance(offset, int | float)):
        raise UserError(f"{directory.path}: {name}{_STATE} gives shape {shape} and offset {offset}; two sizes and a number fit")
    return state
