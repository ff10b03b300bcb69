"""Flash attention for TPU, in Pallas: packed rows, groups and grouped heads; forward and backward.

FlashAttention-2 (arXiv 2307.08691): the scores of a tile of queries and a tile of keys exist only in the core's memory; a
softmax is kept as its largest score and its sum while the keys go by, and computed again from the log-sum-exp in the backward
pass. The query heads that share a key/value head stand side by side in one tile, so that keys and values are read once for
all of them. Scores stand keys by queries, ``[t, g·q]``, which makes what belongs to a query a row of the tile.

Tiles where nobody sees anybody, above the diagonal and between documents, are neither fetched nor computed: a table says
which tile to hold at each step, and a step that does not hold its own does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from jax_medllm.mesh.pytree import Leaf, pytree
from jax_medllm.model.attention.visibility import Visibility
from jax_medllm.model.attention.xla import KERNEL_OUTPUT, UNSEEN, matmul_precision

TILE = 1024
"""Queries times heads of a tile, and twice its keys: all arrays of a step fit into 16 MiB, the memory of a v5e core."""


@dataclass(frozen=True)
class Tiles:
    """How a row is cut: queries and keys of a tile, both multiples of 128 on a TPU, one a multiple of the other."""

    queries: int
    keys: int
    interpret: bool = False

    @classmethod
    def of(cls, length: int, share: int) -> Tiles:
        """For rows of ``length`` tokens and ``share`` query heads for each key/value head."""
        keys = 128
        while keys < min(length, TILE // 2):
            keys *= 2
        queries = keys
        while queries > 128 and queries * share > TILE:
            queries //= 2
        return cls(queries, keys)


@pytree
@dataclass(frozen=True)
class _Rows:
    """What the kernels know of who sees whom.

    Attributes:
        queries: Segment and parent of each query; -1 for no parent.
        keys: Segment of each key.
        keys_held: The tile of keys to hold for tile i of the queries at step j: j itself where some query sees some key.
        queries_held: The tile of queries to hold for tile i of the keys at step j.

    Both tables end with the place in the row of the first query.
    """

    queries: Int[Array, "b i 2 q"]
    keys: Int[Array, "b t 1"]
    keys_held: Int[Array, " steps"]
    queries_held: Int[Array, " steps"]

    @classmethod
    def of(cls, visible: Visibility, tiles: Tiles, queries: int) -> _Rows:
        """For rows of which ``queries`` tokens, after :attr:`Visibility.first_query`, are queries."""
        first = jnp.int32(0) if visible.first_query is None else visible.first_query.astype(jnp.int32)
        parents = jnp.zeros_like(visible.segments) if visible.parents is None else visible.parents
        segments, parents = (
            _padded(jax.lax.dynamic_slice_in_dim(ids, first, queries, axis=1), tiles) for ids in (visible.segments, parents)
        )
        of_keys = _padded(visible.segments, tiles)
        b = len(of_keys)
        of_queries = (segments, jnp.where(parents == 0, -1, parents))
        tiled = jnp.stack([ids.reshape(b, -1, tiles.queries) for ids in of_queries], axis=2)
        seen = _may_see(tiled, of_keys.reshape(b, -1, tiles.keys), first)
        held = (jnp.append(_held(table), first) for table in (seen, seen.swapaxes(1, 2)))
        return cls(tiled, of_keys[..., None], *held)


def _padded(array: Array, tiles: Tiles) -> Array:
    """Padded along the row to whole tiles."""
    padding = -array.shape[1] % max(tiles.queries, tiles.keys)
    return jnp.pad(array, ((0, 0), (0, padding), *[(0, 0)] * (array.ndim - 2)))


def _may_see(queries: Int[Array, "b i 2 q"], keys: Int[Array, "b j t"], first_query: Int[Array, ""]) -> Bool[Array, "b i j"]:
    """[b, i, j]: False where no query of tile i sees a key of tile j, by the lowest and highest segment of each."""
    least, most = keys.min(-1)[:, None], keys.max(-1)[:, None]
    nobody = jnp.iinfo(queries.dtype).max
    lowest = jnp.where(queries < 0, nobody, queries).min(-1)[..., None]
    highest = queries.max(-1)[..., None]
    meet = ((lowest <= most[:, :, None]) & (highest >= least[:, :, None])).any(2)
    last_query = first_query + (jnp.arange(queries.shape[1]) + 1) * queries.shape[3] - 1
    first_key = jnp.arange(keys.shape[1]) * keys.shape[2]
    return meet & (first_key <= last_query[:, None])


def _held(seen: Bool[Array, "b i j"]) -> Int[Array, "b*i*j"]:
    """For each step its own tile where it is needed, else the one before that is, else the first that is."""
    own = jnp.where(seen, jnp.arange(seen.shape[-1], dtype=jnp.int32), -1)
    before = jax.lax.cummax(own, axis=2)
    first = jnp.argmax(seen, axis=-1, keepdims=True).astype(jnp.int32)
    return jnp.where(before < 0, first, before).reshape(-1)


def refusal(q: Float[Leaf, "b s h x"]) -> str | None:
    """What a TPU kernel lacks for these queries."""
    return "a TPU kernel has no float64" if q.dtype == jnp.float64 else None


def attend(
    q: Float[Array, "b q h x"],
    k: Float[Array, "b t k x"],
    v: Float[Array, "b t k x"],
    visible: Visibility,
    tiles: Tiles | None = None,
) -> Float[Array, "b q h x"]:
    """The contract of :func:`jax_medllm.model.attention.attend`; ``tiles`` other than the default ones are for tests."""
    b, s, h, x = q.shape
    kv_heads = k.shape[2]
    share = h // kv_heads
    tiles = tiles or Tiles.of(s, share)
    rows = _Rows.of(visible, tiles, s)
    q, k, v = (_padded(part, tiles) for part in (q, k, v))
    tiled = q.reshape(b, -1, tiles.queries, kv_heads, share, x).transpose(0, 3, 1, 4, 2, 5)
    stacked = tiled.reshape(b, kv_heads, -1, share * tiles.queries, x)
    out = _flash(stacked, k.swapaxes(1, 2), v.swapaxes(1, 2), rows, tiles)
    return out.reshape(tiled.shape).transpose(0, 2, 4, 1, 3, 5).reshape(b, -1, h, x)[:, :s]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(
    q: Float[Array, "b k i gq x"], k: Float[Array, "b k t x"], v: Float[Array, "b k t x"], rows: _Rows, tiles: Tiles
) -> Float[Array, "b k i gq x"]:
    return _forward(q, k, v, rows, tiles)[0]


def _forward(q: Array, k: Array, v: Array, rows: _Rows, tiles: Tiles) -> tuple[Array, tuple[Any, ...]]:
    grid = _Grid.of(rows, tiles, k.shape[1], inner_keys=True)
    x, wide = q.shape[-1], jnp.promote_types(q.dtype, jnp.float32)
    statistic = jax.ShapeDtypeStruct((*q.shape[:3], 1, q.shape[3]), wide)
    scratch = [pltpu.VMEM((height, q.shape[3]), wide) for height in (1, 1, x)]
    out, logsumexp = grid.run(
        _forward_kernel, [(q, "query"), (k, "key"), (v, "key")], [(q, "query"), (statistic, "query")], scratch
    )
    out, logsumexp = checkpoint_name(out, KERNEL_OUTPUT), checkpoint_name(logsumexp, KERNEL_OUTPUT)
    return out, (q, k, v, rows, out, logsumexp)


def _backward(tiles: Tiles, kept: tuple[Any, ...], slope: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, rows, out, logsumexp = kept
    x, wide = q.shape[-1], logsumexp.dtype
    shift = (slope.astype(wide) * out.astype(wide)).sum(-1)[..., None, :]
    inputs = [(q, "query"), (k, "key"), (v, "key"), (slope, "query"), (logsumexp, "query"), (shift, "query")]
    grid = _Grid.of(rows, tiles, k.shape[1], inner_keys=True)
    (of_q,) = grid.run(_queries_kernel, inputs, [(q, "query")], [pltpu.VMEM((x, q.shape[3]), wide)])
    grid = _Grid.of(rows, tiles, k.shape[1], inner_keys=False)
    of_k, of_v = grid.run(_keys_kernel, inputs, [(k, "key"), (v, "key")], [pltpu.VMEM((tiles.keys, x), wide)] * 2)
    return of_q, of_k, of_v, None


_flash.defvjp(_forward, _backward)


@dataclass(frozen=True)
class _Grid:
    """The steps of a kernel: all pairs of a tile of queries and one of keys, of every row and key/value head.

    A kernel gathers in scratch what the inner loop yields, over the keys or over the queries, and writes it at its end.
    """

    rows: _Rows
    tiles: Tiles
    shape: tuple[int, int, int, int]
    inner_keys: bool

    @classmethod
    def of(cls, rows: _Rows, tiles: Tiles, kv_heads: int, inner_keys: bool) -> _Grid:
        b, count = rows.queries.shape[:2]
        loops = (count, rows.keys.shape[1] // tiles.keys)
        return cls(rows, tiles, (b, kv_heads, *(loops if inner_keys else loops[::-1])), inner_keys)

    def run(
        self,
        kernel: Callable[..., None],
        inputs: Sequence[tuple[Array, str]],
        outputs: Sequence[tuple[Any, str]],
        scratch: Sequence[Any],
    ) -> Sequence[Array]:
        """Call the kernel on arrays that come in tiles of queries ``[b, k, i, n, m]``, or of keys ``[b, k, t, x]``."""
        ids = [(self.rows.queries, "query segments"), (self.rows.keys, "key segments")]
        held = self.rows.keys_held if self.inner_keys else self.rows.queries_held
        return pl.pallas_call(
            lambda *refs: kernel(_Step(self, *refs[:3]), *refs[3:]),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=self.shape,
                in_specs=[self._spec(*operand) for operand in (*ids, *inputs)],
                out_specs=[self._spec(*operand) for operand in outputs],
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array, _ in outputs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
            interpret=self.tiles.interpret,
        )(held, *(array for array, _ in (*ids, *inputs)))

    def _spec(self, array: Any, kind: str) -> pl.BlockSpec:
        block, place = {
            "query": ((None, None, None, *array.shape[3:]), lambda b, h, i, j: (b, h, i, 0, 0)),
            "key": ((None, None, self.tiles.keys, array.shape[-1]), lambda b, h, i, j: (b, h, j, 0)),
            "query segments": ((None, None, 2, self.tiles.queries), lambda b, h, i, j: (b, i, 0, 0)),
            "key segments": ((None, self.tiles.keys, 1), lambda b, h, i, j: (b, j, 0)),
        }[kind]
        return pl.BlockSpec(
            block, lambda b, h, outer, inner, held: place(b, h, *self.pair(outer, self.held(held, b, outer, inner)))
        )

    def pair(self, outer: Any, inner: Any) -> tuple[Any, Any]:
        """The tile of queries and the tile of keys."""
        return (outer, inner) if self.inner_keys else (inner, outer)

    def held(self, table: Any, b: Any, outer: Any, inner: Any) -> Any:
        """The inner tile that is there at a step."""
        return table[(b * self.shape[2] + outer) * self.shape[3] + inner]


class _Step:
    """One step of a kernel: whether it begins or ends the inner loop, and whether a query of its tiles may see a key."""

    def __init__(self, grid: _Grid, held: Any, query_segments: Any, key_segments: Any):
        b, outer, inner = (pl.program_id(axis) for axis in (0, 2, 3))
        self.first = inner == 0
        self.last = inner == grid.shape[3] - 1
        self.needed = grid.held(held, b, outer, inner) == inner
        self._pair = grid.pair(outer, inner)
        self._first_query = held[grid.shape[0] * grid.shape[2] * grid.shape[3]]
        self._shape = (grid.tiles.keys, grid.tiles.queries)
        self._segments = query_segments, key_segments

    def scores(self, q: Any, k: Any) -> Float[Array, "t gq"]:
        """Scaled scores, ``UNSEEN`` where a key is not seen."""
        own, parent, of_keys = self._segments[0][:1], self._segments[0][1:], self._segments[1][...]
        query = self._first_query + self._pair[0] * self._shape[1] + jax.lax.broadcasted_iota(jnp.int32, self._shape, 1)
        key = self._pair[1] * self._shape[0] + jax.lax.broadcasted_iota(jnp.int32, self._shape, 0)
        sees = ((of_keys == own) | (of_keys == parent)) & (key <= query)
        scores = _matmul(k[...], q[...], 1, 1) * q.shape[1] ** -0.5
        bias = jnp.where(sees, 0.0, UNSEEN).astype(scores.dtype)
        return scores + jnp.concatenate([bias] * (q.shape[0] // self._shape[1]), axis=1)

    def slopes(self, q: Any, k: Any, v: Any, slope: Any, logsumexp: Any, shift: Any) -> tuple[Array, Array]:
        """The weights P, and the gradient of the scores but for their scale: P ∘ (v·slopeᵀ − rowsum(slope ∘ out))."""
        weights = jnp.exp(self.scores(q, k) - logsumexp[...])
        return weights, weights * (_matmul(v[...], slope[...], 1, 1) - shift[...])


def _matmul(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Contract an axis of each, accumulating in fp32 (float64 for float64)."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, precision=matmul_precision(left.dtype), preferred_element_type=wide)


def _forward_kernel(step: _Step, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, *scratch: Any) -> None:
    """out = softmax(scores)·v and log Σ exp(scores), one tile of keys after the other."""
    largest, total, gathered = scratch

    @pl.when(step.first)
    def begin() -> None:
        largest[...] = jnp.full_like(largest, UNSEEN)
        total[...] = jnp.zeros_like(total)
        gathered[...] = jnp.zeros_like(gathered)

    @pl.when(step.needed)
    def gather() -> None:
        scores = step.scores(q, k)
        top = jnp.maximum(largest[...], scores.max(0, keepdims=True))
        weights = jnp.exp(scores - top)
        shrink = jnp.exp(largest[...] - top)
        largest[...] = top
        total[...] = shrink * total[...] + weights.sum(0, keepdims=True)
        gathered[...] = shrink * gathered[...] + _matmul(v[...], weights.astype(v.dtype), 0, 0)

    @pl.when(step.last)
    def end() -> None:
        out[...] = (gathered[...] / total[...]).T.astype(out.dtype)
        logsumexp[...] = largest[...] + jnp.log(total[...])


def _queries_kernel(step: _Step, *refs: Any) -> None:
    """The gradient of a tile of queries: that of the scores times the keys."""
    *inputs, of_q, gathered = refs
    q, k = inputs[:2]

    @pl.when(step.first)
    def begin() -> None:
        gathered[...] = jnp.zeros_like(gathered)

    @pl.when(step.needed)
    def gather() -> None:
        _, of_scores = step.slopes(*inputs)
        gathered[...] += _matmul(k[...], of_scores.astype(k.dtype), 0, 0)

    @pl.when(step.last)
    def end() -> None:
        of_q[...] = (gathered[...] * q.shape[1] ** -0.5).T.astype(of_q.dtype)


def _keys_kernel(step: _Step, *refs: Any) -> None:
    """The gradients of a tile of keys and of values, summed over the queries and the heads that share them."""
    *inputs, of_k, of_v, gathered_k, gathered_v = refs
    q, slope = inputs[0], inputs[3]

    @pl.when(step.first)
    def begin() -> None:
        gathered_k[...] = jnp.zeros_like(gathered_k)
        gathered_v[...] = jnp.zeros_like(gathered_v)

    @pl.when(step.needed)
    def gather() -> None:
        weights, of_scores = step.slopes(*inputs)
        gathered_v[...] += _matmul(weights.astype(slope.dtype), slope[...], 1, 0)
        gathered_k[...] += _matmul(of_scores.astype(q.dtype), q[...], 1, 0)

    @pl.when(step.last)
    def end() -> None:
        of_k[...] = (gathered_k[...] * q.shape[1] ** -0.5).astype(of_k.dtype)
        of_v[...] = gathered_v[...].astype(of_v.dtype)
