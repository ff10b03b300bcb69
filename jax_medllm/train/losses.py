"""The objectives of both stages: pure functions, one per formula.

Preference losses read summed log-probabilities ``[k, 2]``: k pairs, and (chosen, rejected) as an axis.
:func:`pair_logprobs` gathers them from per-token log-probabilities of the distinct responses, so that a response that
occurs in several pairs is computed once. Every pair carries a weight; weights that sum to one over an optimizer step make
each function a mean over the pairs of that step, and its value can be added up over micro-batches. Padding is a pair of
weight zero.

What ``--loss.name`` may be is the table :data:`OBJECTIVES`, and nothing else knows a preference loss by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from medllm.config import PreferenceLoss
from medllm.errors import UserError


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


class Pairs(NamedTuple):
    """What a preference loss may read of k pairs; (chosen, rejected) is an axis.

    Attributes:
        policy: Summed log-probabilities under the model that is trained.
        reference: The same under the reference; None where the objective needs none.
        lengths: Tokens of both responses, end-of-text included.
        weights: Weight of each pair.
    """

    policy: Float[Array, "k 2"]
    reference: Float[Array, "k 2"] | None
    lengths: Float[Array, "k 2"]
    weights: Float[Array, "k"]


class Rewards(NamedTuple):
    """Weighted means over pairs, defined as TRL's DPOTrainer logs them.

    ``chosen`` and ``rejected`` are the rewards ``beta * (policy - reference)``, ``margins`` their difference; ``accuracies``
    counts pairs whose chosen reward is strictly larger.
    """

    chosen: Float[Array, ""]
    rejected: Float[Array, ""]
    margins: Float[Array, ""]
    accuracies: Float[Array, ""]


def rewards_of(pairs: Pairs, beta: float) -> Rewards:
    """The implicit rewards of pairs that have a reference; no gradient flows."""
    rewards = jax.lax.stop_gradient(beta * (pairs.policy - pairs.reference))
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    return Rewards(
        chosen=(pairs.weights * chosen).sum(),
        rejected=(pairs.weights * rejected).sum(),
        margins=(pairs.weights * (chosen - rejected)).sum(),
        accuracies=(pairs.weights * (chosen > rejected)).sum(),
    )


class DpoMetrics(NamedTuple):
    """What DPO logs."""

    loss: Float[Array, ""]
    rewards: Rewards


def dpo(pairs: Pairs, settings: PreferenceLoss) -> DpoMetrics:
    """Direct preference optimization, :func:`dpo_loss`; of the settings only ``beta`` plays a part."""
    loss = dpo_loss(pairs.policy, pairs.reference, pairs.weights, beta=settings.beta)
    return DpoMetrics(loss, rewards_of(pairs, settings.beta))


class RpoMetrics(NamedTuple):
    """What RPO logs: ``dpo_loss`` and ``nll`` are its two terms before weighting by alpha."""

    loss: Float[Array, ""]
    dpo_loss: Float[Array, ""]
    nll: Float[Array, ""]
    rewards: Rewards


def rpo(pairs: Pairs, settings: PreferenceLoss) -> RpoMetrics:
    r"""Reasoning preference optimization, :math:`\mathrm{DPO} + \alpha\,\mathrm{NLL}(y_c)` (Pang et al. 2024).

    ``alpha = 0`` is plain DPO.
    """
    dpo_term = dpo_loss(pairs.policy, pairs.reference, pairs.weights, beta=settings.beta)
    nll = nll_loss(pairs.policy[:, 0], pairs.lengths[:, 0], pairs.weights, reduction=settings.nll_reduction)
    return RpoMetrics(dpo_term + settings.alpha * nll, dpo_term, nll, rewards_of(pairs, settings.beta))


@dataclass(frozen=True)
class Objective:
    """A preference loss as training knows it.

    Attributes:
        metrics: ``(pairs, settings) -> what is logged``: a named tuple of weighted means, of which ``loss`` is minimized. The
            name of a nested tuple stands before those of its fields: ``rewards/chosen``.
        reference: Whether it reads the reference's log-probabilities, which cost a forward pass or a file of them. Those of the
            policy and the lengths, of the chosen response and of the rejected one, are there for every loss, read or not.
    """

    metrics: Callable[[Pairs, PreferenceLoss], Any]
    reference: bool = True


OBJECTIVES: Mapping[str, Objective] = {"rpo": Objective(rpo), "dpo": Objective(dpo)}
"""The preference losses by the names that ``--loss.name`` has for them."""


def objective(settings: PreferenceLoss) -> Objective:
    """The preference loss that the settings name.

    Raises:
        UserError: there is none of this name.
    """
    if settings.name not in OBJECTIVES:
        known = ", ".join(map(repr, OBJECTIVES))
        raise UserError(f"loss.name is {settings.name!r}: engine jax knows {known}; give one of these")
    return OBJECTIVES[settings.name]
