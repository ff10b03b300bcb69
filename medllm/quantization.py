"""How the linear layers' weights can be held, as far as those have to know who hold none.

The arrays of a packed weight, what is computed with them and their names on disk are
:mod:`jax_medllm.model.quantized_weight`'s; the reference engine has bitsandbytes for them.
"""

from __future__ import annotations

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


def check_stored(folder: Path, config: Mapping[str, Any], quantization: Quantization) -> None:
    """Hold what a model folder's ``config.json`` says of a bitsandbytes model against the setting it is opened with.

    Raises:
        UserError: it is of a kind that is not read, or of another one than ``quantization``.
    """
    stored, file = config.get("quantization_config"), folder / "config.json"
    if not isinstance(stored, Mapping) or not (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        return
    kind = "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise UserError(f"{file}: the weights are bitsandbytes' {kind}; dense weights and {', '.join(PACKINGS)} are read")
    packing = Packing(bool(stored.get("bnb_4bit_use_double_quant")))
    name = next(name for name, one in PACKINGS.items() if one == packing)
    if name != quantization:
        raise UserError(f"{file}: the weights are stored as {name}; open this model with --model.quantization {name}")
