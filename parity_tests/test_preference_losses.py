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

from jax_medllm.batches import PreferenceBatch, PreferenceData, Step
from jax_medllm.model import LoraParam
from jax_medllm.train import preference_loss_fn
from jax_medllm.weights import adapter_tensors, read_model, set_adapter
from medllm.config import ALL_LINEAR, LoraConfig, PreferenceLoss, TrainingConfig
from medllm.model_directory import ModelDirectory, read_adapter
from medllm.preferences.pairs import trl_rows
from medllm.preferences.tokenization import tokenize_group
from medllm_parity.oracle import float64_model
from medllm_parity.tolerances import FLOAT64_FORWARD, FLOAT64_GRADIENT, TRL_FLOAT32_GRADIENT, TRL_FLOAT32_LOSS
from parity_tests.preference_cases import PAIRS, letters, preferences

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
            r=given.rank, lora_alpha=given.alpha, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM"
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
    gradients = {n.replace(".default", ""): p.grad.numpy() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return total, gradients, {name: float(np.mean(values)) for name, values in trainer._metrics["train"].items()}


def jax_result(model, loss: PreferenceLoss, dtype: Any) -> tuple[Any, dict[str, np.ndarray], Any]:
    """Loss, gradients and metrics of the same pairs, three problems in one micro-batch."""
    base, adapter = model
    given = read_adapter(adapter)
    lora = LoraConfig(given.rank, given.alpha, given.targets, given.rslora)
    opened = read_model(ModelDirectory(base), lora=lora, dtype=dtype)
    set_adapter(opened, given)
    graph, trainable, frozen = nnx.split(opened, LoraParam, ...)

    @jax.jit
    def step(trainable, batch):
        def value(trainable):
            return preference_loss_fn(nnx.merge(graph, trainable, frozen), batch, loss)

        return jax.value_and_grad(value, has_aux=True)(trainable)

    (_, metrics), gradients = step(trainable, jax_batch())
    return metrics.loss, adapter_tensors(nnx.merge(graph, gradients, frozen)), metrics


def jax_batch() -> PreferenceBatch:
    groups = [group for one in preferences() if (group := tokenize_group(letters(), one, PAIRS)) is not None]
    data = PreferenceData(groups, TrainingConfig(batch_size=len(groups), accumulation=1))
    return jax.tree.map(lambda array: jnp.asarray(array[0]), data.step(Step(0, (tuple(range(len(groups))),))))


def test_the_pairs_hold_every_case_that_has_gone_wrong_in_trl():
    tokenizer = letters()
    groups = [tokenize_group(tokenizer, one, PAIRS) for one in preferences()]
    assert [len(group.pairs) for group in groups] == [8, 1, 3]
    responses = [response for group in groups for response in group.responses]
    assert any(0 in response for response in responses), "a response with token 0"
    assert any(response[-1] != tokenizer.eos_token_id for response in responses), "a response that is cut"
    assert any(start for group in groups for start in group.pair_starts), "a token merged across the boundary"


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"alpha={loss.alpha:g}-{loss.nll_reduction}")
def test_loss_metrics_and_every_gradient_equal_trls(model, tmp_path, loss):
    expected, expected_gradients, logged = trl_result(model, loss, tmp_path)
    value, gradients, metrics = jax_result(model, loss, jnp.float32)
    TRL_FLOAT32_LOSS.check(value, expected, "loss")
    for name in ("chosen", "rejected", "margins", "accuracies"):
        TRL_FLOAT32_LOSS.check(getattr(metrics, name), logged[f"rewards/{name}"], name)
    assert 0 < metrics.accuracies < 1
    assert abs(metrics.margins) > 1e-3
    TRL_FLOAT32_LOSS.check(metrics.dpo_loss + loss.alpha * metrics.nll, expected, "its two terms")
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) == 2 * 2 * 7
    for name, gradient in gradients.items():
        TRL_FLOAT32_GRADIENT.check(gradient, expected_gradients[name], name)


def formula(oracle: Any, loss: PreferenceLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """(DPO term, NLL term) in float64, written from the papers: each sequence alone, nothing shared, nothing padded."""

    def logprobs(prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
        logits = oracle(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
        targets = torch.tensor(response)
        return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    groups = [tokenize_group(letters(), one, PAIRS) for one in preferences()]
    dpo, sequences = [], []
    for prompt, chosen, rejected in (pair for group in groups for pair in group.pair_tokens()):
        policy = [logprobs(prompt, response) for response in (chosen, rejected)]
        with oracle.disable_adapter(), torch.no_grad():
            reference = [logprobs(prompt, response) for response in (chosen, rejected)]
        margin = (policy[0].sum() - reference[0].sum()) - (policy[1].sum() - reference[1].sum())
        dpo.append(torch.log1p(torch.exp(-loss.beta * margin)))
        sequences.append(-policy[0])
    if loss.nll_reduction == "sequence":
        nll = torch.stack([sequence.mean() for sequence in sequences]).mean()
    else:
        nll = torch.cat(sequences).mean()
    return torch.stack(dpo).mean(), nll


@pytest.mark.parametrize("loss", LOSSES[1:], ids=lambda loss: f"alpha={loss.alpha:g}-{loss.nll_reduction}")
def test_loss_and_every_gradient_equal_the_formula_in_float64(float64, model, loss):
    oracle = float64_model(*model, trainable=True)
    dpo, nll = formula(oracle, loss)
    expected = dpo + loss.alpha * nll
    expected.backward()
    value, gradients, metrics = jax_result(model, loss, jnp.float64)
    FLOAT64_FORWARD.check(metrics.dpo_loss, dpo.detach(), "DPO term")
    FLOAT64_FORWARD.check(metrics.nll, nll.detach(), "NLL term")
    FLOAT64_FORWARD.check(value, expected.detach(), "loss")
    wanted = {name.replace(".default", ""): p.grad for name, p in oracle.named_parameters() if p.requires_grad}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == np.float64
        FLOAT64_GRADIENT.check(gradient, wanted[name], name)
