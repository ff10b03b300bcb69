"""Attention: one contract, whatever computes it.

Which key a query may see is said with small integer arrays, not with a dense mask, so that a backend which needs segment ids
(cuDNN, TPU kernels) and one which needs a mask are called alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visibility:
    """Who sees whom: a query sees a key of its own segment or of its parent segment, at its own slot or before.

    Attributes:
        query_segments: Segment of each query.
        query_slots: Place of each query in the order of the keys (not the rotary position).
        key_segments: Segment of each key; the slot of a key is its index.
        query_parents: Second segment a query sees, 0 for none: the responses of one problem see its prompt, which is
            computed once, and not each other.
    """

    query_segments: Int[Array, "b s"]
    query_slots: Int[Array, "b s"]
    key_segments: Int[Array, "b t"]
    query_parents: Int[Array, "b s"] | None = None

    def mask(self) -> Bool[Array, "b s t"]:
        """True where a query sees a key. Padding (segment 0) sees padding, so that no row of the softmax is empty."""
        keys = self.key_segments[:, None, :]
        same = self.query_segments[:, :, None] == keys
        if self.query_parents is not None:
            parents = self.query_parents[:, :, None]
            same |= (parents == keys) & (parents != 0)
        return same & (jnp.arange(keys.shape[-1]) <= self.query_slots[:, :, None])


def attend(
    q: Float[Array, "b s h x"],
    k: Float[Array, "b t k x"],
    v: Float[Array, "b t k x"],
    visible: Visibility,
) -> Float[Array, "b s h x"]:
    """Scaled dot-product attention with grouped key/value heads; softmax in fp32 (float64 for float64 inputs).

    Query head i reads key/value head ``i // (h / k)``; keys and values are never repeated in memory.
    """
    b, s, h, x = q.shape
    kv_heads = k.shape[2]
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(b, s, kv_heads, h // kv_heads, x)
    scores = jnp.einsum("bskgx,btkx->bkgst", grouped, k, precision=matmul_precision(q.dtype), preferred_element_type=accumulate)
    scores = jnp.where(visible.mask()[:, None, None], scores * x**-0.5, jnp.finfo(accumulate).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgst,btkx->bskgx", weights, v, precision=matmul_precision(q.dtype))
    return out.reshape(b, s, h, x)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """HIGHEST for fp32 and float64, so that no accelerator silently multiplies in bf16 or TF32; bf16 as it is."""
    return jax.lax.Precision.DEFAULT if jnp.dtype(dtype).itemsize < 4 else jax.lax.Precision.HIGHEST
