r"""Hidden states → per-token log-probabilities, without ever holding the logits of a whole sequence.

A token's log-probability depends on its own hidden state only, so its gradient is known as soon as its logits are:

.. math:: \frac{\partial \log p_t}{\partial h} = W_t - \sum_v \mathrm{softmax}(W h)_v W_v

The forward pass of a differentiated call therefore computes this direction together with the log-probability, chunk by
chunk, and keeps it (as large as the hidden states, in fp32) instead of the logits: two matrix products in all, none recomputed.
A chunk is some positions with the whole vocabulary, because the direction needs the softmax's normalizer.

Every reduction over the vocabulary is a sum or a maximum, so a head whose rows are spread over mesh axes stays where it is:
only arrays of a value, or of a hidden state, per token cross them. On a mesh whose devices share out rows and positions, those
of a chunk come together for the product with the head and part again after it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_medllm.mesh.layout import constrain, in_use
from jax_medllm.model.attention import matmul_precision
from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.model.embedding import lookup
from jax_medllm.model.rows import ResponseBatch
from medllm.axes import Axis
from medllm.config import RematPolicy

_POSITIONS_IN_FLIGHT = 256
"""Positions whose logits are held at a time: enough rows to keep a matrix unit busy, few enough for a CPU's cache."""
_LOGITS_IN_FLIGHT = 2**26
"""Bound on the logits held at a time (256 MiB in fp32), whatever the vocabulary."""


def token_logprobs(
    hidden: Float[Array, "b s d"],
    head: Float[Array, "v d"],
    targets: Int[Array, "b s"],
    counted: Int[Array, "b s"] | Bool[Array, "b s"] | None = None,
    *,
    in_flight: int = _POSITIONS_IN_FLIGHT,
) -> Float[Array, "b s"]:
    """Log-probability of ``targets[i, j]`` under ``softmax(head @ hidden[i, j])``.

    Args:
        hidden: Final hidden states; position j already predicts ``targets[:, j]``.
        head: Output embedding, frozen; its rows may be sharded.
        targets: Token ids.
        counted: Nonzero where a position's value is used. Other positions are 0 without gradient, and what lies beyond the
            last one that counts in any row is not computed. (A position here and there, as at the ends of packed documents,
            costs less than moving the others together.)
        in_flight: Positions whose logits are held at a time, over all rows and devices; at least one of each row, and fewer
            where the vocabulary is so large that their logits would take more than 256 MiB.

    Returns:
        fp32 log-probabilities (float64 for float64 hidden states), natural log.

    Raises:
        TypeError: the head is differentiated; only the hidden states have a gradient.
    """
    batch, length, width = hidden.shape
    pieces, chunk = cut(batch, length, head.shape[0], in_flight)
    in_pieces = (batch, pieces, length // pieces)
    targets, counted = (None if array is None else array.reshape(in_pieces) for array in (targets, counted))
    return _token_logprobs(chunk, hidden.reshape(*in_pieces, width), head, targets, counted).reshape(batch, length)


def cut(batch: int, length: int, vocabulary: int, in_flight: int = _POSITIONS_IN_FLIGHT) -> tuple[int, int]:
    """How :func:`token_logprobs` cuts rows: pieces of each, and positions of a piece in a chunk.

    Devices that share a row hold a piece of it each; every piece is cut into chunks of its own.
    """
    layout = in_use()
    pieces, heads = (layout.shards("sequence"), layout.shards("head_vocab")) if layout else (1, 1)
    pieces = pieces if length % pieces == 0 else 1
    positions = min(in_flight, _LOGITS_IN_FLIGHT * heads // vocabulary)
    chunks = -(-length // pieces // max(1, positions // max(1, batch * pieces)))
    return pieces, -(-length // pieces // max(1, chunks))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(chunk, hidden, head, targets, counted):
    return _over_chunks(partial(_logprobs, head), chunk, hidden, targets, counted)


def _forward(chunk, hidden, head, targets, counted):
    if head.perturbed:
        raise TypeError("token_logprobs has no gradient for the head: differentiate with respect to the hidden states alone")
    values = hidden.value, targets.value, None if counted is None else counted.value
    logprobs, direction = _over_chunks(partial(_logprobs_and_direction, head.value), chunk, *values)
    return logprobs, (direction, hidden.value[:0])


def _backward(_, residuals, cotangent):
    direction, like = residuals
    return (cotangent[..., None] * direction).astype(like.dtype), None, None, None


_token_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)


def response_logprobs(
    model: DenseDecoder, batch: ResponseBatch, *, adapter: bool = True, remat: RematPolicy = "none"
) -> Float[Array, "n s"]:
    """Log-probability of every target of ``batch``, each prompt computed once for all its responses; 0 elsewhere.

    The prompt is segment 1, the responses are segments 2, 3, … that also see segment 1 and whose positions go on from the
    prompt's end. What a response sees is therefore what it would see in a row of its own.
    """
    counted = batch.responses >= 0
    hidden = model.hidden(
        batch.tokens,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        parent_ids=counted.astype(batch.segment_ids.dtype),
        adapter=adapter,
        remat=remat,
    )
    # Targets stand at the end of their row; from there on, nothing beyond the last one in any row is computed.
    from_the_end = (array[:, ::-1] for array in (batch.targets, counted))
    return token_logprobs(hidden[:, ::-1], model.head_weight(), *from_the_end)[:, ::-1]


def _product(equation: str, x: Array, head: Float[Array, "v d"], dtype: jnp.dtype) -> Array:
    """A product with the head at the precision of ``x``, accumulated in ``dtype``."""
    return jnp.einsum(equation, x, head.astype(x.dtype), precision=matmul_precision(x.dtype), preferred_element_type=dtype)


_HELD = ("batch", "sequence", None)
"""Axes of a chunk: rows, pieces of a row, positions of a piece."""


def _logits(head: Float[Array, "v d"], hidden: Float[Array, "b p c d"]) -> Float[Array, "b p c v"]:
    hidden = constrain(hidden, *_HELD, None, first="head_vocab")
    logits = _product("bpcd,vd->bpcv", hidden, head, jnp.promote_types(hidden.dtype, jnp.float32))
    return constrain(logits, *_HELD, "head_vocab", first="head_vocab")


def _pick(logits: Float[Array, "b p c v"], targets: Int[Array, "b p c"]) -> Float[Array, "b p c"]:
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
    return constrain(_pick(logits, targets) - largest - jnp.log(total), *_HELD)


def _logprobs_and_direction(head, hidden, targets):
    logits = _logits(head, hidden)
    largest, exponentials, total = _softmax_parts(logits)
    logprobs = constrain(_pick(logits, targets) - largest - jnp.log(total), *_HELD)
    expected = _product("bpcv,vd->bpcd", exponentials.astype(hidden.dtype), head, logits.dtype)
    expected, total = constrain(expected, *_HELD, None), constrain(total, *_HELD)
    of_target = lookup(head, targets, (Axis("head_vocab", head.shape[0]), Axis("head_width", head.shape[1])), _HELD)
    return logprobs, of_target.astype(logits.dtype) - expected / total[..., None]


def _over_chunks(function, chunk, hidden, targets, counted):
    """``function(hidden, targets)`` over chunks of positions; the axes of rows and pieces stay whole, so that they can be
    sharded.

    A chunk that would reach beyond the piece begins earlier instead and repeats what the one before computed.
    """
    *held, length, _ = hidden.shape
    chunks = -(-length // chunk)
    if counted is not None:
        used = jnp.max(jnp.where(counted, jnp.arange(1, length + 1), 0), initial=0)
        chunks = -(-used // chunk)

    def add(index, results):
        start = jnp.minimum(index * chunk, length - chunk)
        # Said of the slice, lest all rows be gathered before they are sliced.
        taken = (jax.lax.dynamic_slice_in_dim(array, start, chunk, axis=2) for array in (hidden, targets))
        parts = function(*(constrain(part, *_HELD, *[None] * (part.ndim - 3)) for part in taken))
        return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 2), results, parts)

    shapes = jax.eval_shape(function, hidden[:, :, :chunk], targets[:, :, :chunk])
    empty = jax.tree.map(lambda part: jnp.zeros((*held, length, *part.shape[3:]), part.dtype), shapes)
    empty = jax.tree.map(lambda part: constrain(part, *_HELD, *[None] * (part.ndim - 3)), empty)
    results = jax.lax.fori_loop(0, chunks, add, empty)
    if counted is None:
        return results
    return jax.tree.map(lambda part: jnp.where(counted.reshape(*held, length, *(1,) * (part.ndim - 3)), part, 0), results)
