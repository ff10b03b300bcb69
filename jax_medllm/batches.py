"""The order of the data, and the arrays of each optimizer step.

A plan says which units make up which step: it depends on the seed, the epoch and the units' sizes alone, so that a resumed
run goes on at step n without replaying the first n. A step is a list of micro-batches, each of a shape of its own. Lengths
come from a short menu, because every new shape is a new compilation.

A problem is one row, its responses laid end to end behind the prompt they share, and only the row as a whole is padded::

    prompt p q r, responses a b · and c ·          · · p q   r a b   r c
                                        segments   0 0 1 1   2 2 2   3 3
                                        positions  0 0 0 1   2 3 4   2 3
                                        targets              a b ·   c ·

Every response starts from a copy of the prompt's last token, in place of its own last token, which predicts nothing: each
position of a response then has the target beside it, and the row is no longer than the tokens it holds.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from medllm.config import TrainingConfig
from medllm.corpus.packing import PackedRows, target_mask
from medllm.preferences.tokenization import TokenizedGroup

T = TypeVar("T")

MULTIPLE = 32
"""Padded lengths are multiples of this."""
_WINDOW = 64
"""Micro-batches whose units are sorted by size together."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CptBatch:
    """Packed rows. ``share`` is one over the training targets of the whole optimizer step."""

    tokens: Int[Array, "b s"]
    segment_ids: Int[Array, "b s"]
    positions: Int[Array, "b s"]
    share: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResponseBatch:
    """n prompts with their responses, one row each, padded on the left.

    Attributes:
        tokens: The prompt but for its last token, then each response behind a copy of that one, without its own last token.
        segment_ids: 1 for the prompt; 2, 3, … for the responses, which see it too; 0 for padding.
        positions: Rotary positions; every response goes on from the prompt.
        targets: The response token that each position of a response predicts; 0 elsewhere.
    """

    tokens: Int[Array, "n s"]
    segment_ids: Int[Array, "n s"]
    positions: Int[Array, "n s"]
    targets: Int[Array, "n s"]

    @property
    def responses(self) -> Int[Array, "n s"]:
        """Which response of its row a target belongs to, from 0; negative where there is no target."""
        return self.segment_ids - 2

    @property
    def offsets(self) -> Int[Array, "n s"]:
        """Place of a target in its response, from 0."""
        return self.positions - (self.segment_ids == 1).sum(-1, keepdims=True)


@jax.tree_util.register_dataclass
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
    pairs: Int[Array, "n k 2"]
    starts: Int[Array, "n k"]
    weights: Float[Array, "n k"]
    reference: Float[Array, "n k 2"] | None = None


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

    def largest(self) -> CptBatch:
        """The first: all rows are of one length, and only the last of an epoch are fewer."""
        return self.batches(self.steps[0])[0]


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
        self._reference: Sequence[Float[np.ndarray, "pairs 2"]] | None = None
        self._sizes = [row_size(group.prompt, group.responses) for group in self.groups]
        self._pairs = max(len(group.pairs) for group in self.groups)
        self.steps = plan_steps(len(self.groups), config, size_of=self._sizes.__getitem__)
        self._lengths = buckets(list(map(self._longest, self._micro_batches())), padding=self._PADDING)

    def with_reference(self, sums: Sequence[Float[np.ndarray, "pairs 2"]]) -> PreferenceData:
        """The same data with summed log-probabilities under the reference, of each group, in its batches."""
        data = copy.copy(self)
        data._reference = sums
        return data

    @property
    def padding(self) -> float:
        """Fraction of all positions of the run that hold padding."""
        tokens = sum(self._sizes[unit] for micro in self._micro_batches() for unit in micro)
        return 1 - tokens / sum(len(micro) * self._length(micro) for micro in self._micro_batches())

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
