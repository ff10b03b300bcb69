"""The order of the data, and the arrays of each optimizer step.

A plan says which units make up which step: it depends on the seed, the epoch and the units' sizes alone, so that a resumed
run goes on at step n without replaying the first n. A step is a list of micro-batches, each of a shape of its own. Lengths
come from a short menu, because every new shape is a new compilation.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Int

from jax_medllm.mesh.pytree import Leaf, pytree
from jax_medllm.model.rows import ResponseBatch, buckets, response_rows, round_up, row_size
from medllm.config import TrainingConfig
from medllm.corpus.packing import PackedRows, target_mask
from medllm.preferences.tokenization import TokenizedGroup

T = TypeVar("T")

_WINDOW = 64
"""Micro-batches whose units are sorted by size together."""


@pytree
@dataclass(frozen=True)
class CptBatch:
    """Packed rows. ``share`` is one over the training targets of the whole optimizer step."""

    tokens: Int[Leaf, "b s"]
    segment_ids: Int[Leaf, "b s"]
    positions: Int[Leaf, "b s"]
    share: Float[Leaf, ""]


@pytree
@dataclass(frozen=True)
class PreferenceBatch:
    """Responses, and the pairs among those of each problem.

    Attributes:
        responses: The problems of the batch with all their responses.
        pairs: (chosen, rejected) as numbers of the row's responses.
        starts: Leading response tokens that a pair counts to its prompt.
        weights: One over the pairs of the whole optimizer step; 0 for padding.
        reference: Summed log-probabilities of both responses under the reference, where they are known beforehand.
    """

    responses: ResponseBatch
    pairs: Int[Leaf, "n k 2"]
    starts: Int[Leaf, "n k"]
    weights: Float[Leaf, "n k"]
    reference: Float[Leaf, "n k 2"] | None = None


class Step(NamedTuple):
    """Micro-batches of one optimizer step: an epoch, and indices of units for each micro-batch."""

    epoch: int
    micro_batches: tuple[tuple[int, ...], ...]


def plan_steps(units: int, config: TrainingConfig, *, size_of: Callable[[int], int] | None = None) -> list[Step]:
    """Every optimizer step of a run.

    Each epoch is a fresh permutation seeded by ``seed + epoch``. With ``size_of``, units are sorted by size inside windows
    of that permutation, cut into micro-batches, and these shuffled: the units of a micro-batch are alike and need little
    padding, those of a step are not. The last step of an epoch may hold fewer micro-batches, and the last of those fewer
    units; no step spans two epochs.

    Args:
        units: Number of units (rows, or problems).
        config: Batch size, accumulation, epochs, seed.
        size_of: Sort key of a unit.
    """
    size, accumulation = config.batch_size, config.accumulation
    window_size = size * accumulation * -(-_WINDOW // accumulation)
    steps = []
    for epoch in range(config.epochs):
        random = np.random.default_rng(config.seed + epoch)
        order = random.permutation(units).tolist()
        micro_batches = list(_pieces(order, size))
        if size_of is not None:
            micro_batches = []
            for window in _pieces(order, window_size):
                # The units left over make the last, short micro-batch; set aside before sorting, they are of any size.
                whole = len(window) - len(window) % size
                alike = list(_pieces(sorted(window[:whole], key=size_of), size))
                micro_batches += [alike[i] for i in random.permutation(len(alike))]
                micro_batches += [window[whole:]] if whole < len(window) else []
        steps += [Step(epoch, tuple(tuple(micro) for micro in some)) for some in _pieces(micro_batches, accumulation)]
    return steps


def _pieces(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def digest(*parts: bytes) -> str:
    """Tells one content from another: 16 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part)
    return state.hexdigest()


class TrainingData(Protocol):
    """What a stage trains on.

    Attributes:
        steps: The plan of the whole run.
        unit: What the rate counts, ``tokens`` or ``pairs``.
    """

    @property
    def steps(self) -> Sequence[Step]: ...

    @property
    def unit(self) -> str: ...

    @property
    def padding(self) -> float:
        """Fraction of all positions of the run that hold padding."""
        ...

    def batches(self, step: Step) -> Sequence[Any]:
        """Arrays of the micro-batches of one step, on the host. Called from several threads."""
        ...

    def units(self, step: Step) -> int:
        """How many units a step has."""
        ...

    def named(self, units: Sequence[int]) -> str:
        """What a user knows these units by."""
        ...

    def largest(self) -> Any:
        """A micro-batch with the most positions."""
        ...


def cpt_step(rows: PackedRows, step: Step) -> list[CptBatch]:
    """Arrays ``[rows, length]`` of the micro-batches of one step."""
    indices = [list(micro) for micro in step.micro_batches]
    targets = sum(int(target_mask(rows.segment_ids[index]).sum()) for index in indices)
    share = np.asarray(1.0 / max(1, targets))
    return [CptBatch(rows.tokens[index], rows.segment_ids[index], rows.positions[index], share) for index in indices]


@dataclass(frozen=True)
class CptData:
    """Packed rows, and the steps that take them."""

    rows: PackedRows
    steps: Sequence[Step]
    unit = "tokens"

    @property
    def padding(self) -> float:
        """See :class:`TrainingData`."""
        return self.rows.padding

    def batches(self, step: Step) -> list[CptBatch]:
        """See :class:`TrainingData`."""
        return cpt_step(self.rows, step)

    def units(self, step: Step) -> int:
        """Tokens of a step, padding left out."""
        return int((self.rows.segment_ids[[row for micro in step.micro_batches for row in micro]] != 0).sum())

    def named(self, units: Sequence[int]) -> str:
        """Their documents."""
        return self.rows.named(units)

    def largest(self) -> CptBatch:
        """The first: all rows are of one length, and only the last of an epoch are fewer."""
        return self.batches(self.steps[0])[0]


def single_pairs(groups: Sequence[TokenizedGroup]) -> list[TokenizedGroup]:
    """Every pair as a group of its own (``PairConfig.unit = "pair"``), as TRL trains."""
    return [
        TokenizedGroup(
            problem_id=group.problem_id,
            prompt=prompt,
            responses=(chosen, rejected),
            ranks=(group.ranks[high], group.ranks[low]),
            pairs=((0, 1),),
            pair_starts=(0,),
        )
        for group in groups
        for (high, low), (prompt, chosen, rejected) in zip(group.pairs, group.pair_tokens(), strict=True)
    ]


class PreferenceData:
    """Tokenized groups, the plan over them, and the lengths their rows are padded to.

    Args:
        groups: The units.
        config: Batch size, accumulation, epochs and seed.
    """

    unit = "pairs"
    _PADDING = 0.08
    """Share of padding aimed at: the rows of a micro-batch are not of one length, which adds one or two hundredths to it."""

    def __init__(self, groups: Sequence[TokenizedGroup], config: TrainingConfig):
        self.groups = list(groups)
        self._reference: Sequence[Float[np.ndarray, "_ 2"]] | None = None
        self._sizes = [row_size(group.prompt, group.responses) for group in self.groups]
        self._pairs = max(len(group.pairs) for group in self.groups)
        self.steps = plan_steps(len(self.groups), config, size_of=self._sizes.__getitem__)
        self._lengths = buckets(list(map(self._longest, self._micro_batches())), padding=self._PADDING)

    def with_reference(self, sums: Sequence[Float[np.ndarray, "_ 2"]]) -> PreferenceData:
        """The same data with summed log-probabilities under the reference, of each group, in its batches."""
        data = copy.copy(self)
        data._reference = sums
        return data

    @property
    def padding(self) -> float:
        """Fraction of all positions of the run that hold padding."""
        tokens = sum(self._sizes[unit] for micro in self._micro_batches() for unit in micro)
        return 1 - tokens / sum(len(micro) * self._length(micro) for micro in self._micro_batches())

    def named(self, units: Sequence[int]) -> str:
        """Their problems."""
        return f"problems {', '.join(self.groups[unit].problem_id for unit in units)}"

    def largest(self) -> PreferenceBatch:
        """The micro-batch with the most positions."""
        return self._micro_batch(max(self._micro_batches(), key=lambda micro: len(micro) * self._length(micro)), 1.0)

    def units(self, step: Step) -> int:
        """Pairs in a step."""
        return sum(len(self.groups[unit].pairs) for micro in step.micro_batches for unit in micro)

    def batches(self, step: Step) -> list[PreferenceBatch]:
        """See :class:`TrainingData`."""
        weight = 1.0 / self.units(step)
        return [self._micro_batch(micro, weight) for micro in step.micro_batches]

    def _micro_batches(self) -> Iterator[tuple[int, ...]]:
        return (micro for step in self.steps for micro in step.micro_batches)

    def _longest(self, units: Sequence[int]) -> int:
        return max(self._sizes[unit] for unit in units)

    def _length(self, units: Sequence[int]) -> int:
        return round_up(self._longest(units), self._lengths)

    def _micro_batch(self, units: Sequence[int], weight: float) -> PreferenceBatch:
        n, k = len(units), self._pairs
        groups = [self.groups[unit] for unit in units]
        pairs, starts = np.zeros((n, k, 2), np.int32), np.zeros((n, k), np.int32)
        weights, reference = np.zeros((n, k)), np.zeros((n, k, 2))
        for row, (unit, group) in enumerate(zip(units, groups, strict=True)):
            count = len(group.pairs)
            pairs[row, :count] = group.pairs
            starts[row, :count] = group.pair_starts
            weights[row, :count] = weight
            if self._reference is not None:
                reference[row, :count] = self._reference[unit]
        responses = response_rows([(group.prompt, group.responses) for group in groups], n, self._length(units))
        return PreferenceBatch(responses, pairs, starts, weights, reference if self._reference is not None else None)
