"""Attention in tiles, in plain XLA: any device, any type, any head width.

FlashAttention-2 (arXiv 2307.08691) as a loop over pairs of a tile of queries and a tile of keys: only one pair's scores exist
at a time, a softmax is kept as its largest score and its sum while the keys go by, and the backward pass computes the weights
anew from the log-sum-exp. All lies as a CPU multiplies it fastest: the query heads that share a key/value head side by side in
one tile, rows and heads in front of every product, the gradients of keys and values ``[x, t]``, the narrow axis first.

Pairs above the diagonal are not in the loop. Of the others those where nobody sees anybody, between documents and between the
responses of a prompt, are left out when the program runs. The program does not grow with the row. A short row has no loop: its
few tiles of queries attend one after the other, each to all keys before its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jax_medllm.mesh.pytree import Leaf
from jax_medllm.model.attention.shares import attend_prefix
from jax_medllm.model.attention.visibility import Visibility

UNSEEN = -1e30
"""Score of a key that is not seen. Finite: a query may meet a tile of which it sees nothing before one of which it does."""

KERNEL_OUTPUT = "attention"
"""What :data:`medllm.config.REMAT_KEEPS` calls it: what the backward pass needs of the forward pass. Where it is kept, that is
not run again."""

_LEAST, _MOST = 64, 256
"""Queries and keys of a tile in the loop."""
_SCORES = 2**19
"""Scores of a pair of tiles, over all rows and heads, where a tile is not as small as it gets: 2 MiB, a CPU core's cache."""
_UNROLLED, _UNROLLED_SCORES = 8, 2**22
"""Tiles of queries of a short row, and the most scores of one: a loop over pairs moves as much as it computes there."""


@dataclass(frozen=True)
class Tile:
    """How many queries, and how many keys, are attended at a time.

    Where the number of keys is None each tile of queries attends to all keys before its end at once, and has a program of its
    own. That is for short rows.
    """

    queries: int
    keys: int | None

    @classmethod
    def of(cls, queries: int, keys: int, heads: int, whole: bool) -> Tile:
        """For so many queries and keys and, over all rows, heads; ``whole`` where the queries are all tokens of the row."""
        part = max(_LEAST, -(-queries // (32 * _UNROLLED)) * 32)
        if whole and part * keys * heads <= _UNROLLED_SCORES:
            return cls(min(part, queries), None)
        sides = [_LEAST, _LEAST]
        for _ in range(2):
            for side, length in ((1, keys), (0, queries)):
                wider = 2 * sides[side]
                if wider <= min(_MOST, length) and heads * wider * sides[1 - side] <= _SCORES:
                    sides[side] = wider
        return cls(min(sides[0], queries), min(sides[1], keys))


def refusal(_: Float[Leaf, "b s h x"]) -> str | None:
    """Nothing is refused."""
    return None


def attend(
    q: Float[Array, "b q h x"],
    k: Float[Array, "b t k x"],
    v: Float[Array, "b t k x"],
    visible: Visibility,
    tile: Tile | None = None,
) -> Float[Array, "b q h x"]:
    """The contract of :func:`jax_medllm.model.attention.attend`; ``tile`` other than the default one is for tests."""
    if visible.first_query is not None:
        return attend_prefix(partial(_attend, tile), q, k, v, visible)
    return _attend(tile, q, k, v, visible)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    tile: Tile | None, q: Float[Array, "b s h x"], k: Float[Array, "b t k x"], v: Float[Array, "b t k x"], visible: Visibility
) -> Float[Array, "b s h x"]:
    return _forward(tile, q, k, v, visible)[0]


def _forward(tile: Tile | None, q: Array, k: Array, v: Array, visible: Visibility) -> tuple[Array, tuple[Any, ...]]:
    pairs = _Pairs.of(tile, q, k, visible)
    queries, keys, values = pairs.of_queries(q), pairs.of_keys(k), pairs.of_keys(v)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def gather(i: Any, run: _Run, seen: Array, so_far: tuple[Array, ...]) -> tuple[Array, ...]:
        largest, total, gathered = so_far
        scores = _scores(queries[i], run.of(keys), seen)
        top = jnp.maximum(largest[i], scores.max(-1))
        weights, shrink = jnp.exp(scores - top[..., None]), jnp.exp(largest[i] - top)
        of_values = _product("bkrt,bktx->bkrx", weights.astype(v.dtype), run.of(values))
        return (
            largest.at[i].set(top),
            total.at[i].set(shrink * total[i] + weights.sum(-1)),
            gathered.at[i].set(shrink[..., None] * gathered[i] + of_values),
        )

    nothing = jnp.zeros(queries.shape[:-1], wide)
    start = nothing + UNSEEN, nothing, jnp.zeros(queries.shape, wide)
    largest, total, gathered = pairs.over(gather, start)
    total = jnp.where(total == 0, 1, total)  # queries that fill up the last tile
    out = pairs.queries_back((gathered / total[..., None]).astype(q.dtype), q)
    logsumexp = largest + jnp.log(total)
    out, logsumexp = checkpoint_name(out, KERNEL_OUTPUT), checkpoint_name(logsumexp, KERNEL_OUTPUT)
    return out, (q, k, v, visible, out, logsumexp)


def _backward(tile: Tile | None, kept: tuple[Any, ...], slope: Array) -> tuple[Array, Array, Array, None]:
    """P = exp(S - logsumexp), dV = Pᵀ slope; dS = P ∘ (slope Vᵀ - rowsum(slope ∘ out)) / √x, dQ = dS K, dK = dSᵀ Q."""
    q, k, v, visible, out, logsumexp = kept
    pairs = _Pairs.of(tile, q, k, visible)
    wide, scale = logsumexp.dtype, q.shape[-1] ** -0.5
    queries, keys, values, slopes = pairs.of_queries(q), pairs.of_keys(k), pairs.of_keys(v), pairs.of_queries(slope)
    shift = pairs.of_queries((slope.astype(wide) * out.astype(wide)).sum(-1))

    def gather(i: Any, run: _Run, seen: Array, so_far: tuple[Array, ...]) -> tuple[Array, ...]:
        of_q, of_k, of_v = so_far
        own_keys = run.of(keys)
        weights = jnp.exp(_scores(queries[i], own_keys, seen) - logsumexp[i][..., None])
        of_weights = _product("bkrx,bktx->bkrt", slopes[i], run.of(values))
        of_scores = (weights * (of_weights - shift[i][..., None]) * scale).astype(k.dtype)
        return (
            of_q.at[i].add(_product("bkrt,bktx->bkrx", of_scores, own_keys)),
            run.added(of_k, _product("bkrx,bkrt->bkxt", queries[i], of_scores)),
            run.added(of_v, _product("bkrx,bkrt->bkxt", slopes[i], weights.astype(v.dtype))),
        )

    of_keys = jnp.zeros(keys.swapaxes(-1, -2).shape, wide)
    of_q, of_k, of_v = pairs.over(gather, (jnp.zeros(queries.shape, wide), of_keys, of_keys))
    return pairs.queries_back(of_q.astype(q.dtype), q), pairs.keys_back(of_k, k), pairs.keys_back(of_v, v), None


_attend.defvjp(_forward, _backward)


@dataclass(frozen=True)
class _Pairs:
    """The pairs of tiles of some rows.

    Attributes:
        tile: Their size.
        count: Tiles of queries, and of keys.
        keys: Keys of a row.
        kv_heads: Key/value heads.
        visible: Who sees whom.
    """

    tile: Tile
    count: tuple[int, int]
    keys: int
    kv_heads: int
    visible: Visibility

    @classmethod
    def of(cls, tile: Tile | None, q: Array, k: Array, visible: Visibility) -> _Pairs:
        tile = tile or Tile.of(q.shape[1], k.shape[1], q.shape[0] * q.shape[2], visible.first_query is None)
        _, keys, kv_heads, _ = k.shape
        return cls(tile, (-(-q.shape[1] // tile.queries), -(-keys // (tile.keys or keys))), keys, kv_heads, visible)

    def over(self, gather: Callable[[Any, _Run, Array, Any], Any], so_far: Any) -> Any:
        """``gather(i, keys, seen, so far)`` over the pairs in which somebody sees somebody, ``seen`` being ``[b, q, t]``."""
        size, width = self.tile.queries, self.tile.keys
        if width is None:
            for i in range(self.count[0]):
                run = _Run(0, min(self.keys, (i + 1) * size))
                so_far = gather(i, run, self._seen(i * size, run), so_far)
            return so_far
        first = self.visible.first_query
        tiles = np.argwhere(np.ones(self.count, bool))
        if first is None:
            tiles = tiles[tiles[:, 1] * width < (tiles[:, 0] + 1) * size]

        def step(so_far: Any, pair: tuple[Array, Array]) -> tuple[Any, None]:
            i, j = pair
            run = _Run(j * width, width)
            seen = self._seen(i * size + (0 if first is None else first), run)
            return jax.lax.cond(seen.any(), partial(gather, i, run, seen), lambda unchanged: unchanged, so_far), None

        return jax.lax.scan(step, so_far, tuple(tiles.T))[0]

    def _seen(self, first: Any, run: _Run) -> Bool[Array, "b q r"]:
        """Which keys of a run the tile of queries sees that begins at a place in the row."""
        return self.visible.mask(first + np.arange(self.tile.queries), run.begin + np.arange(run.length))

    def of_queries(self, rows: Float[Array, "b s h *x"]) -> Float[Array, "i b k gq *x"]:
        """Tiles of what each query and head has."""
        b, length, heads, *x = rows.shape
        tiles, size = self.count[0], self.tile.queries
        filled = jnp.pad(rows, [(0, 0), (0, tiles * size - length), *[(0, 0)] * (rows.ndim - 2)])
        cut = filled.reshape(b, tiles, size, self.kv_heads, heads // self.kv_heads, *x)
        return jnp.moveaxis(cut, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4)).reshape(tiles, b, self.kv_heads, -1, *x)

    def queries_back(self, tiles: Float[Array, "i b k gq x"], like: Float[Array, "b s h x"]) -> Float[Array, "b s h x"]:
        """What :meth:`of_queries` cut, whole again."""
        b, length, heads, x = like.shape
        cut = tiles.reshape(self.count[0], b, self.kv_heads, heads // self.kv_heads, self.tile.queries, x)
        return jnp.moveaxis(cut, (0, 1, 2, 3, 4), (1, 0, 3, 4, 2)).reshape(b, -1, heads, x)[:, :length]

    def of_keys(self, rows: Float[Array, "b t k x"]) -> Float[Array, "b k tiled x"]:
        """What each key has, filled up to whole tiles."""
        more = self.count[1] * (self.tile.keys or self.keys) - self.keys
        return jnp.pad(rows, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)

    def keys_back(self, of_keys: Float[Array, "b k x tiled"], like: Float[Array, "b t k x"]) -> Float[Array, "b t k x"]:
        """A gradient of what :meth:`of_keys` filled up."""
        return jnp.moveaxis(of_keys, 3, 1)[:, : self.keys].astype(like.dtype)


class _Run(NamedTuple):
    """Keys that are attended together: where they begin, and how many."""

    begin: Any
    length: int

    def of(self, keys: Float[Array, "b k t x"]) -> Float[Array, "b k r x"]:
        return jax.lax.dynamic_slice_in_dim(keys, self.begin, self.length, axis=2)

    def added(self, total: Float[Array, "b k x t"], part: Float[Array, "b k x r"]) -> Float[Array, "b k x t"]:
        """``total`` with ``part`` added to these keys'."""
        before = jax.lax.dynamic_slice_in_dim(total, self.begin, self.length, axis=3)
        return jax.lax.dynamic_update_slice_in_dim(total, before + part, self.begin, axis=3)


def _scores(q: Float[Array, "b k r x"], k: Float[Array, "b k t x"], seen: Bool[Array, "b q t"]) -> Float[Array, "b k r t"]:
    """Scaled scores of a pair of tiles, :data:`UNSEEN` where a key is not seen."""
    scores = _product("bkrx,bktx->bkrt", q, k)
    b, kv_heads, _, keys = scores.shape
    apart = scores.reshape(b, kv_heads, -1, *seen.shape[1:])
    return jnp.where(seen[:, None, None], apart * q.shape[-1] ** -0.5, UNSEEN).reshape(b, kv_heads, -1, keys)


def _product(equation: str, left: Array, right: Array) -> Array:
    """A product accumulated in fp32 (float64 for float64)."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.einsum(equation, left, right, precision=matmul_precision(left.dtype), preferred_element_type=wide)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """HIGHEST for fp32 and float64, so that no accelerator silently multiplies in bf16 or TF32; bf16 as it is."""
    return jax.lax.Precision.DEFAULT if jnp.dtype(dtype).itemsize < 4 else jax.lax.Precision.HIGHEST
