"""How the linear layers' weights can be held, as far as those have to know who hold none.

The arrays of a packed weight, what is computed with them and their names on disk are
:mod:`jax_medllm.model.quantized_weight`'s; the reference engine has bitsandbytes for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medllm.errors import UserError

Packed = Literal["nf4", "nf4-single"]
Quantization = Literal["none", Packed]
"""The settings.

- ``none``: in the model's type.
- ``nf4``: 4-bit NormalFloat, its scales quantized too (QLoRA; bitsandbytes' ``bnb_4bit_use_double_quant``): 4.13 bits a weight.
- ``nf4-single``: the same codes with scales in fp32, bitsandbytes' own default: 4.5 bits a weight.

A folder that holds 4 bits already is opened as the kind it has.
"""

BLOCK = 64
"""Weights that share a scale. Other sizes are not read."""
NESTED_BLOCK = 256
"""Scales that share one in turn, where they are quantized too."""
DESCRIPTION = ".quant_state.bitsandbytes__nf4"
"""What follows a weight's name in that of the tensor in which bitsandbytes describes it, in JSON."""


@dataclass(frozen=True)
class Packing:
    """4-bit NormalFloat as bitsandbytes stores it: a code for each weight, a scale for each block of them.

    Attributes:
        double: The scales are 8-bit codes in turn (double quantization), not fp32.
    """

    double: bool

    def bytes_of(self, size: int) -> float:
        """Bytes of a matrix of ``size`` weights: codes, scales and, of double quantization, the scales' mean."""
        scale, mean = (1 + 4 / NESTED_BLOCK, 4) if self.double else (4, 0)
        return size * (1 / 2 + scale / BLOCK) + mean


PACKINGS: Mapping[str, Packing] = {"nf4": Packing(double=True), "nf4-single": Packing(double=False)}
"""The kinds that are read, written and trained on."""


def packing_name(double: bool) -> str:
    """The kind with or without double quantization."""
    return next(name for name, one in PACKINGS.items() if one.double == double)


_READ: Mapping[str, tuple[Any, ...] | None] = {
    "quant_method": ("bitsandbytes",),
    "load_in_4bit": (True,),
    "load_in_8bit": (False,),
    "_load_in_4bit": None,
    "_load_in_8bit": None,
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_use_double_quant": None,
    "bnb_4bit_compute_dtype": None,
    "bnb_4bit_quant_storage": None,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": None,
    "llm_int8_has_fp16_weight": None,
    "llm_int8_threshold": None,
}
"""The fields of a ``quantization_config`` and the values that are read. None: any. The computation's type is the setting
``--model.dtype`` in place of ``bnb_4bit_compute_dtype``. The type that bytes are seen as (``bnb_4bit_quant_storage``) changes
no byte. Whether scales are quantized too is said by each weight's own description, which layers are dense by
:func:`stays_dense`. The rest is of 8 bits alone, or repeats another field."""
_DEFAULTS = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False, "bnb_4bit_quant_type": "fp4"}


def check_stored(config: Mapping[str, Any], file: Path) -> None:
    """Look at what a model's ``config.json`` says of a quantization.

    Args:
        config: The contents.
        file: Where they are from, for messages.

    Raises:
        UserError: it is of a kind that is not read, or a field has a value that is not.
    """
    stored = config.get("quantization_config")
    if not stored:
        return
    if not isinstance(stored, Mapping):
        raise UserError(f"{file}: quantization_config is {stored!r}; an object was expected")
    said = {**_DEFAULTS, **stored}
    kinds = ", ".join(PACKINGS)
    if said["load_in_8bit"] or (said["load_in_4bit"] and said["bnb_4bit_quant_type"] != "nf4"):
        kind = "int8" if said["load_in_8bit"] else said["bnb_4bit_quant_type"]
        raise UserError(f"{file}: the weights are bitsandbytes' {kind}; dense weights and {kinds} are read")
    for key, value in said.items():
        if key not in _READ or ((read := _READ[key]) is not None and value not in read):
            raise UserError(
                f"{file}: quantization_config has {key} {value!r}; dense weights and bitsandbytes' {kinds} are read"
            )
    skipped = said.get("llm_int8_skip_modules")
    try:
        readable = skipped is None or (isinstance(skipped, list) and all(re.compile(name) for name in skipped))
    except (TypeError, re.error):
        readable = False
    if not readable:
        raise UserError(f"{file}: llm_int8_skip_modules is {skipped!r}; a list of modules was expected")


def stays_dense(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a 4-bit folder's ``config.json`` leaves a linear layer dense.

    The rule of transformers' ``should_convert_module``: a name in ``llm_int8_skip_modules`` is, as a regular expression, the
    beginning of the module's up to a dot, or it is the module's end.

    Args:
        module: Its name.
        config: The contents.
    """
    names = (config.get("quantization_config") or {}).get("llm_int8_skip_modules") or ()
    return any(re.match(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(name) for name in names)
