"""Attention in query chunks, in plain XLA: any device, any type, any head width.

A row is cut into a few spans, and a span into chunks. The chunks of a span run one after the other in one loop, so that only
one chunk's scores exist at a time, forward and backward; they read the keys up to the span's end, so that most of what a
causal row never sees is not computed. The number of spans, and with it the program, does not grow with the row.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_medllm.attention.shares import attend_prefix
from jax_medllm.attention.visibility import Visibility

CHUNK = 64
"""Queries attended at a time. Of 32 to 512, the fastest on CPU or within 5 % of it, for rows of 256 to 4,096 tokens."""

SPANS = 4
"""Most spans of a row: (1 + 1/4) / 2 of its square is computed. Twice as many compile for twice as long."""


def refusal(_: Float[Array, "b s h x"]) -> str | None:
    """Nothing is refused."""
    return None


def attend(
    q: Float[Array, "b s h x"], k: Float[Array, "b s k x"], v: Float[Array, "b s k x"], visible: Visibility, chunk: int = CHUNK
) -> Float[Array, "b s h x"]:
    """The contract of :func:`jax_medllm.attention.attend`, ``chunk`` queries or a few less at a time."""
    s = q.shape[1]
    if visible.first_query is not None:
        return attend_prefix(partial(_attend_piece, chunk), q, k, v, visible)
    span = _even_part(s, at_most=2 * chunk, parts=SPANS)
    parts = [
        _attend_span(q[:, start : start + span], k, v, visible, start, min(s, start + span), chunk)
        for start in range(0, s, span)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _attend_piece(chunk: int, q: Array, k: Array, v: Array, visible: Visibility) -> Array:
    """Queries that are not the whole row, to the keys of a prefix of it."""
    return _attend_span(q, k, v, visible, visible.first_query, k.shape[1], chunk)


def _even_part(length: int, at_most: int, parts: int) -> int:
    """Length of a part when ``length`` is cut evenly into parts of ``at_most``, but into no more than ``parts``."""
    return -(-length // min(parts, -(-length // at_most)))


def _attend_span(
    q: Float[Array, "b q h x"],
    k: Float[Array, "b s k x"],
    v: Float[Array, "b s k x"],
    visible: Visibility,
    start: int | Int[Array, ""],
    stop: int,
    chunk: int,
) -> Float[Array, "b q h x"]:
    """What the queries see that stand in the row from ``start`` on, of its first ``stop`` tokens."""
    b, length, h, x = q.shape
    k, v = k[:, :stop], v[:, :stop]
    if length <= chunk:
        return _attend_dense(q, k, v, visible.mask(start + jnp.arange(length), stop))
    size = _even_part(length, at_most=chunk, parts=length)
    chunks = -(-length // size)

    @jax.checkpoint
    def attend_chunk(part: tuple[Float[Array, "b q h x"], Array]) -> Float[Array, "b q h x"]:
        queries, indices = part
        return _attend_dense(queries, k, v, visible.mask(indices, stop))

    filled = jnp.pad(q, ((0, 0), (0, chunks * size - length), (0, 0), (0, 0)))
    apart = jnp.moveaxis(filled.reshape(b, chunks, size, h, x), 1, 0)
    indices = jnp.minimum(start + jnp.arange(chunks * size), stop - 1).reshape(chunks, size)
    together = jnp.moveaxis(jax.lax.map(attend_chunk, (apart, indices)), 0, 1)
    return together.reshape(filled.shape)[:, :length]


def _attend_dense(
    q: Float[Array, "b q h x"], k: Float[Array, "b t k x"], v: Float[Array, "b t k x"], mask: Bool[Array, "b q t"]
) -> Float[Array, "b q h x"]:
    b, s, h, x = q.shape
    kv_heads = k.shape[2]
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(b, s, kv_heads, h // kv_heads, x)
    scores = jnp.einsum("bskgx,btkx->bkgst", grouped, k, precision=matmul_precision(q.dtype), preferred_element_type=accumulate)
    scores = jnp.where(mask[:, None, None], scores * x**-0.5, jnp.finfo(accumulate).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgst,btkx->bskgx", weights, v, precision=matmul_precision(q.dtype))
    return out.reshape(b, s, h, x)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """HIGHEST for fp32 and float64, so that no accelerator silently multiplies in bf16 or TF32; bf16 as it is."""
    return jax.lax.Precision.DEFAULT if jnp.dtype(dtype).itemsize < 4 else jax.lax.Precision.HIGHEST
