"""cuDNN's flash attention: NVIDIA GPUs, bf16 and fp16.

Causality is cuDNN's own, so that it skips what lies above the diagonal. Who else is not seen goes in as a mask of
``[b, 1, s, s]``: cuDNN knows documents by their lengths from Hopper on only, and groups not at all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_medllm.mesh.pytree import Leaf
from jax_medllm.model.attention.shares import attend_prefix
from jax_medllm.model.attention.visibility import Visibility


def refusal(q: Float[Leaf, "b s h x"]) -> str | None:
    """What cuDNN lacks for these queries, on any GPU from Ampere on."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not in {q.dtype}"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"its heads are at most 128 wide and a multiple of 8, not {q.shape[-1]}"
    return None


def attend(
    q: Float[Array, "b q h x"], k: Float[Array, "b t k x"], v: Float[Array, "b t k x"], visible: Visibility
) -> Float[Array, "b q h x"]:
    """The contract of :func:`jax_medllm.model.attention.attend`."""
    return _attend(q, k, v, visible) if visible.first_query is None else attend_prefix(_attend, q, k, v, visible)


def _attend(q: Array, k: Array, v: Array, visible: Visibility) -> Array:
    length, whole = q.shape[1], visible.first_query is None
    q, k, v = (_even(part) for part in (q, k, v))
    indices = jnp.arange(q.shape[1]) if whole else visible.first_query + jnp.arange(q.shape[1])
    # Whole rows are causal in cuDNN's own terms, which skips what lies above the diagonal; a part of one is in the mask's.
    ids = Visibility(_even(visible.segments), None if visible.parents is None else _even(visible.parents))
    mask = ids.mask(indices, jnp.arange(k.shape[1]))[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=whole, implementation="cudnn")[:, :length]


def _even(array: Array) -> Array:
    """Padded along the row to an even length: the backward pass takes no other."""
    return jnp.pad(array, ((0, 0), (0, array.shape[1] % 2), *[(0, 0)] * (array.ndim - 2)))
