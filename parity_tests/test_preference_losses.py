"""RPO and DPO of the JAX engine against TRL's DPOTrainer and against the formula in float64: loss, metrics, every gradient.

TRL computes each pair with a prompt of its own; the JAX engine computes a problem's prompt and each response once. The same
numbers from both are the proof that sharing changes nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from datasets import Dataset
from flax import nnx
from peft import LoraConfig as PeftLoraConfig
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from jax_medllm.model.decoder import LoraParam
from jax_medllm.train.batches import PreferenceBatch, PreferenceData, Step
from jax_medllm.train.loop import preference_loss_fn
from jax_medllm.weights.adapters import adapter_tensors
from medllm.config import ALL_LINEAR, PreferenceLoss, TrainingConfig
from medllm.model.adapter import read_adapter
from medllm.preferences.pairs import trl_rows
from parity_tests.jax_results import open_trainable
from parity_tests.oracle import float64_model
from parity_tests.preference_cases import PAIRS, letters, preferences
from parity_tests.preference_oracle import groups, preference_terms, reference_sums
from parity_tests.tiny_models import WINDOW
from parity_tests.tolerances import FLOAT64_FORWARD, FLOAT64_GRADIENT, TRL_FLOAT32_GRADIENT, TRL_FLOAT32_LOSS
from parity_tests.torch_results import adapter_gradients
from parity_tests.training_cases import check_tensors

LOSSES = [
    PreferenceLoss(beta=0.5, alpha=alpha, nll_reduction=reduction)
    for alpha, reduction in ((0.0, "sequence"), (10.0, "sequence"), (10.0, "micro_batch_tokens"))
]


@pytest.fixture(scope="module")
def model(tiny_model, tiny_adapter):
    base = tiny_model()
    return base, tiny_adapter(base)


def trl_trainer(model, loss: PreferenceLoss, batch: int, folder) -> DPOTrainer:
    """Stock TRL with a PEFT config, then the adapter's weights loaded into it, so that the policy is not the reference."""
    base, adapter = model
    given = read_adapter(adapter)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(folder), loss_type=["sigmoid", "sft"], loss_weights=[1.0, loss.alpha], beta=loss.beta,
            max_length=PAIRS.max_length, per_device_train_batch_size=batch, bf16=False, use_cpu=True, report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(trl_rows(preferences(), PAIRS)),
        processing_class=letters(),
        peft_config=PeftLoraConfig(
            r=given.lora.rank, lora_alpha=given.lora.alpha, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM"
        ),
    )  # fmt: skip
    set_peft_model_state_dict(trainer.model, load_file(adapter / "adapter_model.safetensors"))
    trainer.model.train()
    return trainer


def trl_result(model, loss: PreferenceLoss, folder) -> tuple[float, dict[str, np.ndarray], dict[str, float]]:
    """Loss, gradients and logged metrics of all pairs: one batch, or batches of one pair for the mean over sequences."""
    pairs = len(trl_rows(preferences(), PAIRS))
    size = 1 if loss.nll_reduction == "sequence" else pairs
    trainer = trl_trainer(model, loss, size, folder)
    features = list(trainer.train_dataset)
    assert len(features) == pairs
    total = 0.0
    for start in range(0, pairs, size):
        value = trainer.compute_loss(trainer.model, trainer.data_collator(features[start : start + size]))
        (value * size / pairs).backward()
        total += value.item() * size / pairs
    return (
        total,
        adapter_gradients(trainer.model),
        {name: float(np.mean(values)) for name, values in trainer._metrics["train"].items()},
    )


def jax_result(model, loss: PreferenceLoss, dtype: Any) -> tuple[Any, dict[str, np.ndarray], Any]:
    """Loss, gradients and metrics of the same pairs, three problems in one micro-batch."""
    graph, trainable, frozen = nnx.split(open_trainable(*model, dtype), LoraParam, ...)

    @jax.jit
    def step(trainable, batch):
        def value(trainable):
            return preference_loss_fn(nnx.merge(graph, trainable, frozen), batch, loss)

        return jax.value_and_grad(value, has_aux=True)(trainable)

    (_, metrics), gradients = step(trainable, jax_batch())
    return metrics.loss, adapter_tensors(nnx.merge(graph, gradients, frozen)), metrics


def jax_batch() -> PreferenceBatch:
    data = PreferenceData(groups(), TrainingConfig(batch_size=3, accumulation=1))
    return jax.tree.map(jnp.asarray, data.batches(Step(0, ((0, 1, 2),)))[0])


def test_the_pairs_hold_every_case_that_has_gone_wrong_in_trl():
    assert [len(group.pairs) for group in groups()] == [8, 1, 3]
    responses = [response for group in groups() for response in group.responses]
    assert any(0 in response for response in responses), "a response with token 0"
    assert any(response[-1] != letters().eos_token_id for response in responses), "a response that is cut"
    assert any(start for group in groups() for start in group.pair_starts), "a token merged across the boundary"


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"alpha={loss.alpha:g}-{loss.nll_reduction}")
def test_loss_metrics_and_every_gradient_equal_trls(model, tmp_path, loss):
    expected, expected_gradients, logged = trl_result(model, loss, tmp_path)
    value, gradients, metrics = jax_result(model, loss, jnp.float32)
    TRL_FLOAT32_LOSS.assert_close(value, expected, "loss")
    for name in ("chosen", "rejected", "margins", "accuracies"):
        TRL_FLOAT32_LOSS.assert_close(getattr(metrics.rewards, name), logged[f"rewards/{name}"], name)
    assert 0 < metrics.rewards.accuracies < 1
    assert abs(metrics.rewards.margins) > 1e-3
    TRL_FLOAT32_LOSS.assert_close(metrics.dpo_loss + loss.alpha * metrics.nll, expected, "its two terms")
    assert len(gradients) == 2 * 2 * 7
    check_tensors(gradients, expected_gradients, TRL_FLOAT32_GRADIENT)


@pytest.mark.parametrize("loss", LOSSES[1:], ids=lambda loss: f"alpha={loss.alpha:g}-{loss.nll_reduction}")
def test_loss_and_every_gradient_equal_the_formula_in_float64(float64, model, loss):
    check_against_formula(model, loss)


def test_a_window_reaches_from_every_response_into_the_prompt_they_share(float64, tiny_model, tiny_adapter):
    """It counts positions, and a later response stands further behind the prompt in its row than in its text."""
    windowed = tiny_model(kind="mistral, window")
    assert any(len(group.prompt) >= WINDOW and len(group.responses) > 2 for group in groups())
    check_against_formula((windowed, tiny_adapter(windowed)), LOSSES[1])


def check_against_formula(model, loss: PreferenceLoss) -> None:
    """The three problems, each computed once, against their pairs one by one."""
    oracle = float64_model(*model, trainable=True)
    pairs = [pair for group in groups() for pair in group.pair_tokens()]
    dpo, nll = preference_terms(oracle, pairs, [reference_sums(oracle, pair) for pair in pairs], loss)
    expected = dpo + loss.alpha * nll
    expected.backward()
    value, gradients, metrics = jax_result(model, loss, jnp.float64)
    FLOAT64_FORWARD.assert_close(metrics.dpo_loss, dpo.detach(), "DPO term")
    FLOAT64_FORWARD.assert_close(metrics.nll, nll.detach(), "NLL term")
    FLOAT64_FORWARD.assert_close(value, expected.detach(), "loss")
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype(np.float64)}
    check_tensors(gradients, adapter_gradients(oracle), FLOAT64_GRADIENT)
