"""Log-probabilities under the policy and under the reference: the adapter off, an adapter underneath, as TRL computes them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

from jax_medllm.model.logprobs import response_logprobs
from jax_medllm.train.batches import PreferenceData, Step
from jax_medllm.weights.read import read_model
from medllm.config import ModelConfig, TrainingConfig
from medllm.model.adapter import read_adapter
from medllm.model.directory import ModelDirectory
from medllm.preferences.pairs import trl_rows
from parity_tests import preference_oracle
from parity_tests.jax_results import open_trainable, set_adapter
from parity_tests.oracle import float64_model
from parity_tests.preference_cases import PAIRS, letters, preferences
from parity_tests.preference_oracle import groups
from parity_tests.tolerances import FLOAT64_FORWARD, TRL_FLOAT32_LOSS
from torch_ref.model import open_model, peft_config, trainable_base

BETA = 0.5


def of_responses(model: Any) -> dict[bool, list[list[np.ndarray]]]:
    """adapter on? → problem → response → log-probability of each token; three problems in one batch, prompts shared."""
    data = PreferenceData(groups(), TrainingConfig(batch_size=3, accumulation=1))
    batch = jax.tree.map(jnp.asarray, data.batches(Step(0, ((0, 1, 2),)))[0]).responses
    numbers = np.asarray(batch.responses)
    found = {}
    for adapter in (True, False):
        values = np.asarray(response_logprobs(model, batch, adapter=adapter))
        found[adapter] = [
            [values[row][numbers[row] == number] for number in range(len(group.responses))]
            for row, group in enumerate(groups())
        ]
    return found


def check_responses(found: list[list[np.ndarray]], model: Any, what: str) -> None:
    for group, values in zip(groups(), found, strict=True):
        for number, (response, value) in enumerate(zip(group.responses, values, strict=True)):
            with torch.no_grad():
                expected = preference_oracle.response_logprobs(model, group.prompt, response)
            FLOAT64_FORWARD.assert_close(value, expected, f"{what}: {group.problem_id}, response {number}")


def test_policy_and_reference_are_the_model_with_the_adapter_on_and_off(float64, tiny_model, tiny_adapter):
    base = tiny_model()
    adapter = tiny_adapter(base)
    found = of_responses(open_trainable(base, adapter, jnp.float64))
    check_responses(found[True], float64_model(base, adapter), "policy")
    check_responses(found[False], float64_model(base), "reference")


def test_an_adapter_underneath_belongs_to_the_reference(float64, tiny_model, tiny_adapter):
    base = tiny_model()
    frozen, trained = tiny_adapter(base, seed=1), tiny_adapter(base, rank=2, seed=2)
    given = read_adapter(trained)
    model = read_model(ModelDirectory(base), adapter=read_adapter(frozen), lora=given.lora, dtype=jnp.float64)
    set_adapter(model, given)
    found = of_responses(model)
    check_responses(found[False], float64_model(base, frozen), "reference")
    both: Any = float64_model(base, frozen)
    both.load_adapter(trained, "trained")
    both.double().base_model.set_adapter(["default", "trained"])
    check_responses(found[True], both, "policy")


@pytest.mark.parametrize("underneath", [False, True], ids=["adapter off", "adapter underneath"])
def test_the_reference_of_trl_is_ours(tiny_model, tiny_adapter, tmp_path, underneath):
    """TRL logs log-probabilities and rewards of the policy; the reference's are what lies between them."""
    base = tiny_model()
    frozen = tiny_adapter(base, seed=1) if underneath else None
    adapter = tiny_adapter(base, seed=2)
    given = read_adapter(adapter)
    opened = trainable_base(open_model(ModelConfig(str(base), adapter=str(frozen) if frozen else None, dtype="float32")))
    arguments = DPOConfig(
        output_dir=str(tmp_path), beta=BETA, max_length=PAIRS.max_length, bf16=False, use_cpu=True, report_to="none"
    )
    trainer = DPOTrainer(
        model=opened, args=arguments, train_dataset=Dataset.from_list(trl_rows(preferences(), PAIRS)),
        processing_class=letters(), peft_config=peft_config(given.lora),
    )  # fmt: skip
    assert isinstance(trainer.model, PeftModel)
    set_peft_model_state_dict(trainer.model, load_file(adapter / "adapter_model.safetensors"))
    trainer.model.train()

    model = read_model(ModelDirectory(base), adapter=read_adapter(frozen) if frozen else (), lora=given.lora)
    set_adapter(model, given)
    found = of_responses(model)
    pairs = [(row, pair, start) for row, g in enumerate(groups()) for pair, start in zip(g.pairs, g.pair_starts, strict=True)]
    for (row, pair, start), features in zip(pairs, trainer.train_dataset, strict=True):
        with torch.no_grad():
            trainer.compute_loss(trainer.model, trainer.data_collator([features]))
        logged = {name: values.pop() for name, values in trainer._metrics["train"].items()}
        for side, response in zip(("chosen", "rejected"), pair, strict=True):
            policy, reference = (found[on][row][response][start:].sum() for on in (True, False))
            theirs = logged[f"logps/{side}"]
            TRL_FLOAT32_LOSS.assert_close(policy, theirs, f"policy, {side}")
            TRL_FLOAT32_LOSS.assert_close(reference, theirs - logged[f"rewards/{side}"] / BETA, f"reference, {side}")
            assert abs(policy - reference) > 1e-2
