r"""The preference losses: what ``--loss.name`` may be is the table :data:`OBJECTIVES`, and nothing else knows one by its name.

Each is a function of pairs and settings that gives what is logged, ``loss`` among it: a weighted mean over the pairs of a step,
in parts that add up over its micro-batches. In the formulas :math:`w_i` is the weight of pair i, :math:`c` its chosen response
and :math:`r` its rejected one, :math:`|y|` the tokens of a response, end-of-text included. Of summed log-probabilities under
the trained model :math:`\pi` and the reference :math:`\rho`, a response has gained :math:`\delta = \log\pi - \log\rho`, and
:math:`\Delta = \delta_c - \delta_r`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_medllm.train.losses import dpo_loss, nll_loss
from medllm.config import PreferenceLoss
from medllm.training import check_loss


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


class PairMetrics(NamedTuple):
    """What a loss of one term logs, where it has a reference."""

    loss: Float[Array, ""]
    rewards: Rewards


def dpo(pairs: Pairs, settings: PreferenceLoss) -> PairMetrics:
    """Direct preference optimization, :func:`jax_medllm.train.losses.dpo_loss`."""
    loss = dpo_loss(pairs.policy, pairs.reference, pairs.weights, beta=settings.beta)
    return PairMetrics(loss, rewards_of(pairs, settings.beta))


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
    nll = _nll(pairs, settings)
    return RpoMetrics(dpo_term + settings.alpha * nll, dpo_term, nll, rewards_of(pairs, settings.beta))


def cdpo(pairs: Pairs, settings: PreferenceLoss) -> PairMetrics:
    r"""Conservative DPO: a share :math:`\varepsilon` of the labels is taken to be wrong (Mitchell 2023).

    .. math:: -\sum_i w_i \bigl[(1-\varepsilon) \log\sigma(\beta\Delta_i) + \varepsilon \log\sigma(-\beta\Delta_i)\bigr]

    It is smallest where :math:`\sigma(\beta\Delta) = 1-\varepsilon`, not at infinity.
    """
    right, wrong = _log_odds(settings.beta * _margins(pairs))
    return _referenced(pairs, settings, -(1 - settings.label_smoothing) * right - settings.label_smoothing * wrong)


def robust(pairs: Pairs, settings: PreferenceLoss) -> PairMetrics:
    r"""Robust DPO: unbiased where a share :math:`\varepsilon` of the labels is wrong (Chowdhury et al. 2024, arXiv 2403.00409).

    .. math:: -\sum_i \frac{w_i}{1 - 2\varepsilon}
        \bigl[(1-\varepsilon) \log\sigma(\beta\Delta_i) - \varepsilon \log\sigma(-\beta\Delta_i)\bigr]
    """
    right, wrong = _log_odds(settings.beta * _margins(pairs))
    clean = (1 - settings.label_smoothing) * right - settings.label_smoothing * wrong
    return _referenced(pairs, settings, -clean / (1 - 2 * settings.label_smoothing))


def hinge(pairs: Pairs, settings: PreferenceLoss) -> PairMetrics:
    r"""A hinge in place of DPO's logistic (Zhao et al. 2023, arXiv 2305.10425; Liu et al. 2023, arXiv 2309.06657).

    .. math:: \sum_i w_i \max(0, 1 - \beta\Delta_i)
    """
    return _referenced(pairs, settings, jax.nn.relu(1 - settings.beta * _margins(pairs)))


def ipo(pairs: Pairs, settings: PreferenceLoss) -> PairMetrics:
    r"""Identity preference optimization (Azar et al. 2023, eq. 17), of log-ratios per token; beta is the paper's :math:`\tau`.

    .. math:: \sum_i w_i \Bigl(\frac{\delta_c}{|c|} - \frac{\delta_r}{|r|} - \frac{1}{2\beta}\Bigr)_i^2

    The paper writes sums; TRL divides by the lengths, as its authors told that they did.
    """
    return _referenced(pairs, settings, (_margins(pairs, per_token=True) - 1 / (2 * settings.beta)) ** 2)


def dpo_norm(pairs: Pairs, settings: PreferenceLoss) -> PairMetrics:
    r"""Length-normalized DPO (Lambert et al. 2024, Tülu 3; TRL's ``sigmoid_norm``): log-ratios per token.

    .. math:: -\sum_i w_i \log\sigma\Bigl(\beta\,\Bigl[\frac{\delta_c}{|c|} - \frac{\delta_r}{|r|}\Bigr]_i\Bigr)

    Log-ratios per token are small, so beta is larger than DPO's: 5 in the paper.
    """
    return _referenced(pairs, settings, -jax.nn.log_sigmoid(settings.beta * _margins(pairs, per_token=True)))


def kto_pair(pairs: Pairs, settings: PreferenceLoss) -> PairMetrics:
    r"""Kahneman-Tversky optimization over pairs (Ethayarajh et al. 2024), both weights 1, as TRL's ``kto_pair`` was.

    .. math:: \sum_i \tfrac{w_i}{2} \bigl[2 - \sigma(\beta\,(\delta_{c,i} - z_r)) - \sigma(\beta\,(z_c - \delta_{r,i}))\bigr]

    Its point of reference is the divergence from the reference model,
    :math:`z = \max(0, \operatorname{mean} \delta)`, for either kind from the other responses of the same micro-batch, and no
    gradient flows through it. So the size of a micro-batch counts, and pairs of several problems should be in one.
    """
    ratios = pairs.policy - pairs.reference
    share = pairs.weights / jnp.maximum(pairs.weights.sum(), jnp.finfo(ratios.dtype).tiny)
    z_chosen, z_rejected = jax.lax.stop_gradient(jax.nn.relu(share @ ratios))
    desirable = jax.nn.sigmoid(settings.beta * (ratios[:, 0] - z_rejected))
    undesirable = jax.nn.sigmoid(settings.beta * (z_chosen - ratios[:, 1]))
    return _referenced(pairs, settings, 1 - (desirable + undesirable) / 2)


class LogProbs(NamedTuple):
    """Weighted means over pairs of the log-probability per token of either response."""

    chosen: Float[Array, ""]
    rejected: Float[Array, ""]


class Comparison(NamedTuple):
    """Weighted means over pairs: beta times the difference of log-probabilities per token, and how often it is positive."""

    margins: Float[Array, ""]
    accuracies: Float[Array, ""]


class SimpoMetrics(NamedTuple):
    """What a loss of one term logs, where it has no reference."""

    loss: Float[Array, ""]
    logps: LogProbs
    rewards: Comparison


def simpo(pairs: Pairs, settings: PreferenceLoss) -> SimpoMetrics:
    r"""Simple preference optimization (Meng et al. 2024, eq. 6): no reference, a margin :math:`\gamma` to be reached.

    .. math:: -\sum_i w_i \log\sigma\Bigl(\beta\,\Bigl[\frac{\log\pi_c}{|c|} - \frac{\log\pi_r}{|r|}\Bigr]_i - \gamma\Bigr)

    Log-probabilities per token are small, so beta is larger than DPO's: 2 to 2.5 in the paper, with gamma about half of it.
    """
    means = _per_token(pairs.policy, pairs)
    margins = settings.beta * (means[:, 0] - means[:, 1]) - settings.gamma
    loss = -(pairs.weights * jax.nn.log_sigmoid(margins)).sum()
    logps, rewards = _compared(pairs, settings)
    return SimpoMetrics(loss, logps, rewards)


class OrpoMetrics(NamedTuple):
    """What ORPO logs: ``odds_ratio`` and ``nll`` are its two terms, the former before weighting by beta."""

    loss: Float[Array, ""]
    odds_ratio: Float[Array, ""]
    nll: Float[Array, ""]
    logps: LogProbs
    rewards: Comparison


def orpo(pairs: Pairs, settings: PreferenceLoss) -> OrpoMetrics:
    r"""Odds-ratio preference optimization (Hong et al. 2024, eqs. 6 and 7): no reference; beta is the paper's :math:`\lambda`.

    .. math:: \mathrm{NLL}(y_c) - \beta \sum_i w_i \log\sigma\Bigl(\log\frac{p_c}{1-p_c} - \log\frac{p_r}{1-p_r}\Bigr)_i,
        \qquad p = \exp\frac{\log\pi}{|y|}

    The likelihood is the preferred response's, as in the paper; TRL takes that of its prompt too.
    """
    # Padding is a response of no token, and one that is certain has odds without end: 0 times that would be no number.
    certain = -jnp.finfo(pairs.policy.dtype).eps
    means = jnp.where(pairs.lengths > 0, jnp.minimum(_per_token(pairs.policy, pairs), certain), -1.0)
    log_odds = means - jax.nn.log1mexp(-means)
    odds_ratio = -(pairs.weights * jax.nn.log_sigmoid(log_odds[:, 0] - log_odds[:, 1])).sum()
    nll = _nll(pairs, settings)
    logps, rewards = _compared(pairs, settings)
    return OrpoMetrics(nll + settings.beta * odds_ratio, odds_ratio, nll, logps, rewards)


def _nll(pairs: Pairs, settings: PreferenceLoss) -> Float[Array, ""]:
    return nll_loss(pairs.policy[:, 0], pairs.lengths[:, 0], pairs.weights, reduction=settings.nll_reduction)


def _per_token(sums: Float[Array, "k 2"], pairs: Pairs) -> Float[Array, "k 2"]:
    return sums / jnp.maximum(pairs.lengths, 1)


def _margins(pairs: Pairs, *, per_token: bool = False) -> Float[Array, "k"]:
    """How much more the chosen response has gained on the reference than the rejected one, in nats, or in nats a token."""
    ratios = pairs.policy - pairs.reference
    ratios = _per_token(ratios, pairs) if per_token else ratios
    return ratios[:, 0] - ratios[:, 1]


def _log_odds(margins: Float[Array, "k"]) -> tuple[Float[Array, "k"], Float[Array, "k"]]:
    """Log-probabilities that a pair is labelled right, and that it is labelled wrong (Bradley and Terry)."""
    return jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)


def _referenced(pairs: Pairs, settings: PreferenceLoss, losses: Float[Array, "k"]) -> PairMetrics:
    return PairMetrics((pairs.weights * losses).sum(), rewards_of(pairs, settings.beta))


def _compared(pairs: Pairs, settings: PreferenceLoss) -> tuple[LogProbs, Comparison]:
    means = jax.lax.stop_gradient(_per_token(pairs.policy, pairs))
    chosen, rejected = pairs.weights @ means
    margins = settings.beta * (means[:, 0] - means[:, 1])
    return LogProbs(chosen, rejected), Comparison((pairs.weights * margins).sum(), (pairs.weights * (margins > 0)).sum())


@dataclass(frozen=True)
class Objective:
    """A preference loss as training knows it.

    Attributes:
        metrics: ``(pairs, settings) -> what is logged``: a named tuple of weighted means, of which ``loss`` is minimized. The
            name of a nested tuple stands before those of its fields: ``rewards/chosen``.
        reads: The settings of :class:`medllm.config.PreferenceLoss` that play a part. Another one is refused when it is set.
        reference: Whether it reads the reference's log-probabilities, which cost a forward pass or a file of them. Those of the
            policy and the lengths, of the chosen response and of the rejected one, are there for every loss, read or not.
    """

    metrics: Callable[[Pairs, PreferenceLoss], Any]
    reads: tuple[str, ...] = ("beta",)
    reference: bool = True


OBJECTIVES: Mapping[str, Objective] = {
    "rpo": Objective(rpo, reads=("beta", "alpha", "nll_reduction")),
    "dpo": Objective(dpo),
    "cdpo": Objective(cdpo, reads=("beta", "label_smoothing")),
    "robust": Objective(robust, reads=("beta", "label_smoothing")),
    "hinge": Objective(hinge),
    "ipo": Objective(ipo),
    "dpo_norm": Objective(dpo_norm),
    "kto_pair": Objective(kto_pair),
    "simpo": Objective(simpo, reads=("beta", "gamma"), reference=False),
    "orpo": Objective(orpo, reads=("beta", "nll_reduction"), reference=False),
}
"""The preference losses by the names that ``--loss.name`` has for them."""


def objective(settings: PreferenceLoss) -> Objective:
    """The preference loss that the settings name.

    Raises:
        UserError: there is none of this name, or a setting that it does not read is set.
    """
    check_loss(settings, "jax", {name: one.reads for name, one in OBJECTIVES.items()})
    return OBJECTIVES[settings.name]
