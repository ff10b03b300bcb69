"""How the linear layers' weights can be held, as far as those have to know who hold none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Packed = Literal["nf4"]
Quantization = Literal["none", Packed]
"""The settings.

- ``none``: in the model's type.
- ``nf4``: 4-bit NormalFloat, its scales quantized too (QLoRA; bitsandbytes' ``bnb_4bit_use_double_quant``): 4.13 bits a weight.
"""

BLOCK = 64
"""Weights that share a scale."""
NESTED_BLOCK = 256
"""Scales that share one in turn."""


@dataclass(frozen=True)
class Packing:
    """4-bit NormalFloat as bitsandbytes stores it: a code for each weight, a scale for each block of them."""

    def bytes_of(self, size: int) -> float:
        """Bytes of a matrix of ``size`` weights: codes, scales and the scales' mean."""
        return size * (1 / 2 + (1 + 4 / NESTED_BLOCK) / BLOCK) + 4


PACKINGS: Mapping[str, Packing] = {"nf4": Packing()}
"""The kinds that are read, written and trained on."""
