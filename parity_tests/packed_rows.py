"""Packed rows of random tokens, as both stacks are given them: (tokens, segment ids, positions), each [rows, length]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parity_tests.tiny_models import VOCAB

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]

# One document; three packed documents with padding after them; a short one with padding.
DOCUMENTS = ((14,), (5, 3, 4), (6,))


def rows(seed: int = 0, documents: Sequence[Sequence[int]] = DOCUMENTS, *, until: int | None = None) -> Rows:
    """Rows with documents of these lengths.

    Args:
        seed: Seed of the tokens.
        documents: Lengths of the documents of each row.
        until: Spread the positions of each document over 0 … ``until``, gaps and all, instead of counting.
    """
    rng = np.random.default_rng(seed)
    shape = (len(documents), max(sum(lengths) for lengths in documents))
    tokens = rng.integers(0, VOCAB, shape)
    segment_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, lengths in enumerate(documents):
        start = 0
        for number, length in enumerate(lengths):
            here = slice(start, start + length)
            segment_ids[row, here] = number + 1
            counted = np.arange(length)
            positions[row, here] = counted if until is None else np.sort(rng.choice(until, length, replace=False))
            start += length
    return tokens, segment_ids, positions


def target_mask(segment_ids: np.ndarray) -> np.ndarray:
    """True [b, s-1] where the *next* token belongs to the same document."""
    return (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
