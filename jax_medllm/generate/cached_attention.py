"""Attention to keys and values that lie in several places, as generation stores them.

Each place is attended to by itself, in the order of axes its matrix products yield, so that no array as large as the scores is
moved: a softmax is kept as its largest score, its sum and the values it weighs, and those of several places are added up
(as in FlashAttention, arXiv 2205.14135, section 3.1).

Axes: l layers, b rows, s queries, t keys, k key/value heads, g query heads of a key/value head, x head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_medllm.model.attention import matmul_precision

_SCORES_IN_FLIGHT = 2**22
"""Scores held at a time while prompts are read: 16 MiB in fp32."""


class Stored(NamedTuple):
    """Keys and values of some tokens, the token axis where the products want it; what all rows share has no row axis."""

    keys: Float[Array, "*l_b k x t"]
    values: Float[Array, "*l_b k t x"]

    @property
    def length(self) -> int:
        """Tokens there is room for."""
        return self.keys.shape[-1]

    def first(self, tokens: int) -> Stored:
        """Those of the first tokens alone."""
        return Stored(self.keys[..., :tokens], self.values[..., :tokens, :])


class _Softmax(NamedTuple):
    """A softmax before its normalization: exp(score - largest), summed, and summed with the values."""

    largest: Float[Array, "b s k g 1"]
    total: Float[Array, "b s k g 1"]
    weighed: Float[Array, "b s k g x"]


def attend_parts(
    q: Float[Array, "b s h x"], parts: Sequence[tuple[Stored, Bool[Array, "..."] | None]]
) -> Float[Array, "b s h x"]:
    """Scaled dot-product attention over keys that lie in several places; softmax in fp32 (float64 for float64).

    Args:
        q: Queries.
        parts: Keys and values, with a row axis or shared by all rows, and which of them ``[b or 1, s, t]`` a query sees
            (None: all). Every query sees at least one.
    """
    b, s, h, x = q.shape
    kv_heads = parts[0][0].keys.shape[-3]
    grouped = q.reshape(b, s, kv_heads, h // kv_heads, x)
    found = [_attend_part(grouped, stored, mask) for stored, mask in parts]
    largest = jnp.stack([part.largest for part in found]).max(0)
    scales = [jnp.exp(part.largest - largest) for part in found]
    total = sum(scale * part.total for scale, part in zip(scales, found, strict=True))
    weighed = sum(scale * part.weighed for scale, part in zip(scales, found, strict=True))
    return (weighed / total).astype(q.dtype).reshape(b, s, h, x)


def _attend_part(q: Float[Array, "b s k g x"], stored: Stored, mask: Array | None) -> _Softmax:
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    settings = {"precision": matmul_precision(q.dtype), "preferred_element_type": accumulate}
    rows, first = ("", "kb") if stored.keys.ndim == 3 else ("b", "bk")
    scores = jnp.einsum(f"bskgx,{rows}kxt->{first}sgt", q * q.shape[-1] ** -0.5, stored.keys, **settings)
    if mask is not None:
        axis = 0 if first == "kb" else 1
        scores = jnp.where(jnp.expand_dims(mask, (axis, 3)), scores, jnp.finfo(accumulate).min)
    largest = scores.max(-1, keepdims=True)
    exponentials = jnp.exp(scores - largest)
    weighed = jnp.einsum(f"{first}sgt,{rows}ktx->{first}sgx", exponentials.astype(q.dtype), stored.values, **settings)
    order = [first.index("b"), 2, first.index("k"), 3, 4]
    return _Softmax(*(part.transpose(order) for part in (largest, exponentials.sum(-1, keepdims=True), weighed)))


@dataclass(frozen=True)
class Prefilling:
    """A layer's attention for prompts: what all rows share, and the prompt itself causally.

    Queries are attended some at a time, so that memory does not grow with their number times that of the keys.
    """

    prefix: Stored | None
    window: int | None = None

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Stored]:
        """What the queries see, and the prompts' keys and values."""
        own = Stored(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))
        b, s, h, _ = q.shape
        first = 0 if self.prefix is None else self.prefix.length
        size = min(s, max(1, _SCORES_IN_FLIGHT // (b * h * (first + s))))

        def attend_from(start: Array) -> Array:
            queries, keys = start + jnp.arange(size)[:, None], jnp.arange(s)
            causal = keys <= queries
            if self.window is not None:
                causal &= queries - keys < self.window
            before = _before(self.prefix, first + queries[None, :, 0], self.window)
            return attend_parts(jax.lax.dynamic_slice_in_dim(q, start, size, axis=1), [*before, (own, causal[None])])

        def add(index: Array, out: Array) -> Array:
            # A piece that would reach beyond the prompt begins earlier, and repeats some queries.
            start = jnp.minimum(index * size, s - size)
            return jax.lax.dynamic_update_slice_in_dim(out, attend_from(start), start, axis=1)

        return jax.lax.fori_loop(0, -(-s // size), add, jnp.zeros_like(q)), own


@dataclass(frozen=True)
class Stepping:
    """A layer's attention for one new token a row, the ``column``-th of its chunk, which joins ``recent``."""

    prefix: Stored | None
    own: Stored
    recent: Stored
    length: Array
    column: Array
    window: int | None = None

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Stored]:
        """What the tokens see, and the recent keys and values with theirs."""
        recent = Stored(
            jax.lax.dynamic_update_slice_in_dim(self.recent.keys, k.transpose(0, 2, 3, 1), self.column, axis=-1),
            jax.lax.dynamic_update_slice_in_dim(self.recent.values, v.transpose(0, 2, 1, 3), self.column, axis=-2),
        )
        places, columns = jnp.arange(self.own.length), jnp.arange(self.recent.length)
        stored = (places < self.length[:, None])[:, None]
        written = (columns <= self.column)[None, None]
        own = self.length[:, None] + self.column  # of a row's tokens without the prefix, which is the newest
        if self.window is not None:
            stored &= (own - places < self.window)[:, None]
            written &= self.column - columns < self.window
        before = _before(self.prefix, own + (0 if self.prefix is None else self.prefix.length), self.window)
        return attend_parts(q, [*before, (self.own, stored), (recent, written)]), recent


def _before(prefix: Stored | None, positions: Int[Array, "b s"], window: int | None) -> list[tuple[Stored, Array | None]]:
    """The part that all rows share, as queries at these positions see it."""
    if prefix is None:
        return []
    if window is None:
        return [(prefix, None)]
    return [(prefix, positions[..., None] - jnp.arange(prefix.length) < window)]
