r"""Hidden states → per-token log-probabilities, without ever holding the logits of a whole sequence.

A token's log-probability depends on its own hidden state only, so its gradient is known as soon as its logits are:

.. math:: \frac{\partial \log p_t}{\partial h} = W_t - \sum_v \mathrm{softmax}(W h)_v W_v

The forward pass of a differentiated call therefore computes this direction together with the log-probability, chunk by
chunk, and keeps it (as large as the hidden states, in fp32) instead of the logits: two matrix products in all, none recomputed.
The head is frozen in LoRA training and gets no gradient.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_medllm.batches import ResponseBatch
from jax_medllm.model import Qwen2

_LOGITS_IN_FLIGHT = 2**24
"""Logits held at a time (64 MiB in fp32): large enough to keep a matrix unit busy, small against the activations."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logprobs(
    hidden: Float[Array, "b s d"],
    head: Float[Array, "v d"],
    targets: Int[Array, "b s"],
    logits_in_flight: int = _LOGITS_IN_FLIGHT,
) -> Float[Array, "b s"]:
    """Log-probability of ``targets[i, j]`` under ``softmax(head @ hidden[i, j])``.

    Args:
        hidden: Final hidden states; position j already predicts ``targets[:, j]``.
        head: Output embedding. Frozen: its gradient is zero by construction, not computed.
        targets: Token ids.
        logits_in_flight: Bound on the logits held at a time; positions are walked in chunks of that size.

    Returns:
        fp32 log-probabilities (float64 for float64 hidden states), natural log.
    """
    return _over_chunks(partial(_logprobs, head), hidden, targets, head.shape[0], logits_in_flight)


def _forward(hidden, head, targets, logits_in_flight):
    chunk = partial(_logprobs_and_direction, head)
    logprobs, direction = _over_chunks(chunk, hidden, targets, head.shape[0], logits_in_flight)
    return logprobs, (direction, hidden[:0], head)


def _backward(logits_in_flight, residuals, cotangent):
    direction, like, head = residuals
    return (cotangent[..., None] * direction).astype(like.dtype), jnp.zeros_like(head), None


token_logprobs.defvjp(_forward, _backward)


def response_logprobs(
    model: Qwen2, batch: ResponseBatch, *, adapter: bool = True, remat: bool = False
) -> Float[Array, "n*c t"]:
    """Per-token log-probabilities of every response, its prompt computed once for all responses of the problem.

    A problem is one row ``prompt | response | response …``. The prompt is segment 1, the responses are segments 2, 3, …
    that also see segment 1 and whose positions go on from the prompt's end. What a response sees is therefore what it
    would see in a row of its own.
    """
    n, p = batch.prompts.shape
    _, c, t = batch.responses.shape
    segments = batch.response_mask * (2 + jnp.arange(c))[:, None]
    lengths = batch.prompt_mask.sum(-1)
    prompt_positions = jnp.maximum(jnp.cumsum(batch.prompt_mask, axis=-1) - 1, 0)
    response_positions = jnp.broadcast_to(lengths[:, None, None] + jnp.arange(t), (n, c, t))

    def row(prompt: Array, responses: Array) -> Array:
        return jnp.concatenate([prompt, responses.reshape(n, c * t)], axis=1)

    hidden = model.hidden(
        row(batch.prompts, batch.responses),
        segment_ids=row(batch.prompt_mask, segments),
        positions=row(prompt_positions, response_positions),
        parent_ids=row(jnp.zeros_like(batch.prompts), batch.response_mask),
        adapter=adapter,
        remat=remat,
    )
    last_of_prompt = jnp.broadcast_to(hidden[:, None, p - 1 : p], (n, c, 1, hidden.shape[-1]))
    inside = hidden[:, p:].reshape(n, c, t, -1)[:, :, :-1]
    predicting = jnp.concatenate([last_of_prompt, inside], axis=2).reshape(n * c, t, -1)
    return token_logprobs(predicting, model.head_weight(), batch.responses.reshape(n * c, t))


def _logits(head: Float[Array, "v d"], hidden: Float[Array, "b c d"]) -> Float[Array, "b c v"]:
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("bcd,vd->bcv", hidden, head.astype(hidden.dtype), precision="highest", preferred_element_type=accumulate)


def _pick(logits: Float[Array, "b c v"], targets: Int[Array, "b c"]) -> Float[Array, "b c"]:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _softmax_parts(logits):
    """Largest logit, exponentials relative to it, and their sum. Policy and reference both normalize this way, bit for bit,
    so that a fresh adapter's rewards are zero."""
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    return largest[..., 0], exponentials, exponentials.sum(axis=-1)


def _logprobs(head, hidden, targets):
    logits = _logits(head, hidden)
    largest, _, total = _softmax_parts(logits)
    return _pick(logits, targets) - largest - jnp.log(total)


def _logprobs_and_direction(head, hidden, targets):
    logits = _logits(head, hidden)
    largest, exponentials, total = _softmax_parts(logits)
    logprobs = _pick(logits, targets) - largest - jnp.log(total)
    expected = jnp.einsum(
        "bcv,vd->bcd",
        exponentials.astype(hidden.dtype),
        head.astype(hidden.dtype),
        precision="highest",
        preferred_element_type=logits.dtype,
    )
    return logprobs, head[targets].astype(logits.dtype) - expected / total[..., None]


def _over_chunks(function, hidden, targets, vocab_size, logits_in_flight):
    """``function(hidden, targets)`` over chunks of positions; the batch axis stays whole, so that it can be sharded."""
    batch, length, width = hidden.shape
    chunk = max(1, logits_in_flight // max(1, batch * vocab_size))
    if chunk >= length:
        return function(hidden, targets)
    chunks = -(-length // chunk)
    chunk = -(-length // chunks)
    padding = chunks * chunk - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, chunks, chunk, width)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, chunks, chunk)
    parts = jax.lax.map(lambda part: function(*part), (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0)))

    def join(part):
        return jnp.moveaxis(part, 0, 1).reshape(batch, chunks * chunk, *part.shape[3:])[:, :length]

    return jax.tree.map(join, parts)
