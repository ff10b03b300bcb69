"""Twenty optimizer steps of preference training: TRL's DPOTrainer run as users run it in fp32, a torch loop in float64.

The fresh adapter and the batches of every step are read off TRL's trainer. Its log-probabilities are fp32 by construction, so
the float64 trajectory is that of a loop written here with torch's own AdamW, clipping and schedule, over pairs computed one by
one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import get_cosine_schedule_with_warmup

from jax_medllm.train.batches import PreferenceData, Step, single_pairs
from jax_medllm.train.loop import LossFn, preference_loss_fn
from jax_medllm.train.optimizer import warmup_steps
from medllm.config import ModelConfig, PairConfig, PreferenceLoss, TrainingConfig
from medllm.model.adapter import read_adapter
from medllm.model.tokenizer import load_tokenizer
from medllm.preferences.tokenization import tokenize_preferences
from medllm.run import Run
from medllm.stage_config import RpoConfig
from parity_tests.jax_results import open_trainable
from parity_tests.oracle import float64_model
from parity_tests.preference_cases import PAIRS, letters, preferences
from parity_tests.preference_oracle import groups, preference_terms, reference_sums
from parity_tests.tolerances import FLOAT32_TRAJECTORY_ADAPTER, FLOAT32_TRAJECTORY_LOSS, FLOAT64_TRAJECTORY
from parity_tests.trainer_record import record_trainers
from parity_tests.training_cases import LORA, OPTIMIZER, STEPS, TRAINED, check_log, check_tensors, jax_steps, train_from
from torch_ref.rpo import train_preferences


def loss_fn(loss: PreferenceLoss) -> LossFn:
    return partial(preference_loss_fn, loss_config=loss, remat="layer")


def pairs_of(micro_batch: dict[str, torch.Tensor]) -> list[tuple[Any, ...]]:
    """(prompt, chosen, rejected) of the pairs in a batch of TRL's collator: the chosen ones stand in its first half."""

    def split(row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ids = micro_batch["input_ids"][row]
        completion = micro_batch["completion_mask"][row].bool()
        prompt = micro_batch["attention_mask"][row].bool() & ~completion
        return tuple(ids[prompt].tolist()), tuple(ids[completion].tolist())

    count = len(micro_batch["input_ids"]) // 2
    halves = [(split(row), split(row + count)) for row in range(count)]
    return [(prompt, chosen, rejected) for (prompt, chosen), (_, rejected) in halves]


@pytest.mark.parametrize(
    ("kind", "reduction", "batch_size", "accumulation"),
    [
        ("qwen2", "sequence", 1, 5),
        ("qwen2", "micro_batch_tokens", 2, 2),
        ("qwen3", "sequence", 1, 5),
        ("llama 3", "micro_batch_tokens", 2, 2),
    ],
)
def test_more_than_twenty_fp32_steps_follow_trl(tiny_model, tmp_path, monkeypatch, kind, reduction, batch_size, accumulation):
    """Seven epochs of twelve pairs: ``sequence`` is TRL at one pair a micro-batch, the other reduction TRL at any size."""
    training = TrainingConfig(epochs=7, batch_size=batch_size, accumulation=accumulation, seed=7)
    loss = PreferenceLoss(beta=0.5, alpha=2.0, nll_reduction=reduction)
    log = follow_trl(tiny_model(kind=kind), tmp_path, monkeypatch, loss, training)
    assert len(log) > STEPS
    assert len({line["rewards/accuracies"] for line in log}) > 2


@pytest.mark.parametrize(
    "loss", [PreferenceLoss("cdpo", 0.5, label_smoothing=0.2), PreferenceLoss("ipo", 2.0)], ids=lambda loss: loss.name
)
def test_three_fp32_steps_of_another_loss_follow_trl(tiny_model, tmp_path, monkeypatch, loss):
    """So soon the rewards are small differences of large fp32 sums; what they are, ``test_loss_formulas.py`` says."""
    training = TrainingConfig(epochs=1, batch_size=1, accumulation=4, seed=7)
    assert len(follow_trl(tiny_model(), tmp_path, monkeypatch, loss, training, rewards=False)) == 3


def follow_trl(
    base, tmp_path, monkeypatch, loss: PreferenceLoss, training: TrainingConfig, *, rewards: bool = True
) -> list[dict[str, float]]:
    """Train with the reference engine, then with the JAX engine from the same adapter over the same batches, and compare.

    Returns:
        TRL's log.
    """
    letters().save_pretrained(tmp_path / "tokenizer")
    model = ModelConfig(str(base), tokenizer=str(tmp_path / "tokenizer"), dtype="float32")
    pairs = PairConfig(PAIRS.max_chosen, PAIRS.max_rejected, "pair", PAIRS.max_length)
    config = RpoConfig(
        *(model, str(tmp_path / "torch"), "memory"), loss=loss, pairs=pairs, lora=LORA, optimizer=OPTIMIZER, training=training
    )
    record = record_trainers(monkeypatch)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    summary = train_preferences(
        *(model, tokenizer, tokenize_preferences(tokenizer, preferences(), pairs), config, Run(config.run, config))
    )

    data = PreferenceData(single_pairs(groups()), training)
    units = {next(group.pair_tokens()): index for index, group in enumerate(data.groups)}
    assert len(units) == len(data.groups) == 12
    data.steps = record.order(units, pairs_of)
    own = Run(tmp_path / "jax", config)
    found = train_from(base, record.adapter, loss_fn(loss), data, own)
    log = record.log_history
    check_log(own.metrics(), log, FLOAT32_TRAJECTORY_LOSS, ("loss", "grad_norm", "learning_rate"))
    compared = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies") if rewards]
    check_log(own.metrics(), log, FLOAT32_TRAJECTORY_LOSS, compared)
    assert log[0]["rewards/margins"] == 0 < abs(log[-1]["rewards/margins"])
    check_tensors(found, load_file(f"{summary.adapter}/adapter_model.safetensors"), FLOAT32_TRAJECTORY_ADAPTER)
    return log


@pytest.mark.parametrize("kind", TRAINED)
def test_twenty_float64_steps_over_whole_problems_are_those_over_their_pairs(float64, tiny_model, tiny_adapter, kind):
    """JAX computes a problem's prompt and responses once; the torch loop computes every pair by itself."""
    base = tiny_model(kind=kind)
    adapter = tiny_adapter(base)
    loss = PreferenceLoss(beta=0.5, alpha=2.0)
    # Problems of one pair and of three, each a micro-batch: their shares of a step differ.
    data = PreferenceData(groups(), TrainingConfig(batch_size=1, accumulation=2))
    data.steps = [Step(0, ((1,), (2,))), Step(0, ((2,), (1,)))] * (STEPS // 2)

    oracle = float64_model(base, adapter, trainable=True)
    pairs = [list(group.pair_tokens()) for group in groups()]
    references = [[reference_sums(oracle, pair) for pair in problem] for problem in pairs]
    trained = {name.replace(".default", ""): p for name, p in oracle.named_parameters() if p.requires_grad}
    rate, decay = OPTIMIZER.learning_rate, OPTIMIZER.weight_decay
    adamw = torch.optim.AdamW(trained.values(), lr=rate, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=decay)
    schedule = get_cosine_schedule_with_warmup(adamw, warmup_steps(OPTIMIZER, STEPS), STEPS)

    norms = []
    jax_side = list(jax_steps(open_trainable(base, adapter, jnp.float64), loss_fn(loss), data))
    for number, (step, (metrics, _, _)) in enumerate(zip(data.steps, jax_side, strict=True), start=1):
        adamw.zero_grad()
        total = 0.0
        count = data.units(step)
        for (problem,) in step.micro_batches:
            dpo, nll = preference_terms(oracle, pairs[problem], references[problem], loss)
            value = (dpo + loss.alpha * nll) * len(pairs[problem]) / count
            value.backward()
            total += value.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), OPTIMIZER.clip_norm)))
        FLOAT64_TRAJECTORY.assert_close(metrics.loss.loss, total, f"step {number}: loss")
        FLOAT64_TRAJECTORY.assert_close(metrics.grad_norm, norms[-1], f"step {number}: gradient norm")
        FLOAT64_TRAJECTORY.assert_close(metrics.learning_rate, schedule.get_last_lr()[0], f"step {number}: learning rate")
        adamw.step()
        schedule.step()
    assert min(norms) < OPTIMIZER.clip_norm < max(norms)
    _, found, adam = jax_side[-1]
    check_tensors(found, {name: parameter.detach() for name, parameter in trained.items()}, FLOAT64_TRAJECTORY)
    for moment, state in (("exp_avg", adam.mu), ("exp_avg_sq", adam.nu)):
        expected = {name: adamw.state[parameter][moment] for name, parameter in trained.items()}
        check_tensors(state, expected, FLOAT64_TRAJECTORY, moment)
    start = read_adapter(adapter).tensors
    assert min(np.abs(value - start[name]).max() for name, value in found.items()) > 1e-3, "every tensor has moved"
