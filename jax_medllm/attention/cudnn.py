"""cuDNN's flash attention: NVIDIA GPUs, bf16 and fp16.

Causality is cuDNN's own, so that it skips what lies above the diagonal. Who else is not seen goes in as a mask of
``[b, 1, s, s]``: cuDNN knows documents by their lengths from Hopper on only, and groups not at all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_medllm.attention.visibility import Visibility


def refusal(q: Float[Array, "b s h x"]) -> str | None:
    """What cuDNN lacks for these queries, on any GPU from Ampere on."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not in {q.dtype}"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"its heads are at most 128 wide and a multiple of 8, not {q.shape[-1]}"
    return None


def attend(
    q: Float[Array, "b s h x"], k: Float[Array, "b s k x"], v: Float[Array, "b s k x"], visible: Visibility
) -> Float[Array, "b s h x"]:
    """The contract of :func:`jax_medllm.attention.attend`."""
    length = q.shape[1]
    odd = length % 2  # the backward pass takes rows of even length only
    q, k, v = (jnp.pad(part, ((0, 0), (0, odd), (0, 0), (0, 0))) for part in (q, k, v))
    visible = jax.tree.map(lambda ids: jnp.pad(ids, ((0, 0), (0, odd))), visible)
    mask = visible.mask(jnp.arange(length + odd), length + odd)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")[:, :length]
