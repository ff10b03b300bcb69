"""The preference losses once more, in float64 and by pairs, as their papers have them; shared with neither engine.

Where a paper and TRL differ (IPO's division by length), they are TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from medllm.config import PreferenceLoss

Terms = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Compared:
    """The pairs of a micro-batch; of each tensor the first column is the preferred response's.

    Attributes:
        sums: Log-probabilities summed over the responses, [pairs, 2].
        gains: By how much they are above the reference's, [pairs, 2].
        lengths: Tokens, [pairs, 2].
        weights: The pairs' shares of the step.
        loss: The settings.
    """

    sums: torch.Tensor
    gains: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor
    loss: PreferenceLoss

    def mean(self, losses: torch.Tensor) -> torch.Tensor:
        """The pairs' share of a mean over the step."""
        return (self.weights * losses).sum()

    def margin(self, values: torch.Tensor) -> torch.Tensor:
        """Beta times how far the preferred response is ahead."""
        return self.loss.beta * (values[:, 0] - values[:, 1])

    def nll(self) -> torch.Tensor:
        """The preferred responses' negative log-likelihood a token: a response's own mean, or one over all tokens."""
        chosen, tokens = self.sums[:, 0], self.lengths[:, 0]
        if self.loss.nll_reduction == "sequence":
            return self.mean(-chosen / tokens)
        return -chosen.sum() / tokens.sum() * self.weights.sum()


def _plain(losses: Callable[[Compared], torch.Tensor]) -> Callable[[Compared], Terms]:
    return lambda pairs: {"loss": pairs.mean(losses(pairs))}


def _rpo(pairs: Compared) -> Terms:
    """DPO (Rafailov et al. 2023, eq. 7) + alpha times the NLL (Pang et al. 2024, eq. 1)."""
    dpo, nll = pairs.mean(-logsigmoid(pairs.margin(pairs.gains))), pairs.nll()
    return {"loss": dpo + pairs.loss.alpha * nll, "dpo_loss": dpo, "nll": nll}


def _orpo(pairs: Compared) -> Terms:
    """NLL - lambda log sigmoid of the log odds ratio (Hong et al. 2024, eqs. 6 and 7)."""
    likely = (pairs.sums / pairs.lengths).exp()
    odds = likely / (1 - likely)
    ratio, nll = pairs.mean((odds[:, 1] / odds[:, 0]).log1p()), pairs.nll()
    return {"loss": nll + pairs.loss.beta * ratio, "odds_ratio": ratio, "nll": nll}


def _kto_pair(pairs: Compared) -> torch.Tensor:
    """Ethayarajh et al. 2024, eqs. 6 to 8; the divergence is estimated from the other kind of responses."""
    divergence = pairs.gains.detach().mean(0).clamp(min=0)
    value = (pairs.loss.beta * (pairs.gains[:, 0] - divergence[1])).sigmoid()
    other = (pairs.loss.beta * (divergence[0] - pairs.gains[:, 1])).sigmoid()
    return 1 - (value + other) / 2


def _smoothed(pairs: Compared) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a label that is right, and of one that is wrong, each times how likely it is."""
    margin, wrong = pairs.margin(pairs.gains), pairs.loss.label_smoothing
    return -(1 - wrong) * logsigmoid(margin), -wrong * logsigmoid(-margin)


FORMULAS: Mapping[str, Callable[[Compared], Terms]] = {
    "rpo": _rpo,
    "dpo": _plain(lambda pairs: -logsigmoid(pairs.margin(pairs.gains))),
    "cdpo": _plain(lambda pairs: sum(_smoothed(pairs), torch.tensor(0.0))),
    "robust": _plain(lambda pairs: (_smoothed(pairs)[0] - _smoothed(pairs)[1]) / (1 - 2 * pairs.loss.label_smoothing)),
    "hinge": _plain(lambda pairs: (1 - pairs.margin(pairs.gains)).clamp(min=0)),
    "ipo": _plain(lambda pairs: (pairs.margin(pairs.gains / pairs.lengths) - 0.5).square() / pairs.loss.beta**2),
    "dpo_norm": _plain(lambda pairs: -logsigmoid(pairs.margin(pairs.gains / pairs.lengths))),
    "kto_pair": _plain(_kto_pair),
    "simpo": _plain(lambda pairs: -logsigmoid(pairs.margin(pairs.sums / pairs.lengths) - pairs.loss.gamma)),
    "orpo": _orpo,
}
"""What is logged of a loss, by its name: ``loss``, and its terms where it has several."""
