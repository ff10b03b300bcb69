"""Drawing a token from scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_medllm.mesh.layout import constrain

_CANDIDATES = (64, 1024)
"""So many of the most likely tokens are looked at first; all are sorted only where these do not settle a draw."""


def sample_tokens(
    logits: Float[Array, "b v"], uniform: Float[Array, " b"], *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Int[Array, " b"]:
    """One token a row, by inverting the cumulative distribution at ``uniform``.

    Tokens stand in descending order of probability. ``top_k`` keeps the k first; ``top_p`` then the fewest whose
    (renormalized) probability reaches p, as transformers' warpers do. Temperature 0 takes the most likely token.

    Args:
        logits: Scores.
        uniform: A number in [0, 1) for each row.
        temperature: Divides the scores.
        top_k: 0 for all tokens.
        top_p: 1 for all tokens.
    """
    if temperature == 0:
        return _likeliest(logits)
    vocab = logits.shape[-1]
    logits = logits / temperature
    if 0 < top_k < vocab:
        values, ids = jax.lax.top_k(logits, top_k)
        return _draw(jax.nn.softmax(values, axis=-1), ids, uniform, top_p)[0]
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    def look(counts: tuple[int, ...]) -> Int[Array, " b"]:
        # As few as they are, every device has them: XLA would lay them out by their rows, by way of the whole scores.
        values, ids = (constrain(part, None, None) for part in jax.lax.top_k(logits, counts[0]))
        tokens, settled = _draw(jnp.exp(values - total), ids, uniform, top_p)
        if len(counts) == 1:
            return tokens
        return jax.lax.cond(settled.all(), lambda: tokens, lambda: look(counts[1:]))

    return look((*(count for count in _CANDIDATES if count < vocab), vocab))


def _likeliest(logits: Float[Array, "b v"]) -> Int[Array, " b"]:
    """The first of the largest, as argmax has it, by two reductions that a CPU vectorizes, where it does not that of pairs."""
    largest = logits.max(-1, keepdims=True)
    places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where(logits < largest, logits.shape[-1], places).min(-1)


def _draw(
    probabilities: Float[Array, "b c"], ids: Int[Array, "b c"], uniform: Float[Array, " b"], top_p: float
) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """A token of the descending candidates, and whether candidates further down could not have changed it."""
    cumulative = jnp.cumsum(probabilities, axis=-1)
    if top_p < 1:
        kept = cumulative - probabilities < top_p
        goal = uniform * (probabilities * kept).sum(-1)
        settled = cumulative[:, -1] >= top_p
    else:
        kept = jnp.ones_like(probabilities, bool)
        goal = uniform
        settled = cumulative[:, -1] > goal
    place = jnp.minimum((cumulative <= goal[:, None]).sum(-1), kept.sum(-1) - 1)
    return jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0], settled
