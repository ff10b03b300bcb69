"""TRL's own code for preference losses, called in float64 on log-probabilities that are given.

What computes a loss in TRL is a method of a trainer that first asks a model. Here the trainer is made without its constructor,
with the attributes the method reads, and the model hands out what it is given: the first token of a row is its number. So
nothing of a formula is written here, nor what TRL makes of tokens before it comes to one.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from medllm.config import PreferenceLoss
from torch_ref.rpo import loss_arguments


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of k pairs' responses: rows i and k + i are the chosen and the rejected one of pair i.

    Attributes:
        policy: Of each token, [2k, s]; zero behind a response's end.
        reference: Summed over each response, [2k].
        mask: Where the tokens are, [2k, s].
    """

    policy: np.ndarray
    reference: np.ndarray
    mask: np.ndarray

    @property
    def pairs(self) -> int:
        """k."""
        return len(self.policy) // 2

    def of(self, pair: int) -> Scored:
        """One of the pairs alone."""
        rows = [pair, self.pairs + pair]
        return Scored(self.policy[rows], self.reference[rows], self.mask[rows])


@dataclass(frozen=True)
class Result:
    """A loss, its gradient with respect to each token's log-probability, and what TRL logs."""

    loss: float
    gradient: np.ndarray
    logged: dict[str, float]


def dpo_trainer_result(scored: Scored, loss: PreferenceLoss) -> Result:
    """DPOTrainer's, of the terms that the reference engine asks it for."""
    return _dpo_result(scored, **loss_arguments(loss))


def smoothed_pairs_result(scored: Scored, loss: PreferenceLoss) -> Result:
    """The loss that DPOTrainer calls ``aot``, pair by pair: of a single pair it sorts nothing, and smooths its label."""
    settings = {"loss_type": ["aot"], "beta": loss.beta, "label_smoothing": loss.label_smoothing}
    return one_by_one(scored, lambda one: _dpo_result(one, **settings))


def one_by_one(scored: Scored, result: Callable[[Scored], Result]) -> Result:
    """The mean over pairs, each a micro-batch."""
    parts = [result(scored.of(pair)) for pair in range(scored.pairs)]
    gradient = np.concatenate([[part.gradient[row] for part in parts] for row in (0, 1)]) / scored.pairs
    logged = {name: float(np.mean([part.logged[name] for part in parts])) for name in parts[0].logged}
    return Result(float(np.mean([part.loss for part in parts])), gradient, logged)


def _dpo_result(scored: Scored, **settings: Any) -> Result:
    trainer = _trainer(
        DPOTrainer, loss_types=settings.pop("loss_type"), beta=settings.pop("beta"),
        loss_weights=settings.pop("loss_weights", [1.0]), label_smoothing=settings.pop("label_smoothing", 0.0),
        ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False,
    )  # fmt: skip
    assert not settings
    model = _Model(scored)
    inputs = model.inputs(range(2 * scored.pairs))
    halves = torch.tensor(scored.reference).chunk(2)
    loss = trainer._compute_loss(model, {**inputs, "ref_chosen_logps": halves[0], "ref_rejected_logps": halves[1]}, False)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("rewards/")}
    return model.result(loss, logged)


def kto_trainer_result(scored: Scored, loss: PreferenceLoss) -> Result:
    """KTOTrainer's, once over the chosen and once over the rejected responses; the others tell it the divergence."""
    model, k = _Model(scored), scored.pairs
    losses, logged = [], {}
    for label, own, other in ((True, range(k), range(k, 2 * k)), (False, range(k, 2 * k), range(k))):
        trainer = _trainer(
            KTOTrainer, loss_type="kto", beta=loss.beta, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0
        )
        inputs = {**model.inputs(own), **{f"KL_{name}": value for name, value in model.inputs(other).items()}}
        inputs |= {"label": torch.full((k,), label), "ref_logps": torch.tensor(scored.reference[list(own)])}
        losses.append(
            trainer._compute_loss(model, {**inputs, "ref_KL_logps": torch.tensor(scored.reference[list(other)])}, False)
        )
        logged |= {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("rewards/")}
    return model.result((losses[0] + losses[1]) / 2, logged)


def cpo_trainer_result(scored: Scored, loss: PreferenceLoss) -> Result:
    """CPOTrainer's SimPO."""
    settings = {"loss_type": "simpo", "beta": loss.beta, "simpo_gamma": loss.gamma, "cpo_alpha": 0.0, "alpha": 0.0}
    trainer = _trainer(CPOTrainer, **settings, label_smoothing=0.0, pad_token_id=0, is_encoder_decoder=False)
    return _unreferenced(trainer, scored)


def orpo_trainer_result(scored: Scored, loss: PreferenceLoss) -> Result:
    """ORPOTrainer's. Its likelihood covers the prompt from its second token on, and here a prompt is of one token."""
    trainer = _trainer(ORPOTrainer, beta=loss.beta, padding_value=0, is_encoder_decoder=False)
    with _no_rounding_to_fp32():
        return _unreferenced(trainer, scored)


def _unreferenced(trainer: Any, scored: Scored) -> Result:
    model, k = _Model(scored), scored.pairs
    batch = {}
    for name, rows in (("chosen", range(k)), ("rejected", range(k, 2 * k))):
        inputs = model.inputs(rows)
        labels = torch.where(inputs["completion_mask"], inputs["input_ids"], -100)
        batch |= {f"{name}_input_ids": inputs["input_ids"], f"{name}_attention_mask": inputs["attention_mask"]}
        batch[f"{name}_labels"] = labels
    loss, logged = trainer.get_batch_loss_metrics(model, batch)
    return model.result(loss, logged)


class _Model:
    """Hands out the log-probabilities of the rows it is asked about: as the fused head does, or by the logits of two tokens."""

    training = True

    def __init__(self, scored: Scored):
        self.mask = torch.tensor(scored.mask)
        self.policy = torch.tensor(scored.policy, requires_grad=True)

    def inputs(self, rows: range) -> dict[str, torch.Tensor]:
        """A prompt of one token, the row's number, and a response of ones."""
        numbers = torch.tensor(list(rows))
        completion = torch.nn.functional.pad(self.mask[numbers], (1, 0))
        ids = torch.cat([numbers[:, None], torch.ones_like(self.mask[numbers], dtype=torch.long)], 1)
        return {
            "input_ids": ids,
            "attention_mask": completion | (torch.arange(ids.shape[1]) == 0),
            "completion_mask": completion,
        }

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        rows = input_ids[:, 0]
        scores = torch.where(self.mask[rows], self.policy[rows], 0.0)
        unused = torch.zeros_like(scores).detach()
        likely = torch.where(self.mask[rows], scores, -1.0)
        logits = torch.nn.functional.pad(torch.stack([torch.log1p(-likely.exp()), likely], -1), (0, 0, 0, 1))
        return SimpleNamespace(
            log_probs=scores, logits=logits, entropy=unused, mean_logits=unused, is_top1=unused.bool(), attention=attention_mask
        )

    def result(self, loss: torch.Tensor, logged: dict[str, float]) -> Result:
        """The loss with its gradient."""
        assert loss.dtype == torch.float64
        loss.backward()
        assert self.policy.grad is not None
        return Result(loss.item(), self.policy.grad.numpy(), {name: float(value) for name, value in logged.items()})


def _trainer(kind: type, **attributes: Any) -> Any:
    """One that was not constructed: a single process, no mixture of experts, the reference computed beforehand."""
    trainer = kind.__new__(kind)
    alone = SimpleNamespace(device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value)
    settings = {"accelerator": alone, "model": SimpleNamespace(training=True), "aux_loss_enabled": False}
    logs = {"_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0, "_tp_size": 1}
    vars(trainer).update(settings, **logs, precompute_ref_logps=True, **attributes)
    return trainer


@contextlib.contextmanager
def _no_rounding_to_fp32() -> Iterator[None]:
    """ORPOTrainer casts its log-probabilities to fp32 before the odds; here they stay as they are."""
    cast = torch.Tensor.float
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else cast(self)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.float = cast  # type: ignore[method-assign]
