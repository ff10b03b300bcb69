"""Terms of the objectives of both stages: pure functions of log-probabilities, one per formula.

Preference terms read summed log-probabilities ``[k, 2]``: k pairs, and (chosen, rejected) as an axis.
:func:`pair_logprobs` gathers them from per-token log-probabilities of the distinct responses, so that a response that
occurs in several pairs is computed once. Every pair carries a weight; weights that sum to one over an optimizer step make
each function a mean over the pairs of that step, and its value can be added up over micro-batches. Padding is a pair of
weight zero. What is made of them: :mod:`jax_medllm.train.preference_losses`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int


def cpt_loss(
    logprobs: Float[ArrayLike, "*b"], mask: Float[ArrayLike, "*b"], targets: Float[ArrayLike, ""] | float | None = None
) -> Float[Array, ""]:
    r"""Token mean of the negative log-likelihood, :math:`-\frac{1}{N}\sum_i m_i \log p_i`.

    Args:
        logprobs: Log-probability of each target token.
        mask: 1 for a training target, 0 elsewhere.
        targets: N; the number of targets in the mask when unset. With the number of targets of a whole optimizer step,
            the values of its micro-batches add up to one global token mean (what Hugging Face's Trainer computes).

    Example:
        >>> round(float(cpt_loss(jnp.log(jnp.array([0.5, 0.5, 0.1])), jnp.array([1.0, 1.0, 0.0]))), 4)
        0.6931
    """
    count = mask.sum() if targets is None else targets
    return -(logprobs * mask).sum() / jnp.maximum(count, 1)


def pair_logprobs(
    logprobs: Float[ArrayLike, "n s"],
    responses: Int[ArrayLike, "n s"],
    offsets: Int[ArrayLike, "n s"],
    pairs: Int[ArrayLike, "n k 2"],
    starts: Int[ArrayLike, "n k"],
) -> tuple[Float[Array, "n k 2"], Float[Array, "n k 2"]]:
    """Summed log-probability, and number of tokens, of both responses of each pair.

    Args:
        logprobs: Per-token log-probabilities of the responses of n problems, a row each.
        responses: Which response of its row a token belongs to; negative where it belongs to none.
        offsets: Place of a token in its response.
        pairs: Numbers (chosen, rejected) of the row's responses.
        starts: Leading tokens of both responses that this pair counts to its prompt.
    """
    inside = (responses[:, None, None] == pairs[..., None]) & (offsets[:, None, None] >= starts[..., None, None])
    return jnp.where(inside, logprobs[:, None, None], 0).sum(-1), inside.sum(-1).astype(logprobs.dtype)


def dpo_loss(
    policy: Float[ArrayLike, "k 2"], reference: Float[ArrayLike, "k 2"], weights: Float[ArrayLike, "k"], *, beta: float
) -> Float[Array, ""]:
    r"""Direct preference optimization (Rafailov et al. 2023, eq. 7).

    .. math:: -\sum_i w_i \log\sigma\bigl(\beta\,[(\log\pi_c - \log\rho_c) - (\log\pi_r - \log\rho_r)]_i\bigr)

    Args:
        policy: Summed log-probabilities :math:`\log\pi` of (chosen, rejected) under the trained model.
        reference: The same under the reference, :math:`\log\rho`.
        weights: Weight of each pair; 1/k each for a mean.
        beta: Inverse temperature.

    Where policy and reference agree the value is ln 2 times the sum of the weights.

    Example:
        >>> same = jnp.array([[-3.0, -5.0]])
        >>> round(float(dpo_loss(same, same, jnp.ones(1), beta=0.1)), 4)
        0.6931
    """
    ratios = policy - reference
    return -(weights * jax.nn.log_sigmoid(beta * (ratios[:, 0] - ratios[:, 1]))).sum()


def nll_loss(
    chosen: Float[ArrayLike, "k"],
    lengths: Float[ArrayLike, "k"],
    weights: Float[ArrayLike, "k"],
    *,
    reduction: Literal["sequence", "micro_batch_tokens"],
) -> Float[Array, ""]:
    r"""Negative log-likelihood of the preferred response of each pair.

    ``sequence``: :math:`-\sum_i w_i \log\pi(y_i)/|y_i|`, each response by its own length (Pang et al. 2024, eq. 1).
    ``micro_batch_tokens``: one mean over all preferred tokens of the micro-batch, times the micro-batch's share
    :math:`\sum_i w_i` of the step (TRL's ``sft`` term). A response preferred in two pairs counts twice in both.

    Args:
        chosen: Summed log-probability of the preferred response.
        lengths: Its tokens, end-of-text included.
        weights: Weight of each pair.
        reduction: Which mean.
    """
    if reduction == "sequence":
        return -(weights * chosen / jnp.maximum(lengths, 1)).sum()
    counted = (weights > 0).astype(chosen.dtype)
    mean = (counted * chosen).sum() / jnp.maximum((counted * lengths).sum(), 1)
    return -mean * weights.sum()
