"""Micro-batches as the papers' formulas see them: rows, the tokens that count, and the terms of a loss.

The formulas are written here once more, in float64 and by pairs, and shared with neither engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from medllm.config import PreferenceLoss
from medllm.corpus.packing import PackedRows
from medllm_parity.preference_formulas import FORMULAS, Compared, Terms
from medllm_parity.rows import Rows

PairTokens = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Token ids of a prompt, of the preferred response and of the other."""


class MicroBatch(Protocol):
    """A part of an optimizer step.

    Attributes:
        rows: Its tokens.
        counted: Where the next token's log-probability is read, [rows, tokens - 1].
    """

    @property
    def rows(self) -> Rows: ...

    @property
    def counted(self) -> np.ndarray: ...

    def terms(self, policy: torch.Tensor, reference: torch.Tensor | None) -> Terms:
        """What is logged, ``loss`` among it, of the log-probabilities where they count; adds up over a step."""
        ...


@dataclass(frozen=True)
class CptMicroBatch:
    """Packed rows; ``targets`` are those of the whole step."""

    rows: Rows
    targets: int

    @property
    def counted(self) -> np.ndarray:
        """See :class:`MicroBatch`."""
        return self.rows.predicted

    def terms(self, policy: torch.Tensor, reference: torch.Tensor | None) -> Terms:
        """Its share of the step's mean negative log-likelihood."""
        del reference
        return {"loss": -policy.sum() / self.targets}


def cpt_step(rows: PackedRows, micro_batches: Sequence[Sequence[int]]) -> list[MicroBatch]:
    """The micro-batches of a step, given the numbers of their rows."""
    picked = [list(numbers) for numbers in micro_batches]
    parts = [Rows(rows.tokens[some], rows.segment_ids[some], rows.positions[some]) for some in picked]
    targets = sum(int(part.predicted.sum()) for part in parts)
    return [CptMicroBatch(part, targets) for part in parts]


@dataclass(frozen=True)
class PreferenceMicroBatch:
    """Pairs, each response behind a prompt of its own: rows 2i and 2i + 1 are pair i's preferred and other response.

    ``weights`` are the pairs' shares of the step, ``owners`` the row of each token that counts.
    """

    rows: Rows
    counted: np.ndarray
    owners: torch.Tensor
    weights: torch.Tensor
    loss: PreferenceLoss

    def terms(self, policy: torch.Tensor, reference: torch.Tensor | None) -> Terms:
        """The terms of the loss (:mod:`medllm_parity.preference_formulas`)."""
        assert reference is not None
        sums = self.sums(policy)
        gains, lengths = sums - self.sums(reference), self.sums(torch.ones_like(policy))
        return FORMULAS[self.loss.name](Compared(sums, gains, lengths, self.weights, self.loss))

    def sums(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Summed over each response, [pairs, 2]."""
        zeros = torch.zeros(len(self.rows.tokens), dtype=logprobs.dtype)
        return zeros.index_add(0, self.owners, logprobs).reshape(-1, 2)


def preference_micro_batch(pairs: Sequence[PairTokens], weights: Sequence[float], loss: PreferenceLoss) -> MicroBatch:
    """Pairs as rows, padded at their ends."""
    texts = [(list(prompt), list(response)) for prompt, *responses in pairs for response in responses]
    length = max(len(prompt) + len(response) for prompt, response in texts)
    tokens, segments = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), np.int32)
    counted = np.zeros((len(texts), length - 1), bool)
    for row, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        tokens[row, :end], segments[row, :end] = prompt + response, 1
        counted[row, len(prompt) - 1 : end - 1] = True
    rows = Rows(tokens, segments, np.tile(np.arange(length, dtype=np.int32), (len(texts), 1)))
    owners = torch.from_numpy(np.nonzero(counted)[0])
    return PreferenceMicroBatch(rows, counted, owners, torch.tensor(weights, dtype=torch.float64), loss)
