"""Twenty optimizer steps of continued pretraining against transformers' Trainer.

The fresh adapter and the batches of every step are read off the Trainer; everything after that is each stack's own: masks,
loss, accumulation, clipping, AdamW, the schedule. Compared are what each step logs, AdamW's state and the final adapter.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_medllm.train.batches import CptData
from jax_medllm.train.loop import cpt_loss_fn
from medllm.config import ModelConfig, TrainingConfig
from medllm.model.adapter import read_adapter
from medllm.run import Run
from medllm.stage_config import CptConfig
from parity_tests.cpt_cases import documents, float64_loss, stock_trainer
from parity_tests.jax_results import open_trainable
from parity_tests.oracle import float64_model
from parity_tests.tolerances import FLOAT32_TRAJECTORY_ADAPTER, FLOAT32_TRAJECTORY_LOSS, FLOAT64_TRAJECTORY
from parity_tests.trainer_record import MOMENTS_AFTER, TrainerRecord, record_trainers
from parity_tests.training_cases import LORA, OPTIMIZER, STEPS, TRAINED, check_log, check_tensors, jax_steps, train_from
from torch_ref.cpt import train_cpt

# Nine rows, two to a step: five steps an epoch, the last of a single row.
TRAINING = TrainingConfig(epochs=4, batch_size=1, accumulation=2, seed=11)
LOSS = partial(cpt_loss_fn, remat=TRAINING.remat)


def data_of(record: TrainerRecord) -> CptData:
    """The rows in the Trainer's own batches."""
    rows = documents()
    units = {tuple(tokens): index for index, tokens in enumerate(rows.tokens.tolist())}
    return CptData(rows, record.order(units, lambda batch: [tuple(tokens) for tokens in batch["input_ids"].tolist()]))


@pytest.mark.parametrize("kind", TRAINED)
def test_twenty_float64_steps_are_those_of_transformers_trainer(float64, tiny_model, tiny_adapter, tmp_path, monkeypatch, kind):
    """Model, masks, loss, accumulation over unequal token counts, clipping and AdamW, without rounding to hide behind."""
    base = tiny_model(kind=kind)
    adapter = tiny_adapter(base)
    model = float64_model(base, adapter, trainable=True)
    record = record_trainers(monkeypatch)
    stock_trainer(model, base, OPTIMIZER, TRAINING, Run(tmp_path, TRAINING), compute_loss_func=float64_loss).train()
    expected = {name.replace(".default", ""): p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}

    data = data_of(record)
    assert len(data.steps) == STEPS
    assert len(set(documents().targets.sum(1).tolist())) > 2
    assert {len(step.micro_batches) for step in data.steps} == {1, 2}
    log = record.log_history
    norms = [line["grad_norm"] for line in log]
    assert min(norms) < OPTIMIZER.clip_norm < max(norms)
    steps = list(jax_steps(open_trainable(base, adapter, jnp.float64), LOSS, data))
    seen = 0
    for line, (metrics, _, adam) in zip(log, steps, strict=True):
        step = line["step"]
        # The Trainer adds up the losses it logs in fp32.
        FLOAT32_TRAJECTORY_LOSS.assert_close(metrics.loss.loss, line["loss"], f"step {step}: loss")
        FLOAT64_TRAJECTORY.assert_close(metrics.grad_norm, line["grad_norm"], f"step {step}: gradient norm")
        FLOAT64_TRAJECTORY.assert_close(metrics.learning_rate, line["learning_rate"], f"step {step}: learning rate")
        if step in MOMENTS_AFTER:
            count, first, second = record.moments[step]
            assert adam.count == count == step
            check_tensors(adam.mu, first, FLOAT64_TRAJECTORY, f"step {step}: first moment of")
            check_tensors(adam.nu, second, FLOAT64_TRAJECTORY, f"step {step}: second moment of")
            seen += 1
    assert seen == len(MOMENTS_AFTER)
    found = steps[-1][1]
    check_tensors(found, expected, FLOAT64_TRAJECTORY)
    start = read_adapter(adapter).tensors
    assert min(np.abs(value - start[name]).max() for name, value in found.items()) > 1e-3, "every tensor has moved"


@pytest.mark.parametrize("kind", TRAINED)
def test_twenty_fp32_steps_follow_the_reference_recipe(tiny_model, tmp_path, monkeypatch, kind):
    base = tiny_model(kind=kind)
    model = ModelConfig(str(base), dtype="float32")
    config = CptConfig(model, str(tmp_path / "torch"), lora=LORA, optimizer=OPTIMIZER, training=TRAINING)
    record = record_trainers(monkeypatch)
    summary = train_cpt(model, documents(), config, Run(config.run, config))
    own = Run(tmp_path / "jax", config)
    found = train_from(base, record.adapter, LOSS, data_of(record), own)
    assert len(record.steps) == STEPS
    check_log(own.metrics(), record.log_history, FLOAT32_TRAJECTORY_LOSS, ("loss", "grad_norm", "learning_rate"))
    check_tensors(found, load_file(f"{summary.adapter}/adapter_model.safetensors"), FLOAT32_TRAJECTORY_ADAPTER)
