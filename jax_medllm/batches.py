"""The order of the data, and the arrays of each optimizer step.

A plan says which units make up which step: it depends on the seed, the epoch and the units' lengths alone, so that a
resumed run goes on at step n without replaying the first n. A step's arrays carry a leading axis of micro-batches, all of
one shape. Shapes come from a short list of buckets, because every new shape is a new compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from medllm.config import TrainingConfig
from medllm.corpus.packing import PackedRows
from medllm.preferences.tokenization import TokenizedGroup

_MULTIPLE = 64
_WINDOW_STEPS = 16


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
    """n prompts with c responses each, padded.

    Attributes:
        prompts: Prompt tokens, padded on the left: the last prompt token, which predicts the first response token, is in
            the last column.
        prompt_mask: 1 for prompt tokens.
        responses: Response tokens, padded on the right.
        response_mask: 1 for response tokens.
    """

    prompts: Int[Array, "n p"]
    prompt_mask: Int[Array, "n p"]
    responses: Int[Array, "n c t"]
    response_mask: Int[Array, "n c t"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreferenceBatch:
    """Responses, and the pairs among them.

    Attributes:
        responses: The problems of the batch with all their responses.
        pairs: (chosen, rejected) as indices into the n·c responses of the batch.
        starts: Leading response tokens that a pair counts to its prompt.
        weights: One over the pairs of the whole optimizer step; 0 for padding.
    """

    responses: ResponseBatch
    pairs: Int[Array, "k 2"]
    starts: Int[Array, "k"]
    weights: Float[Array, "k"]


class Step(NamedTuple):
    """Micro-batches of one optimizer step: an epoch, and indices of units for each micro-batch."""

    epoch: int
    micro_batches: tuple[tuple[int, ...], ...]


class PreferenceShape(NamedTuple):
    """Padded sizes of a unit: prompt, responses, response, pairs."""

    prompt: int
    responses: int
    response: int
    pairs: int


def plan_steps(units: int, config: TrainingConfig, *, size_of: Callable[[int], tuple[int, ...]] | None = None) -> list[Step]:
    """Every optimizer step of a run.

    Each epoch is a fresh permutation seeded by ``seed + epoch``. With ``size_of``, units are sorted by size inside windows
    of that permutation and the micro-batches of a window shuffled back, so that neighbours need little padding. The last
    step of an epoch may hold fewer micro-batches, and the last of those fewer units; no step spans two epochs.

    Args:
        units: Number of units (rows, or problems).
        config: Batch size, accumulation, epochs, seed.
        size_of: Sort key of a unit.
    """
    size, accumulation = config.batch_size, config.accumulation
    steps = []
    for epoch in range(config.epochs):
        random = np.random.default_rng(config.seed + epoch)
        order = random.permutation(units).tolist()
        chunks = list(_pieces(order, size * accumulation))
        if size_of is not None:
            chunks = []
            for window in _pieces(order, _WINDOW_STEPS * size * accumulation):
                # The units left over make the last, short step; set aside before sorting, they are no larger than others.
                whole = len(window) - len(window) % (size * accumulation)
                sorted_steps = list(_pieces(sorted(window[:whole], key=size_of), size * accumulation))
                chunks += [sorted_steps[i] for i in random.permutation(len(sorted_steps))]
                chunks += [window[whole:]] if whole < len(window) else []
        steps += [Step(epoch, tuple(tuple(micro) for micro in _pieces(chunk, size))) for chunk in chunks]
    return steps


def _pieces(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def target_mask(segment_ids: Int[Array, "b s"]) -> Int[Array, "b s-1"]:
    """True where the *next* position is a training target: same segment, and no padding."""
    return (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)


def cpt_step(rows: PackedRows, step: Step, config: TrainingConfig) -> CptBatch:
    """Arrays ``[micro-batches, batch_size, length]`` of one step; missing rows are all padding."""
    shape = (len(step.micro_batches), config.batch_size, rows.tokens.shape[1])
    tokens, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(3))
    for i, micro in enumerate(step.micro_batches):
        index = list(micro)
        tokens[i, : len(index)] = rows.tokens[index]
        segment_ids[i, : len(index)] = rows.segment_ids[index]
        positions[i, : len(index)] = rows.positions[index]
    targets = int(target_mask(segment_ids.reshape(-1, shape[-1])).sum())
    share = np.full(len(step.micro_batches), 1.0 / max(1, targets))
    return CptBatch(tokens, segment_ids, positions, share)


def buckets(sizes: Sequence[int], *, multiple: int = _MULTIPLE, at_most: int = 4) -> tuple[int, ...]:
    """Padded sizes that cover ``sizes``: their quantiles, rounded up to ``multiple``, no more than ``at_most`` of them."""
    ordered = np.sort(np.asarray(sizes))
    last = len(ordered) - 1
    quantiles = [int(ordered[-(-last * (i + 1) // at_most)]) for i in range(at_most)]
    return tuple(sorted({max(multiple, -(-size // multiple) * multiple) for size in quantiles}))


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


def pad_responses(
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], rows: int, prompt: int, count: int, response: int
) -> ResponseBatch:
    """Groups (prompt, responses) as arrays of ``rows`` prompts with ``count`` responses, padded to so many tokens."""
    prompts, responses = np.zeros((rows, prompt), np.int32), np.zeros((rows, count, response), np.int32)
    prompt_mask, response_mask = np.zeros_like(prompts), np.zeros_like(responses)
    for row, (prompt_ids, response_ids) in enumerate(groups):
        prompts[row, prompt - len(prompt_ids) :] = prompt_ids
        prompt_mask[row, prompt - len(prompt_ids) :] = 1
        for column, ids in enumerate(response_ids):
            responses[row, column, : len(ids)] = ids
            response_mask[row, column, : len(ids)] = 1
    return ResponseBatch(prompts, prompt_mask, responses, response_mask)


class PreferenceData:
    """Tokenized groups and the shapes they are padded to.

    Args:
        groups: The units.
        config: Batch size and accumulation.
    """

    def __init__(self, groups: Sequence[TokenizedGroup], config: TrainingConfig):
        self.groups = list(groups)
        self._config = config
        exact = [self._exact(group) for group in self.groups]
        prompt, count, response, pairs = zip(*exact, strict=True)
        menus = (
            buckets(prompt, at_most=3),
            buckets(count, multiple=1, at_most=3),
            buckets(response, at_most=3),
            buckets(pairs, multiple=1, at_most=3),
        )
        self.shapes = [
            PreferenceShape(*(round_up(size, menu) for size, menu in zip(sizes, menus, strict=True))) for sizes in exact
        ]

    @staticmethod
    def _exact(group: TokenizedGroup) -> PreferenceShape:
        longest = max(len(response) for response in group.responses)
        return PreferenceShape(len(group.prompt), len(group.responses), longest, len(group.pairs))

    def plan(self) -> list[Step]:
        """Every optimizer step; groups of like shape stand together."""

        def size_of(unit: int) -> tuple[int, ...]:
            shape = self.shapes[unit]
            return shape.prompt + shape.responses * shape.response, *shape

        return plan_steps(len(self.groups), self._config, size_of=size_of)

    def pairs(self, step: Step) -> int:
        """Pairs in a step."""
        return sum(len(self.groups[unit].pairs) for micro in step.micro_batches for unit in micro)

    def step(self, step: Step) -> PreferenceBatch:
        """Arrays of one step with a leading axis of micro-batches."""
        used = [self.shapes[unit] for micro in step.micro_batches for unit in micro]
        shape = PreferenceShape(*(max(sizes) for sizes in zip(*used, strict=True)))
        weight = 1.0 / self.pairs(step)
        parts = [self._micro_batch(micro, shape, weight) for micro in step.micro_batches]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)

    def _micro_batch(self, units: Sequence[int], shape: PreferenceShape, weight: float) -> PreferenceBatch:
        n = self._config.batch_size
        groups = [self.groups[unit] for unit in units]
        pairs, starts = np.zeros((n, shape.pairs, 2), np.int32), np.zeros((n, shape.pairs), np.int32)
        weights = np.zeros((n, shape.pairs))
        for row, group in enumerate(groups):
            count = len(group.pairs)
            pairs[row, :count] = np.asarray(group.pairs) + row * shape.responses
            starts[row, :count] = group.pair_starts
            weights[row, :count] = weight
        responses = pad_responses([(group.prompt, group.responses) for group in groups], n, *shape[:3])
        return PreferenceBatch(responses, pairs.reshape(-1, 2), starts.reshape(-1), weights.reshape(-1))
