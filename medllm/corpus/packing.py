"""Documents → rows of equal length for continued pretraining."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int32
from numpy import ndarray


@dataclass(frozen=True)
class PackedRows:
    """Token rows of equal length.

    Attributes:
        tokens: Token ids; padding positions hold the pad token.
        segment_ids: 1, 2, 3 … for the documents of a row, 0 for padding. A position sees only its own segment.
        positions: Position inside the document; restarts at 0 with each segment.

    A position is a training target when its segment is not 0 and equals that of the position before it.
    """

    tokens: Int32[ndarray, "rows length"]
    segment_ids: Int32[ndarray, "rows length"]
    positions: Int32[ndarray, "rows length"]
