"""Preference training (stage 2): TRL's DPOTrainer, RPO as DPO + alpha · SFT on the preferred response, other losses its own.

    pairs (prompt, chosen, rejected) → DPOTrainer(loss_type=["sigmoid", "sft"], loss_weights=[1, alpha]) → PEFT adapter

TRL removed ``rpo_alpha``; the two weighted terms are its documented successor. The reference is the policy with the adapter
switched off, so no second model is held. Where stage 1's adapter is itself trained further (``handover: continue``), TRL is
given the model with it and keeps a frozen copy beside it as the reference. With ``torch.precompute_reference`` the reference
is computed once for all pairs, before the first step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from datasets import Dataset
from huggingface_hub import constants
from trl import DPOConfig, DPOTrainer

from medllm.config import ModelConfig, PreferenceLoss, PreferenceRecipe
from medllm.host.processes import process_count
from medllm.preferences.pairs import Pair
from medllm.preferences.tokenization import TokenizedPreferences
from medllm.run import Run
from medllm.stages.handover import continued_adapter
from medllm.training import TrainSummary, check_loss
from torch_ref.model import initialize_adapter, open_continued, open_model, peft_config, trainable_base
from torch_ref.run_log import RunLog
from torch_ref.trainer import HasPath, per_process, run_trainer, trainer_arguments

# TRL reports every trainer it constructs to the Hub; training here contacts nobody.
constants.HF_HUB_DISABLE_TELEMETRY = True


def train_preferences(
    model: ModelConfig, tokenizer: Any, preferences: TokenizedPreferences, recipe: PreferenceRecipe, run: Run
) -> TrainSummary:
    """Train a LoRA adapter on pairs and leave it in ``run.path/adapter``; the rate is in pairs a second.

    Args:
        model: What is trained on.
        tokenizer: Its tokenizer.
        preferences: Their pairs, of which TRL makes its own tokens, the same.
        recipe: The stage's settings.
        run: Where log, checkpoints and adapter go.

    Raises:
        UserError: the batch does not divide over the processes, or the model cannot be opened.
    """
    rows = [pair.trl_row() for pair in preferences.texts]
    batch, accumulation = micro_batches(recipe, pairs_per_problem=len(rows) / len(preferences.groups))
    trainer = dpo_trainer(model, tokenizer, rows, recipe, run, batch=batch, accumulation=accumulation)
    # Where the batch was counted in problems, the log says how many pairs a step came to.
    counts = {"pairs_per_step": batch * accumulation * process_count(), "dropped_pairs": preferences.dropped_pairs}
    named = partial(_problems, tokenizer, preferences.texts)
    log = RunLog(run, recipe.training, named, stage="rpo", unit="pairs", per_epoch=len(rows), **counts)
    return run_trainer(trainer, log, run, seconds_ahead=trainer.reference_seconds)


def _problems(tokenizer: Any, pairs: Sequence[Pair], ids: torch.Tensor) -> str:
    """What a user knows the pairs of a micro-batch by: its first half is the chosen responses, each behind its prompt."""
    texts = tokenizer.batch_decode(ids[: len(ids) // 2], skip_special_tokens=True)
    found = dict.fromkeys(pair.problem_id for text in texts for pair in pairs if pair.prompt.strip() in text)
    return f"problems {', '.join(found)}"


@dataclass(frozen=True)
class TrlLoss:
    """A preference loss of DPOTrainer's: its terms with their weights, and the settings that play a part."""

    terms: Callable[[PreferenceLoss], Mapping[str, float]]
    reads: tuple[str, ...] = ("beta",)


def _conservative(loss: PreferenceLoss) -> Mapping[str, float]:
    """cDPO of two terms that DPOTrainer has: with s and t the losses of a label that is right and of one that is wrong,

    (1 - e) s + e t = 2 (1 - e) s - (1 - 2e) robust, where robust = ((1 - e) s - e t) / (1 - 2e).
    """
    return {"sigmoid": 2 * (1 - loss.label_smoothing), "robust": 2 * loss.label_smoothing - 1}


LOSSES: Mapping[str, TrlLoss] = {
    "rpo": TrlLoss(lambda loss: {"sigmoid": 1.0, "sft": loss.alpha}, reads=("beta", "alpha", "nll_reduction")),
    "dpo": TrlLoss(lambda loss: {"sigmoid": 1.0}),
    "cdpo": TrlLoss(_conservative, reads=("beta", "label_smoothing")),
    "robust": TrlLoss(lambda loss: {"robust": 1.0}, reads=("beta", "label_smoothing")),
    "hinge": TrlLoss(lambda loss: {"hinge": 1.0}),
    "ipo": TrlLoss(lambda loss: {"ipo": 1.0}),
    "dpo_norm": TrlLoss(lambda loss: {"sigmoid_norm": 1.0}),
}
"""What ``--loss.name`` is to DPOTrainer. It has no kto_pair; TRL's simpo and orpo are other trainers', with own tokens."""


class ReferenceTimer(DPOTrainer):
    """TRL's trainer; notes the seconds it spends on the reference before training, 0 where each step computes it."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, *arguments: Any, **settings: Any) -> Dataset:
        _round_reference(self.model)
        began = time.monotonic()
        dataset = super()._precompute_ref_logps(*arguments, **settings)
        self.reference_seconds += time.monotonic() - began
        return dataset


def dpo_trainer(
    model: ModelConfig,
    tokenizer: Any,
    rows: list[dict[str, str]],
    recipe: PreferenceRecipe,
    run: HasPath,
    *,
    batch: int,
    accumulation: int,
) -> ReferenceTimer:
    """TRL's trainer over ``rows``, set up as its documentation describes QLoRA and RPO.

    Args:
        model: What is trained on.
        tokenizer: Its tokenizer.
        rows: Columns ``prompt``, ``chosen`` and ``rejected``.
        recipe: The stage's settings.
        run: Where checkpoints go.
        batch: Pairs of one forward pass of one process.
        accumulation: Forward passes added up before a step; TRL takes the mean of their losses.
    """
    arguments = DPOConfig(
        **trainer_arguments(model, recipe.optimizer, recipe.training, run, batch=batch, accumulation=accumulation),
        **loss_arguments(recipe.loss),
        max_length=recipe.pairs.max_length,
        precompute_ref_log_probs=recipe.torch.precompute_reference,
        use_liger_kernel=recipe.torch.liger,
    )
    continued = continued_adapter(model, recipe) is not None
    opened = open_continued(model, recipe.torch) if continued else trainable_base(open_model(model, recipe.torch))
    trainer = ReferenceTimer(
        model=opened,
        ref_model=None,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=None if continued else peft_config(recipe.lora),
    )
    # Over a quantized base TRL casts the adapter to bf16, as the QLoRA paper trains it, and AdamW's moments follow. It is left
    # so: this is what a reader of TRL's documentation gets. Over a dense base the adapter is fp32, as in the JAX engine.
    if continued:
        _round_reference(trainer.model)
    else:
        initialize_adapter(trainer.model, recipe.lora.seed)
    return trainer


def loss_arguments(loss: PreferenceLoss) -> dict[str, Any]:
    """What ``DPOConfig`` calls the loss: TRL's terms, their weights, beta, and the smoothing of those terms that read one.

    Raises:
        UserError: DPOTrainer has no loss of this name, or a setting that it does not read is set.
    """
    check_loss(loss, "torch", {name: one.reads for name, one in LOSSES.items()})
    terms = {term: weight for term, weight in LOSSES[loss.name].terms(loss).items() if weight}
    smoothed = {"label_smoothing": loss.label_smoothing} if "robust" in terms else {}
    return {"loss_type": list(terms), "loss_weights": list(terms.values()), "beta": loss.beta, **smoothed}


def _round_reference(model: peft.PeftModel) -> None:
    """Give TRL's frozen copy ``ref`` the trained adapter's type: where only the latter is cast, the two differ at step 0."""
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.data = parameter.data.to(model.get_parameter(name.replace(".ref.", ".default.")).dtype)


def micro_batches(recipe: PreferenceRecipe, pairs_per_problem: float, processes: int | None = None) -> tuple[int, int]:
    """(pairs of one forward pass of one process, accumulation).

    TRL trains on single pairs: a batch counted in problems becomes their average number of pairs. And its SFT term is a mean
    over all preferred tokens of a micro-batch, where a long response outweighs a short one. With one pair in each micro-batch
    that is the mean over the response's own tokens, and the mean over micro-batches is Pang et al.'s: so ``sequence`` puts
    the batch into accumulation.
    """
    training, share = recipe.training, processes or process_count()
    pairs = training.batch_size
    if recipe.pairs.unit == "problem":
        pairs = share * max(1, round(pairs * pairs_per_problem / share))
    if recipe.loss.nll_reduction == "sequence":
        return 1, per_process(pairs, "--training.batch_size (in pairs)", share) * training.accumulation
    return per_process(pairs, "--training.batch_size (in pairs)", share), training.accumulation
