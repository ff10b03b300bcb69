"""The compiled pieces of generation, and the key/value cache they share.

A row's text lies in three places, each with the layout its matrix products want, and a query attends to all three at once:

    prefix   tokens all prompts begin with: held once, not once a row         [l, k, x, p]
    own      the rest of the prompt and what was generated before this chunk  [l, b, k, x, t]
    recent   the tokens of this chunk                                         [l, b, k, x, chunk]

Inside a chunk only ``recent`` is written, at the same column for every row; ``own`` is read-only there, so that a step does
not copy the whole cache. At the end of a chunk the recent tokens are appended to each row's own.

Axes: l layers, b rows, k key/value heads, g query heads of a key/value head, x head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jax_medllm.generate.cached_attention import Prefilling, Stepping, Stored
from jax_medllm.generate.sampling import sample_tokens
from jax_medllm.mesh.layout import constrain, in_use
from jax_medllm.mesh.pytree import Leaf, pytree
from jax_medllm.model.decoder import DenseDecoder
from medllm.config import Sampling

CHUNK = 8
"""Tokens generated between two looks of the host."""


@pytree
@dataclass(frozen=True)
class Slots:
    """The rows being generated.

    Attributes:
        own: Keys and values of each row's own tokens.
        hidden: Hidden state that predicts the next token.
        length: Own tokens stored.
        made: Tokens generated.
        finished: True for rows that are done, or were never filled.
        keys: Random key of each row's continuation.
    """

    own: Stored
    hidden: Float[Array, "b d"]
    length: Int[Array, " b"]
    made: Int[Array, " b"]
    finished: Bool[Array, " b"]
    keys: Array


_CACHE = (None, "batch", "kv_heads", None, None)
_ROWS = ("batch",)
_SLOT_AXES = (_CACHE, _CACHE, ("batch", None), _ROWS, _ROWS, _ROWS, _ROWS)


def by_axes(place: Callable[[Any, tuple[str | None, ...]], Any], slots: Any) -> Any:
    """``place(array, its logical axes)`` of every array of :class:`Slots`, or of what has their structure."""
    leaves, tree = jax.tree.flatten(slots)
    return tree.unflatten(place(leaf, axes) for leaf, axes in zip(leaves, _SLOT_AXES, strict=True))


@pytree
@dataclass(frozen=True)
class Fill:
    """New continuations: ``[u, s]`` distinct prompts with their lengths, and for each continuation its prompt, row and key.

    An entry that repeats another changes nothing; that is how a short list is padded.
    """

    prompts: Int[Leaf, "u s"]
    lengths: Int[Leaf, " u"]
    source: Int[Leaf, " c"]
    target: Int[Leaf, " c"]
    keys: Leaf


class Decoder:
    """Generation for one model, compiled once for each shape.

    Args:
        model: The model, its adapters on.
        ends: Ids of the tokens that end a text; any of them does.

    Attributes:
        state: The model's parameters.
    """

    def __init__(self, model: DenseDecoder, ends: Sequence[int]):
        self.config = model.config
        self.ends = tuple(ends)
        self._dtype = model.dtype
        self._graph, self.state = nnx.split(model)
        self._prefix = jax.jit(self._prefix_stored)
        self._fill = jax.jit(self._filled, donate_argnums=(1,))
        self._extend = jax.jit(self._extended, static_argnums=(3, 5), donate_argnums=(1,))
        self._keep = jax.jit(_kept)
        self._empty = jax.jit(self._emptied, static_argnums=(0, 1))

    def prefix(self, tokens: Sequence[int]) -> Stored | None:
        """Keys and values of ``tokens``, to stand before every row; None for no tokens."""
        return self._prefix(self.state, jnp.asarray(tokens, jnp.int32)[None]) if len(tokens) else None

    def empty(self, rows: int, length: int) -> Slots:
        """Finished rows with room for ``length`` own tokens each."""
        return self._empty(rows, length)

    def fill(self, slots: Slots, prefix: Stored | None, fill: Fill) -> Slots:
        """Start new continuations in rows of ``slots`` (donated)."""
        return self._fill(self.state, slots, prefix, fill)

    def keep(self, slots: Slots, rows: Sequence[int]) -> Slots:
        """Some rows of ``slots``, in the order given."""
        return self._keep(slots, jnp.asarray(rows, jnp.int32))

    def extend(
        self, slots: Slots, prefix: Stored | None, sampling: Sampling, stored: int | None = None
    ) -> tuple[Slots, Int[Array, "b chunk"]]:
        """Up to a chunk of tokens more for each unfinished row of ``slots`` (donated), and those tokens.

        A row finishes at an end token, or one token beyond ``max_new_tokens``, which says that it is not the end. An end
        token stands where nothing was generated.

        Args:
            slots: The rows.
            prefix: What all of them begin with.
            sampling: How tokens are drawn.
            stored: No unfinished row has more own tokens, and none behind these is read. Each number is compiled; None for
                all there is room for.
        """
        room = slots.own.length if stored is None else stored
        return self._extend(self.state, slots, prefix, _drawing(sampling), sampling.max_new_tokens + 1, room)

    def trace(self, state: nnx.State, slots: Any, fill: Any, sampling: Sampling) -> tuple[jax.stages.Traced, jax.stages.Traced]:
        """:meth:`fill` and :meth:`extend` without a prefix, traced and ready to lower; of all arrays the shapes suffice."""
        most = sampling.max_new_tokens + 1
        return (
            self._fill.trace(state, slots, None, fill),
            self._extend.trace(state, slots, None, _drawing(sampling), most, slots.own.length),
        )

    def _emptied(self, rows: int, length: int) -> Slots:
        config = self.config
        shape = (config.num_layers, rows, config.num_kv_heads)
        own = Stored(
            jnp.zeros((*shape, config.head_dim, length + CHUNK), self._dtype),
            jnp.zeros((*shape, length + CHUNK, config.head_dim), self._dtype),
        )
        return _placed(
            Slots(
                own=own,
                hidden=jnp.zeros((rows, config.hidden_size), self._dtype),
                length=jnp.zeros(rows, jnp.int32),
                made=jnp.zeros(rows, jnp.int32),
                finished=jnp.ones(rows, bool),
                keys=jax.random.split(jax.random.key(0), rows),
            )
        )

    def _prefix_stored(self, state: nnx.State, tokens: Int[Array, "1 s"]) -> Stored:
        model = nnx.merge(self._graph, state)
        positions = jnp.arange(tokens.shape[1])[None]
        _, kept = model.hidden_in(
            tokens, positions=positions, context=lambda _: Prefilling(None, self.config.window), cache=None
        )
        return jax.tree.map(lambda part: constrain(part[:, 0], None, "kv_heads", None, None), kept)

    def _filled(self, state: nnx.State, slots: Slots, prefix: Stored | None, fill: Fill) -> Slots:
        model = nnx.merge(self._graph, state)
        positions = jnp.broadcast_to(_size(prefix) + jnp.arange(fill.prompts.shape[1]), fill.prompts.shape)
        hidden, new = model.hidden_in(
            fill.prompts, positions=positions, context=partial(Prefilling, window=self.config.window), cache=prefix
        )
        last = jnp.take_along_axis(hidden, (fill.lengths - 1)[:, None, None], axis=1)[:, 0]

        def put(old: Array, value: Array | bool | int) -> Array:
            return old.at[fill.target].set(value)

        filled = Slots(
            own=_put_rows(slots.own, new, jnp.asarray(fill.source), jnp.asarray(fill.target)),
            hidden=put(slots.hidden, last[fill.source]),
            length=put(slots.length, fill.lengths[fill.source]),
            made=put(slots.made, 0),
            finished=put(slots.finished, False),
            keys=put(slots.keys, fill.keys),
        )
        return _placed(filled)

    def _extended(
        self, state: nnx.State, slots: Slots, prefix: Stored | None, sampling: Sampling, most: Int[Array, ""], stored: int
    ) -> tuple[Slots, Int[Array, "b chunk"]]:
        model = nnx.merge(self._graph, state)
        slots = _placed(slots)
        own, length = slots.own, slots.length
        choose = partial(sample_tokens, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)

        def one(carry):
            column, slots, recent, written = carry
            uniform = jax.vmap(lambda key, made: jax.random.uniform(jax.random.fold_in(key, made)))(slots.keys, slots.made)
            token = jnp.where(slots.finished, self.ends[0], choose(model.logits(slots.hidden), uniform).astype(jnp.int32))

            def context(layer: tuple[Stored | None, Stored, Stored]) -> Stepping:
                prefix, own, recent = layer
                return Stepping(prefix, own.first(stored), recent, length, column, self.config.window)

            positions = (_size(prefix) + length + column)[:, None]
            cache = (prefix, own, recent)
            hidden, recent = model.hidden_in(token[:, None], positions=positions, context=context, cache=cache)
            going = (~slots.finished).astype(jnp.int32)
            slots = replace(
                slots,
                hidden=hidden[:, 0],
                length=slots.length + going,
                made=slots.made + going,
                finished=slots.finished | self._ends(token) | (slots.made + 1 >= most),
            )
            return column + 1, slots, recent, written.at[:, column].set(token)

        def unfinished(carry):
            return (carry[0] < CHUNK) & ~carry[1].finished.all()

        rows = slots.made.shape[0]
        recent = Stored(jnp.zeros_like(own.keys[..., :CHUNK]), jnp.zeros_like(own.values[..., :CHUNK, :]))
        written = jnp.full((rows, CHUNK), self.ends[0], jnp.int32)
        light = replace(slots, own=jax.tree.map(lambda part: part[:, :0], own))
        _, light, recent, written = jax.lax.while_loop(unfinished, one, (jnp.int32(0), light, recent, written))

        # The host of every process reads all that was written.
        return _placed(replace(light, own=_append(own, recent, length))), constrain(written, None, None)

    def _ends(self, token: Int[Array, " b"]) -> Bool[Array, " b"]:
        return (token[:, None] == jnp.asarray(self.ends)).any(-1)


def _append(own: Stored, recent: Stored, length: Int[Array, " b"]) -> Stored:
    """The tokens of a chunk behind each row's own, of which there were ``length``."""

    def local(own: Stored, recent: Stored, length: Array) -> Stored:
        def row(i: Array, own: Stored) -> Stored:
            keys, values = (jax.lax.dynamic_slice_in_dim(part, i, 1, axis=1) for part in recent)
            return Stored(
                jax.lax.dynamic_update_slice(own.keys, keys, (0, i, 0, 0, length[i])),
                jax.lax.dynamic_update_slice(own.values, values, (0, i, 0, length[i], 0)),
            )

        return jax.lax.fori_loop(0, length.shape[0], row, own)

    layout = in_use()
    if layout is None:
        return local(own, recent, length)
    cache, rows = layout.activation(own.keys.shape, _CACHE), layout.activation(length.shape, _ROWS)
    specs = {"in_specs": (cache, cache, rows), "out_specs": cache}
    return jax.shard_map(local, mesh=layout.mesh, **specs, check_vma=False)(own, recent, length)


def _put_rows(own: Stored, new: Stored, source: Int[Array, " c"], target: Int[Array, " c"]) -> Stored:
    """Row ``source[i]`` of ``new`` at the beginning of row ``target[i]`` of ``own``; each device writes its own rows."""
    layout = in_use()
    cache = None if layout is None else layout.activation(own.keys.shape, _CACHE)

    def local(own: Stored, new: Stored, source: Array, target: Array) -> Stored:
        first = 0 if cache is None or cache[1] is None else jax.lax.axis_index(cache[1]) * own.keys.shape[1]

        def put(i: Array, own: Stored) -> Stored:
            row = target[i] - first

            def one(old: Array, values: Array) -> Array:
                block = jax.lax.dynamic_slice_in_dim(values, source[i], 1, axis=1)
                here = (row >= 0) & (row < old.shape[1])
                start = (0, row, 0, 0, 0)
                block = jnp.where(here, block, jax.lax.dynamic_slice(old, start, block.shape))
                return jax.lax.dynamic_update_slice(old, block, start)

            return jax.tree.map(one, own, new)

        return jax.lax.fori_loop(0, target.shape[0], put, own)

    if layout is None:
        return local(own, new, source, target)
    whole = layout.activation(new.keys.shape, (None, None, "kv_heads", None, None))
    nothing = jax.sharding.PartitionSpec()
    specs = {"in_specs": (cache, whole, nothing, nothing), "out_specs": cache}
    return jax.shard_map(local, mesh=layout.mesh, **specs, check_vma=False)(own, new, source, target)


def _kept(slots: Slots, rows: Int[Array, " n"]) -> Slots:
    """These rows alone."""
    own = jax.tree.map(lambda part: part[:, rows], slots.own)
    rest = (slots.hidden, slots.length, slots.made, slots.finished, slots.keys)
    return Slots(own, *(part[rows] for part in rest))


def _drawing(sampling: Sampling) -> Sampling:
    """What of the settings a compiled program depends on."""
    return Sampling(1, sampling.temperature, sampling.top_p, sampling.top_k)


def _placed(slots: Slots) -> Slots:
    """Each device with its rows' and its heads' part."""
    return by_axes(lambda part, names: constrain(part, *names), slots)


def _size(prefix: Stored | None) -> int:
    return 0 if prefix is None else prefix.length
