"""The loss of continued pretraining over micro-batches with unequal numbers of targets, against the Trainer's own code.

The Trainer counts the targets of a whole optimizer step (``num_items_in_batch``) and divides each micro-batch's sum by that:
the step's loss is one token mean, not a mean of means.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from peft import PeftModel
from transformers import Qwen2ForCausalLM

from jax_medllm.model.decoder import LoraParam
from jax_medllm.train.batches import Step, cpt_step
from jax_medllm.train.loop import cpt_loss_fn
from jax_medllm.weights.adapters import adapter_tensors
from medllm.config import OptimizerConfig, TrainingConfig
from medllm.run import Run
from parity_tests.cpt_cases import documents, float64_loss, stock_trainer
from parity_tests.jax_results import open_trainable
from parity_tests.oracle import float64_model
from parity_tests.tolerances import FLOAT32_FORWARD, FLOAT32_GRADIENT, FLOAT64_FORWARD, FLOAT64_GRADIENT
from parity_tests.torch_results import adapter_gradients
from parity_tests.training_cases import check_tensors

# Three micro-batches of two rows, the last one short: (targets differ, and so do the numbers of rows)
STEP = Step(0, ((0, 1), (7, 3), (8,)))
TRAINING = TrainingConfig(batch_size=2, accumulation=3)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_micro_batches_and_their_gradients_add_up_as_in_the_trainer(tiny_model, tiny_adapter, tmp_path, dtype):
    base = tiny_model()
    adapter = tiny_adapter(base)
    if dtype == "float64":
        model, more = float64_model(base, adapter, trainable=True), {"compute_loss_func": float64_loss}
        forward, backward = FLOAT64_FORWARD, FLOAT64_GRADIENT
    else:
        stock = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)
        model, more = PeftModel.from_pretrained(stock, adapter, is_trainable=True), {}
        forward, backward = FLOAT32_FORWARD, FLOAT32_GRADIENT
    trainer = stock_trainer(model, base, OptimizerConfig(), TRAINING, Run(tmp_path, TRAINING), **more)
    micro_batches = [trainer.data_collator([trainer.train_dataset[i] for i in rows]) for rows in STEP.micro_batches]
    batches, items = trainer.get_batch_samples(iter(micro_batches), len(micro_batches), torch.device("cpu"))
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=items) for batch in batches]
    sum(losses).backward()

    with jax.enable_x64(dtype == "float64"):
        graph, trainable, rest = nnx.split(open_trainable(base, adapter, jnp.dtype(dtype)), LoraParam, ...)
        arrays = jax.tree.map(jnp.asarray, cpt_step(documents(), STEP))

        @jax.jit
        def one(trainable, batch):
            return jax.value_and_grad(lambda lora: cpt_loss_fn(nnx.merge(graph, lora, rest), batch)[0])(trainable)

        parts = [one(trainable, batch) for batch in arrays]
        for number, ((found, _), expected) in enumerate(zip(parts, losses, strict=True)):
            forward.assert_close(found, expected.detach(), f"micro-batch {number}")
        gradients = jax.tree.map(lambda *leaves: sum(leaves), *(gradient for _, gradient in parts))
        check_tensors(adapter_tensors(nnx.merge(graph, gradients, rest)), adapter_gradients(model), backward)
    counts = [documents().targets[list(rows)].sum() for rows in STEP.micro_batches]
    assert len(set(counts)) == 3
    assert items == sum(counts)
