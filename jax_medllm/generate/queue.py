"""Batched generation with a key/value cache.

The tokens many prompts begin with (the shots of an exam) are computed once and stored once. Rows are *slots*: a slot whose
continuation has ended takes the next prompt while the others go on, so that one long continuation holds up nothing; when no
prompts are left, the last ones go on in a smaller batch. Sequence lengths are padded to a few buckets, so few shapes are
compiled.

Each continuation draws from its own key, made of the seed, the prompt and the sample's number; each token takes one uniform
number from it. Rows never mix, so the text depends on what else is in the batch, and on the number of slots, only as far as
the device rounds a matrix product of another shape differently, which takes two tokens equally likely to the last bits.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from jax_medllm.generate.cached_attention import Stored
from jax_medllm.generate.cached_decoder import CHUNK, Decoder, Fill, Slots
from jax_medllm.model.rows import MULTIPLE, buckets, round_up
from medllm.config import Sampling
from medllm.engine import Generation
from medllm.errors import PromptError
from medllm.host.progress import Progress

_PREFILL_SIZES = 4
"""Padded lengths of prompts that are read into the slots of one queue; each is compiled."""
_PIECE, _PIECES = 128, 4
"""Steps read a row's own tokens in pieces of at least so many, and are compiled for so many numbers of pieces at most."""
_WORTH = 32
"""Prompt tokens that are read in the time of one step of generation, roughly: what a queue of its own may cost."""


class Request(NamedTuple):
    """One continuation that is asked for."""

    prompt: int
    sample: int


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    text_of: Callable[[Sequence[int]], str],
    batch_size: int,
    progress: Progress | None = None,
    *,
    stop_ids: Collection[int] = (),
) -> list[list[Generation]]:
    """``sampling.samples`` continuations of each prompt, in the order of the prompts.

    Args:
        decoder: The model.
        prompts: Token ids, at least one each.
        sampling: How tokens are drawn and when a continuation ends.
        text_of: Tokens → text.
        batch_size: Continuations generated at a time.
        progress: Called with (continuations done, continuations in all).
        stop_ids: Tokens that end a continuation besides the decoder's own.

    Raises:
        UserError: a prompt and ``max_new_tokens`` do not fit the model's context.
    """
    _check_lengths(prompts, sampling.max_new_tokens, decoder.config.max_positions)
    total = len(prompts) * sampling.samples
    if not total:
        return [[] for _ in prompts]
    # A continuation's random numbers follow from its own prompt, not from its place among the others.
    identities = [zlib.crc32(np.asarray(prompt, np.int32).tobytes()) for prompt in prompts]
    ends = frozenset((*decoder.ends, *stop_ids))
    done: dict[Request, Generation] = {}
    for family in _families(prompts, list(range(len(prompts))), _WORTH * sampling.max_new_tokens):
        prefix = decoder.prefix(prompts[family.members[0]][: family.shared])
        rest = {i: prompts[i][family.shared :] for i in family.members}
        count = len(rest) * sampling.samples
        menu = buckets([len(tokens) for tokens in rest.values()], at_most=1 if count <= 4 * batch_size else 3)
        for size in menu:
            members = [i for i, tokens in rest.items() if round_up(len(tokens), menu) == size]
            # Prompts of like length are read together.
            members.sort(key=lambda i: (-len(rest[i]), i))
            requests = [Request(i, sample) for i in members for sample in range(sampling.samples)]
            if not requests:
                continue
            batch = min(batch_size, len(requests))
            queue = _Queue(decoder, prefix, rest, identities, sampling, text_of, ends, requests, batch)
            for request, generation in queue.run():
                done[request] = generation
                if progress:
                    progress(len(done), total)
    return [[done[Request(i, sample)] for sample in range(sampling.samples)] for i in range(len(prompts))]


@dataclass
class _Queue:
    """Requests of one bucket on their way through the slots.

    ``prompts`` are what follows the prefix, ``identities`` numbers made of the whole prompts.
    """

    decoder: Decoder
    prefix: Stored | None
    prompts: Mapping[int, Sequence[int]]
    identities: Sequence[int]
    sampling: Sampling
    text_of: Callable[[Sequence[int]], str]
    ends: Set[int]
    requests: list[Request]
    batch: int
    waiting: int = 0
    active: dict[int, Request] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def run(self) -> Iterator[tuple[Request, Generation]]:
        """Yield continuations as they finish."""
        lengths = [len(self.prompts[request.prompt]) for request in self.requests]
        sizes = buckets(lengths, at_most=_PREFILL_SIZES)
        new = -(-self.sampling.max_new_tokens // MULTIPLE) * MULTIPLE
        room = sizes[-1] + new
        piece = max(_PIECE, -(-room // (_PIECES * MULTIPLE)) * MULTIPLE)
        pieces = (*range(piece, room, piece), room)
        slots = self.decoder.empty(self.batch, room)
        while self.waiting < len(self.requests) or self.active:
            slots = self._shrink(self._refill(slots, sizes))
            longest = max(len(self.prompts[request.prompt]) + len(self.tokens[row]) for row, request in self.active.items())
            slots, written = self.decoder.extend(slots, self.prefix, self.sampling, round_up(longest, pieces))
            ended = list(self._read(np.asarray(written)))
            if ended:
                slots = _finish(slots, [row for row, _, _ in ended])
            yield from ((request, generation) for _, request, generation in ended)

    def _refill(self, slots: Slots, sizes: tuple[int, ...]) -> Slots:
        """Start waiting requests in free rows: a quarter of the batch at a time, else a few, so that no row waits for many.

        Few are still as many as a prompt has samples, which read it together.
        """
        quarter = max(1, self.batch // 4)
        few = min(quarter, max(self.batch // 16, self.sampling.samples))
        while left := len(self.requests) - self.waiting:
            free = [row for row in range(self.batch) if row not in self.active]
            portion = quarter if min(len(free), left) >= quarter else few
            if len(free) < portion:
                break
            chosen = range(self.waiting, self.waiting + min(portion, left))
            longest = max(len(self.prompts[self.requests[i].prompt]) for i in chosen)
            fill = self._fill(chosen, free[:portion], round_up(longest, sizes))
            slots = self.decoder.fill(slots, self.prefix, fill)
            self.waiting = chosen.stop
        return slots

    def _shrink(self, slots: Slots) -> Slots:
        """Go on with a quarter of the rows, or a quarter of those, when nothing waits and the unfinished ones fit."""
        batch = self.batch
        while self.waiting == len(self.requests) and 0 < len(self.active) <= batch // 4:
            batch //= 4
        if batch == self.batch:
            return slots
        kept = sorted(range(self.batch), key=lambda row: row not in self.active)[:batch]
        place = {row: i for i, row in enumerate(kept)}
        self.batch = batch
        self.active = {place[row]: request for row, request in self.active.items()}
        self.tokens = {place[row]: self.tokens[row] for row in kept if row in self.tokens}
        return self.decoder.keep(slots, kept)

    def _fill(self, chosen: range, rows: list[int], size: int) -> Fill:
        """The chosen requests for ``rows``, each distinct prompt once; padded by repeating the first."""
        requests = [self.requests[i] for i in chosen]
        distinct = sorted({request.prompt for request in requests})
        samples, portion = self.sampling.samples, len(rows)
        held = portion if samples == 1 else min(portion, -(-portion // samples) + 1)
        prompts, lengths = np.zeros((held, size), np.int32), np.ones(held, np.int32)
        for i, prompt in enumerate(distinct):
            lengths[i] = len(self.prompts[prompt])
            prompts[i, : lengths[i]] = self.prompts[prompt]
        for row, request in zip(rows, requests, strict=False):
            self.active[row], self.tokens[row] = request, []
        padding = portion - len(requests)
        requests, rows = requests + requests[:1] * padding, rows[: len(requests)] + rows[:1] * padding
        source = np.array([distinct.index(request.prompt) for request in requests], np.int32)
        identities = np.array([self.identities[request.prompt] for request in requests], np.uint32)
        numbers = np.array([request.sample for request in requests], np.uint32)
        keys = _keys(self.sampling.seed, identities, numbers)
        return Fill(prompts, lengths, source, np.array(rows, np.int32), keys)

    def _read(self, written: np.ndarray) -> Iterator[tuple[int, Request, Generation]]:
        """Take in what the slots wrote; yield (row, request, generation) of those that are done."""
        most = self.sampling.max_new_tokens
        for row, request in list(self.active.items()):
            new = written[row].tolist()
            ended = not self.ends.isdisjoint(new[: most + 1 - len(self.tokens[row])])
            tokens = self.tokens[row] = [*self.tokens[row], *takewhile(lambda token: token not in self.ends, new)]
            generation = self._stopped(tokens[:most])
            if generation is None and (ended or len(tokens) > most):
                generation = Generation(self.text_of(tokens[:most]), tuple(tokens[:most]), "stop" if ended else "length")
            if generation is not None:
                del self.active[row]
                yield row, request, generation

    def _stopped(self, tokens: list[int]) -> Generation | None:
        """The continuation cut at the first stop string, its tokens ending with the one that completed it."""
        stops = self.sampling.stop
        if not stops:
            return None
        # A stop string of n bytes spans at most n tokens, so a new one lies within this tail.
        tail = CHUNK + max(len(stop.encode()) for stop in stops)
        recent = self.text_of(tokens[-tail:])
        if not any(stop in recent for stop in stops):
            return None
        for end in range(max(1, len(tokens) - CHUNK + 1), len(tokens) + 1):
            text = self.text_of(tokens[:end])
            if found := [(text.index(stop), stop) for stop in stops if stop in text]:
                cut, stop = min(found)
                return Generation(text[:cut], tuple(tokens[:end]), "stop", stop)
        return None


def _finish(slots: Slots, rows: list[int]) -> Slots:
    """Mark rows that the host saw end, at a stop string."""
    seen = np.zeros(slots.finished.shape, bool)
    seen[rows] = True
    return replace(slots, finished=slots.finished | seen)


@jax.jit
def _keys(seed: Int[Array, ""], prompts: UInt32[Array, " n"], samples: UInt32[Array, " n"]) -> Array:
    """The random key of each continuation."""
    fold = jax.vmap(jax.random.fold_in)
    return fold(fold(jnp.broadcast_to(jax.random.key(seed), prompts.shape), prompts), samples)


class _Family(NamedTuple):
    """Prompts (their indices) and the number of tokens they begin with alike."""

    members: list[int]
    shared: int


def _families(prompts: Sequence[Sequence[int]], members: list[int], worth: int) -> Iterator[_Family]:
    """Prompts by what they begin with: a family of its own where that saves reading more than ``worth`` tokens."""
    shared = _common_prefix([prompts[i] for i in members])
    by_next = defaultdict(list)
    for i in members:
        by_next[tuple(prompts[i][shared : shared + MULTIPLE])].append(i)
    rest = []
    for alike in by_next.values():
        more = _common_prefix([prompts[i] for i in alike]) - shared
        if len(alike) < len(members) and (len(alike) - 1) * more > worth:
            yield from _families(prompts, alike, worth)
        else:
            rest += alike
    if len(rest) == len(members):
        yield _Family(members, shared)
    elif rest:
        yield from _families(prompts, rest, worth)


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the tokens all prompts begin with, in whole multiples, leaving every prompt at least one of its own."""
    if len(prompts) < 2:
        return 0
    shortest = min(map(len, prompts)) - 1
    rows = np.array([list(prompt[:shortest]) for prompt in prompts])
    same = (rows == rows[0]).all(axis=0)
    length = shortest if same.all() else int(same.argmin())
    return length // MULTIPLE * MULTIPLE


def _check_lengths(prompts: Sequence[Sequence[int]], new: int, context: int) -> None:
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise PromptError(index, "it is empty: generation needs at least one token")
        if len(prompt) + new > context:
            raise PromptError(
                index,
                f"{len(prompt)} tokens and {new} new ones do not fit the model's context of {context}; "
                "shorten the prompt (fewer shots) or lower sampling.max_new_tokens",
            )
