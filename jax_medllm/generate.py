"""Batched generation with a key/value cache.

The tokens all prompts begin with (the shots of an exam) are computed once and copied into every row's cache. Rows are
*slots*: when a quarter of them have finished, they are refilled with the next prompts while the others go on, so that one
long continuation does not keep a batch waiting. Sequence lengths are padded to a few buckets, so few shapes are compiled.

Each continuation draws from its own key, made of the seed, the prompt's index and the sample's number; each token takes one
uniform number from it. The text therefore does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from jax_medllm.batches import buckets, round_up
from jax_medllm.model import Cache, Qwen2
from medllm.config import Sampling
from medllm.engine import Generation
from medllm.errors import UserError

_CHUNK = 8
_MULTIPLE = 32
_CANDIDATES = 256
"""Most likely tokens that are looked at first; all are sorted only where these do not settle a draw."""


class Request(NamedTuple):
    """One continuation that is asked for."""

    prompt: int
    sample: int


@struct.dataclass
class Slots:
    """The rows being generated.

    Attributes:
        cache: Keys and values of the tokens so far.
        hidden: Hidden state that predicts the next token.
        length: Tokens in the cache.
        made: Tokens generated.
        finished: True for rows that are done, or were never filled.
        keys: Random key of each row's continuation.
    """

    cache: Cache
    hidden: Float[Array, "b d"]
    length: Int[Array, "b"]
    made: Int[Array, "b"]
    finished: Bool[Array, "b"]
    keys: Array


def sample_tokens(
    logits: Float[Array, "b v"], uniform: Float[Array, "b"], *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Int[Array, "b"]:
    """One token a row, by inverting the cumulative distribution at ``uniform``.

    Tokens stand in descending order of probability. ``top_k`` keeps the k first; ``top_p`` then the fewest whose
    (renormalized) probability reaches p, as transformers' warpers do. Temperature 0 takes the most likely token.

    Args:
        logits: Scores.
        uniform: A number in [0, 1) for each row.
        temperature: Divides the scores.
        top_k: 0 for all tokens.
        top_p: 1 for all tokens.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    vocab = logits.shape[-1]
    logits = logits / temperature

    def draw(count: int) -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(logits, count)
        whole = values if 0 < top_k < vocab else logits
        probabilities = jnp.exp(values - jax.nn.logsumexp(whole, axis=-1, keepdims=True))
        cumulative = jnp.cumsum(probabilities, axis=-1)
        kept = cumulative - probabilities < top_p
        mass = (probabilities * kept).sum(-1) if top_p < 1 else jnp.ones_like(uniform)
        goal = uniform * mass
        place = jnp.minimum((cumulative <= goal[:, None]).sum(-1), kept.sum(-1) - 1)
        settled = cumulative[:, -1] >= top_p if top_p < 1 else cumulative[:, -1] > goal
        return jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0], settled.all()

    if 0 < top_k < vocab:
        return draw(top_k)[0]
    if vocab <= _CANDIDATES:
        return draw(vocab)[0]
    tokens, settled = draw(_CANDIDATES)
    return jax.lax.cond(settled, lambda: tokens, lambda: draw(vocab)[0])


class Decoder:
    """The compiled pieces of generation for one model.

    Args:
        model: The model; its adapters are on.
        end: Id of the token that ends a text.
    """

    def __init__(self, model: Qwen2, end: int):
        self.config = model.config
        self.end = end
        self._graph, self._state = nnx.split(model)
        self._prefix = jax.jit(self._prefix_cache)
        self._empty = jax.jit(self._empty_slots, static_argnums=(1, 2))
        self._fill = jax.jit(self._fill_slots, donate_argnums=(1,))
        self._extend = jax.jit(self._extend_slots, static_argnums=(2,), donate_argnums=(1,))

    def prefix(self, tokens: Sequence[int]) -> Cache | None:
        """Cache of one row that holds ``tokens``; None for none."""
        return self._prefix(self._state, jnp.asarray(tokens, jnp.int32)[None]) if len(tokens) else None

    def empty(self, batch: int, length: int) -> Slots:
        """``batch`` finished rows with a cache of ``length`` tokens."""
        return self._empty(self._state, batch, length)

    def fill(self, slots: Slots, prefix: Cache | None, prompts: np.ndarray, lengths: np.ndarray, source: np.ndarray,
             target: np.ndarray, keys: Array) -> Slots:
        """Start new continuations.

        Args:
            slots: The rows (donated).
            prefix: Cache of the tokens before each prompt.
            prompts: ``[u, s]`` distinct prompts, padded on the right.
            lengths: ``[u]`` their lengths.
            source: ``[r]`` which prompt each new continuation has.
            target: ``[r]`` the row it goes to; past the last row for none.
            keys: ``[r]`` its random key.
        """
        return self._fill(self._state, slots, prefix, prompts, lengths, source, target, keys)

    def extend(self, slots: Slots, sampling: Sampling) -> tuple[Slots, Int[Array, "b chunk"]]:
        """Up to eight more tokens for each row that is not finished (donated); the end token fills what is not written."""
        static = Sampling(1, sampling.temperature, sampling.top_p, sampling.top_k)
        return self._extend(self._state, slots, static)

    def _prefix_cache(self, state: nnx.State, tokens: Int[Array, "1 s"]) -> Cache:
        model = nnx.merge(self._graph, state)
        return model.decode(tokens, model.init_cache(1, tokens.shape[1]), start=jnp.zeros(1, jnp.int32))[1]

    def _empty_slots(self, state: nnx.State, batch: int, length: int) -> Slots:
        model = nnx.merge(self._graph, state)
        zeros = jnp.zeros(batch, jnp.int32)
        keys = jax.vmap(jax.random.key)(zeros)
        hidden = jnp.zeros((batch, self.config.hidden_size), model.dtype)
        return Slots(model.init_cache(batch, length), hidden, zeros, zeros, jnp.ones(batch, bool), keys)

    def _fill_slots(self, state, slots, prefix, prompts, lengths, source, target, keys) -> Slots:
        model = nnx.merge(self._graph, state)
        before = 0 if prefix is None else prefix.keys.shape[2]
        cache = model.init_cache(prompts.shape[0], before + prompts.shape[1], prefix=prefix)
        start = jnp.full(prompts.shape[0], before, jnp.int32)
        hidden, cache = model.decode(prompts, cache, start=start)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]

        def put(old, new):
            return old.at[target].set(new, mode="drop")

        def put_cache(old, new):
            return old.at[:, target, : new.shape[2]].set(new[:, source], mode="drop")

        return Slots(
            cache=jax.tree.map(put_cache, slots.cache, cache),
            hidden=put(slots.hidden, last[source]),
            length=put(slots.length, before + lengths[source]),
            made=put(slots.made, 0),
            finished=put(slots.finished, False),
            keys=put(slots.keys, keys),
        )

    def _extend_slots(self, state: nnx.State, slots: Slots, sampling: Sampling) -> tuple[Slots, Int[Array, "b chunk"]]:
        model = nnx.merge(self._graph, state)
        choose = partial(sample_tokens, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)

        def draw(key, made):
            return jax.random.uniform(jax.random.fold_in(key, made))

        def one(carry):
            i, slots, written = carry
            uniform = jax.vmap(draw)(slots.keys, slots.made)
            token = choose(model.logits(slots.hidden), uniform).astype(jnp.int32)
            token = jnp.where(slots.finished, self.end, token)
            hidden, cache = model.decode(token[:, None], slots.cache, start=slots.length)
            going = (~slots.finished).astype(jnp.int32)
            slots = slots.replace(
                cache=cache,
                hidden=hidden[:, 0],
                length=slots.length + going,
                made=slots.made + going,
                finished=slots.finished | (token == self.end),
            )
            return i + 1, slots, written.at[:, i].set(token)

        def unfinished(carry):
            return (carry[0] < _CHUNK) & ~carry[1].finished.all()

        written = jnp.full((slots.made.shape[0], _CHUNK), self.end, jnp.int32)
        _, slots, written = jax.lax.while_loop(unfinished, one, (0, slots, written))
        return slots, written


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
            queue = _Queue(decoder, rest, sampling, text_of, requests, min(batch_size, len(requests)))
            for request, generation in queue.run(prefix, shared, size):
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
    batch: int
    active: dict[int, Request] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def run(self, prefix: Cache | None, before: int, size: int):
        """Yield (request, generation) as they finish; prompts are padded to ``size`` after ``before`` shared tokens."""
        requests, portion = self.requests, max(1, self.batch // 4)
        keys = _request_keys(self.sampling.seed, requests)
        slots = self.decoder.empty(self.batch, before + size + -(-self.sampling.max_new_tokens // _MULTIPLE) * _MULTIPLE)
        waiting = 0
        while waiting < len(requests) or self.active:
            free = [row for row in range(self.batch) if row not in self.active]
            while waiting < len(requests) and len(free) >= portion:
                now, rows = requests[waiting : waiting + portion], free[:portion]
                slots = self._fill(slots, prefix, size, now, rows, keys[waiting : waiting + portion], portion)
                waiting, free = waiting + len(now), free[portion:]
            slots, written = self.decoder.extend(slots, self.sampling)
            ended = list(self._read(np.asarray(written)))
            if ended:
                slots = slots.replace(finished=slots.finished.at[np.asarray([row for row, _, _ in ended])].set(True))
            yield from ((request, generation) for _, request, generation in ended)

    def _fill(self, slots, prefix, size, requests, rows, keys, portion):
        """Put ``requests`` into ``rows``; always ``portion`` of them in shape, distinct prompts once each."""
        distinct = sorted({request.prompt for request in requests})
        held = min(portion, -(-portion // self.sampling.samples) + 1) if self.sampling.samples > 1 else portion
        prompts, lengths = np.zeros((held, size), np.int32), np.ones(held, np.int32)
        for i, prompt in enumerate(distinct):
            lengths[i] = len(self.prompts[prompt])
            prompts[i, : lengths[i]] = self.prompts[prompt]
        source, target = np.zeros(portion, np.int32), np.full(portion, self.batch, np.int32)
        for i, (request, row) in enumerate(zip(requests, rows, strict=False)):
            source[i], target[i] = distinct.index(request.prompt), row
            self.active[row], self.tokens[row] = request, []
        keys = keys[np.minimum(np.arange(portion), len(requests) - 1)]
        return self.decoder.fill(slots, prefix, prompts, lengths, source, target, keys)

    def _read(self, written: np.ndarray):
        """Take in what the slots wrote; yield (row, request, generation) of those that are done."""
        for row, request in list(self.active.items()):
            new = written[row].tolist()
            ended = self.decoder.end in new
            tokens = self.tokens[row]
            tokens += new[: new.index(self.decoder.end)] if ended else new
            full = len(tokens) >= self.sampling.max_new_tokens
            if full:
                ended &= len(tokens) == self.sampling.max_new_tokens
                del tokens[self.sampling.max_new_tokens :]
            generation = self._stopped(tokens)
            if generation is None and (ended or full):
                generation = Generation(self.text_of(tokens), tuple(tokens), "stop" if ended else "length")
            if generation is not None:
                del self.active[row]
                yield row, request, generation

    def _stopped(self, tokens: list[int]) -> Generation | None:
        """The continuation cut at the first stop string, its tokens ending with the one that completed it."""
        stops = self.sampling.stop
        if not stops:
            return None
        # A stop string of n bytes spans at most n tokens, so a new one lies within this tail.
        tail = _CHUNK + max(len(stop.encode()) for stop in stops)
        recent = self.text_of(tokens[-tail:])
        if not any(stop in recent for stop in stops):
            return None
        for end in range(max(1, len(tokens) - _CHUNK + 1), len(tokens) + 1):
            text = self.text_of(tokens[:end])
            found = [text.index(stop) for stop in stops if stop in text]
            if found:
                return Generation(text[: min(found)], tuple(tokens[:end]), "stop")
        return None


def _request_keys(seed: int, requests: Sequence[Request]) -> Array:
    def key(prompt, sample):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), sample)

    prompts, samples = (jnp.asarray(part, jnp.int32) for part in zip(*requests, strict=True))
    return jax.vmap(key)(prompts, samples)


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
        if len(prompt) + new > context:
            raise UserError(
                f"prompt {index}: {len(prompt)} tokens and {new} new ones do not fit the model's context of {context}; "
                "shorten the prompt (fewer shots) or lower sampling.max_new_tokens"
            )
