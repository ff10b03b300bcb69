"""The rows of tokens that both stacks read: one whole, one packed, one padded, and more whole ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Token ids, segments (0: padding) and rotary positions, [rows, tokens] each."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray

    @property
    def real(self) -> np.ndarray:
        """True where a token is not padding."""
        return self.segment_ids != 0

    @property
    def predicted(self) -> np.ndarray:
        """True where the next token belongs to the same document: [rows, tokens - 1]."""
        return (self.segment_ids[:, 1:] == self.segment_ids[:, :-1]) & self.real[:, 1:]


def make_rows(ids: np.ndarray, rows: int, tokens: int) -> Rows:
    """Lay ``rows * tokens`` ids out, at least three rows of them."""
    lengths = [[tokens], [tokens // 2, tokens // 4, tokens - tokens // 2 - tokens // 4], [tokens // 2 + 1]]
    segment_ids, positions = np.zeros((rows, tokens), np.int32), np.zeros((rows, tokens), np.int32)
    for row in range(rows):
        start = 0
        for number, length in enumerate(lengths[row] if row < len(lengths) else [tokens]):
            segment_ids[row, start : start + length] = number + 1
            positions[row, start : start + length] = np.arange(length)
            start += length
    return Rows(ids.reshape(rows, tokens).astype(np.int32), segment_ids, positions)
