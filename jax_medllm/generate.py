"""Batched generation with a key/value cache.

The tokens all prompts begin with (the shots of an exam) are computed once and copied into every row's cache. Rows are
*slots*: when a quarter of them have finished, they are refilled with the next prompts while the others go on, so that one
long continuation does not keep a batch waiting. Sequence lengths are padded to a few buckets, so few shapes are compiled.

Each continuation draws from its own key, made of the seed, the prompt's index and the sample's number; each token takes one
uniform number from it. The text therefore does not depend on what else is in the batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_medllm.batches import buckets, round_up
from jax_medllm.decoder import CHUNK, Decoder, Fill, Slots, Stored
from medllm.config import Sampling
from medllm.engine import Generation
from medllm.errors import PromptError

_MULTIPLE = 32


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
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Generation]]:
    """``sampling.samples`` continuations of each prompt, in the order of the prompts.

    Args:
        decoder: The model.
        prompts: Token ids, at least one each.
        sampling: How tokens are drawn and when a continuation ends.
        text_of: Tokens → text.
        batch_size: Continuations generated at a time.
        progress: Called with (continuations done, continuations in all).

    Raises:
        UserError: a prompt and ``max_new_tokens`` do not fit the model's context.
    """
    _check_lengths(prompts, sampling.max_new_tokens, decoder.config.max_positions)
    total = len(prompts) * sampling.samples
    if not total:
        return [[] for _ in prompts]
    # A continuation's random numbers follow from its own prompt, not from its place among the others.
    identities = [zlib.crc32(np.asarray(prompt, np.int32).tobytes()) for prompt in prompts]
    shared = _common_prefix(prompts)
    prefix = decoder.prefix(prompts[0][:shared])
    rest = [prompt[shared:] for prompt in prompts]
    at_most = 1 if total <= 4 * batch_size else 3
    menu = buckets([len(tokens) for tokens in rest], multiple=_MULTIPLE, at_most=at_most)
    done: dict[Request, Generation] = {}
    for size in menu:
        index = [i for i, tokens in enumerate(rest) if round_up(len(tokens), menu) == size]
        requests = [Request(i, sample) for i in index for sample in range(sampling.samples)]
        if requests:
            keys = _request_keys(sampling.seed, [identities[request.prompt] for request in requests], requests)
            queue = _Queue(decoder, rest, sampling, text_of, requests, keys, min(batch_size, len(requests)))
            for request, generation in queue.run(prefix, size):
                done[request] = generation
                if progress:
                    progress(len(done), total)
    return [[done[Request(i, sample)] for sample in range(sampling.samples)] for i in range(len(prompts))]


@dataclass
class _Queue:
    """Requests of one bucket on their way through the slots."""

    decoder: Decoder
    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    text_of: Callable[[Sequence[int]], str]
    requests: list[Request]
    keys: Array
    batch: int
    active: dict[int, Request] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def run(self, prefix: Stored | None, size: int) -> Iterator[tuple[Request, Generation]]:
        """Yield continuations as they finish; prompts are padded to ``size`` tokens."""
        requests, portion = self.requests, max(1, self.batch // 4)
        slots = self.decoder.empty(self.batch, size + -(-self.sampling.max_new_tokens // _MULTIPLE) * _MULTIPLE)
        waiting = 0
        while waiting < len(requests) or self.active:
            free = [row for row in range(self.batch) if row not in self.active]
            while waiting < len(requests) and len(free) >= portion:
                chosen = range(waiting, min(waiting + portion, len(requests)))
                slots = self.decoder.fill(slots, prefix, self._fill(chosen, free[:portion], size))
                waiting, free = chosen.stop, free[portion:]
            slots, written = self.decoder.extend(slots, prefix, self.sampling)
            ended = list(self._read(np.asarray(written)))
            if ended:
                slots = _finish(slots, [row for row, _, _ in ended])
            yield from ((request, generation) for _, request, generation in ended)

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
        which = [i if i < len(requests) else 0 for i in range(portion)]
        source = np.array([distinct.index(requests[i].prompt) for i in which], np.int32)
        target = np.array([rows[i] for i in which], np.int32)
        return Fill(prompts, lengths, source, target, self.keys[np.array([chosen[i] for i in which])])

    def _read(self, written: np.ndarray) -> Iterator[tuple[int, Request, Generation]]:
        """Take in what the slots wrote; yield (row, request, generation) of those that are done."""
        for row, request in list(self.active.items()):
            new = written[row].tolist()
            ended = self.decoder.end in new
            tokens = self.tokens[row]
            tokens += new[: new.index(self.decoder.end)] if ended else new
            full = len(tokens) >= self.sampling.max_new_tokens
            del tokens[self.sampling.max_new_tokens :]
            generation = self._stopped(tokens)
            if generation is None and (ended or full):
                generation = Generation(self.text_of(tokens), tuple(tokens), "length" if full else "stop")
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
            found = [text.index(stop) for stop in stops if stop in text]
            if found:
                return Generation(text[: min(found)], tuple(tokens[:end]), "stop")
        return None


def _finish(slots: Slots, rows: list[int]) -> Slots:
    """Mark rows that the host saw end (a stop string, the longest length)."""
    finished = np.array(slots.finished)
    finished[rows] = True
    return replace(slots, finished=jnp.asarray(finished))


def _request_keys(seed: int, identities: Sequence[int], requests: Sequence[Request]) -> Array:
    def key(prompt, sample):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), sample)

    samples = jnp.asarray([request.sample for request in requests], jnp.uint32)
    return jax.vmap(key)(jnp.asarray(identities, jnp.uint32), samples)


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the tokens all prompts begin with, in whole multiples, leaving every prompt at least one of its own."""
    if len(prompts) < 2:
        return 0
    shortest = min(len(prompt) for prompt in prompts) - 1
    rows = np.array([list(prompt[:shortest]) for prompt in prompts])
    same = (rows == rows[0]).all(axis=0)
    length = shortest if same.all() else int(same.argmin())
    return length // _MULTIPLE * _MULTIPLE


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
