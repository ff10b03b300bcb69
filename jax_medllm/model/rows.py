"""Rows of prompts with their responses, and the few lengths they are padded to.

A problem is one row, its responses laid end to end behind the prompt they share, and only the row as a whole is padded::

    prompt p q r, responses a b · and c ·          · · p q   r a b   r c
                                        segments   0 0 1 1   2 2 2   3 3
                                        positions  0 0 0 1   2 3 4   2 3
                                        targets              a b ·   c ·

Every response starts from a copy of the prompt's last token, in place of its own last token, which predicts nothing: each
position of a response then has the target beside it, and the row is no longer than the tokens it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jax_medllm.mesh.pytree import Leaf, pytree

MULTIPLE = 32
"""Padded lengths are multiples of this."""


@pytree
@dataclass(frozen=True)
class ResponseBatch:
    """n prompts with their responses, one row each, padded on the left.

    Attributes:
        tokens: The prompt but for its last token, then each response behind a copy of that one, without its own last token.
        segment_ids: 1 for the prompt; 2, 3, … for the responses, which see it too; 0 for padding.
        positions: Rotary positions; every response goes on from the prompt.
        targets: The response token that each position of a response predicts; 0 elsewhere.
    """

    tokens: Int[Leaf, "n s"]
    segment_ids: Int[Leaf, "n s"]
    positions: Int[Leaf, "n s"]
    targets: Int[Leaf, "n s"]

    @property
    def responses(self) -> Int[Leaf, "n s"]:
        """Which response of its row a target belongs to, from 0; negative where there is no target."""
        return self.segment_ids - 2

    @property
    def offsets(self) -> Int[Leaf, "n s"]:
        """Place of a target in its response, from 0."""
        return self.positions - (self.segment_ids == 1).sum(-1, keepdims=True)


def buckets(sizes: Sequence[int], *, multiple: int = MULTIPLE, at_most: int = 16, padding: float = 0.0) -> tuple[int, ...]:
    """The fewest padded sizes that cover ``sizes`` with at most this share of padding.

    Where ``at_most`` sizes do not reach it, those with the least padding: the best partition of the ascending sizes into
    runs, each padded to its largest, by dynamic programming over the number of runs.

    Args:
        sizes: At least one.
        multiple: Every padded size is a multiple of this.
        at_most: Bound on the number of padded sizes, each of which is a compilation.
        padding: Share of padding at which another size is not worth its compilation.
    """
    rounded = -(-np.maximum(1, np.asarray(sizes)) // multiple) * multiple
    menu, counts = np.unique(rounded, return_counts=True)
    before = np.r_[0, np.cumsum(counts)]
    enough = max(int(rounded.sum()), sum(sizes) / (1 - padding))
    least = np.r_[0, np.full(len(menu), np.inf)]  # padded tokens of the first e sizes, in as many runs as choices has rows
    choices: list[list[int]] = []
    while len(choices) < at_most and least[-1] > enough:
        totals = [least[:end] + menu[end - 1] * (before[end] - before[:end]) for end in range(1, len(menu) + 1)]
        choices.append([0, *(int(total.argmin()) for total in totals)])
        least = np.r_[0, [total.min() for total in totals]]
    kept, end = [], len(menu)
    for starts in reversed(choices):
        if end:
            kept.append(int(menu[end - 1]))
            end = starts[end]
    return tuple(reversed(kept))


def round_up(size: int, choices: Sequence[int]) -> int:
    """The smallest of the ascending ``choices`` that is not below ``size``."""
    return next(choice for choice in choices if choice >= size)


def row_size(prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> int:
    """Tokens in the row of a prompt and its responses."""
    return len(prompt) - 1 + sum(map(len, responses))


def response_rows(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], rows: int, length: int) -> ResponseBatch:
    """Groups (prompt, responses) as ``rows`` rows of ``length`` tokens; those without a group are all padding."""
    tokens, segment_ids, positions, targets = (np.zeros((rows, length), np.int32) for _ in range(4))
    for row, (prompt, responses) in enumerate(groups):
        end = length - sum(map(len, responses))
        known = len(prompt) - 1
        tokens[row, end - known : end] = prompt[:-1]
        segment_ids[row, end - known : end] = 1
        positions[row, end - known : end] = np.arange(known)
        for number, response in enumerate(responses):
            start, end = end, end + len(response)
            tokens[row, start:end] = (prompt[-1], *response)[:-1]
            segment_ids[row, start:end] = 2 + number
            positions[row, start:end] = np.arange(known, known + len(response))
            targets[row, start:end] = response
    return ResponseBatch(tokens, segment_ids, positions, targets)
