"""Several optimizer steps of both stages, JAX against transformers' Trainer and TRL's DPOTrainer run as users run them.

The fresh adapter and the order of the data are taken from the reference; everything after that is each stack's own: packing,
masks, losses, accumulation, clipping, AdamW, the schedule. What each step logs and the final adapter are compared.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

from jax_medllm.batches import PreferenceData, Step, cpt_step, single_pairs
from jax_medllm.train import Task, cpt_loss_fn, preference_loss_fn, train
from jax_medllm.weights import adapter_tensors, read_model, set_adapter
from medllm.config import (
    CptConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PairConfig,
    PreferenceLoss,
    RpoConfig,
    TrainingConfig,
)
from medllm.corpus.packing import PackedRows, pack
from medllm.model_directory import ModelDirectory, read_adapter
from medllm.preferences.tokenization import tokenize_group
from medllm.run import Run
from medllm_parity.oracle import float64_model
from medllm_parity.tolerances import FLOAT32_TRAJECTORY_ADAPTER, FLOAT32_TRAJECTORY_LOSS, FLOAT64_TRAJECTORY
from parity_tests.preference_cases import PAIRS, letters, preferences
from parity_tests.tiny_models import VOCAB
from torch_ref.cpt import RowFeatures, train_cpt
from torch_ref.model import add_adapter, open_model
from torch_ref.rpo import train_preferences
from torch_ref.trainer import RunLog, save_adapter, trainer_arguments

LORA = LoraConfig(rank=4, alpha=6.0, seed=5)
# Decay, a schedule that bends, and a clip that binds in some steps and not in others.
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, weight_decay=0.1, warmup_ratio=0.2, clip_norm=12.0)


def documents() -> PackedRows:
    """Nine rows of one to four documents, some padded; the numbers of targets differ from row to row."""
    rng = np.random.default_rng(2)
    return pack([rng.integers(0, VOCAB, length) for length in (20, 19, 20, 4, 3, 9, 11, 2, 17, 5, 13, 8, 6, 4, 18)], 20, 0)


def trainer_order(units: int, training: TrainingConfig) -> list[Step]:
    """The steps transformers' Trainer takes: a seeded permutation each epoch, the last step of an epoch as it comes."""
    steps = []
    size, accumulation = training.batch_size, training.accumulation
    for epoch in range(training.epochs):
        order = torch.randperm(units, generator=torch.Generator().manual_seed(training.seed + epoch)).tolist()
        micro_batches = [tuple(order[start : start + size]) for start in range(0, units, size)]
        steps += [
            Step(epoch, tuple(micro_batches[start : start + accumulation]))
            for start in range(0, len(micro_batches), accumulation)
        ]
    return steps


def jax_training(base: Path, adapter: Path, task: Task, run: Run, dtype: Any) -> dict[str, np.ndarray]:
    """Train from ``adapter`` on; answers with the final adapter."""
    given = read_adapter(adapter)
    lora = LoraConfig(given.rank, given.alpha, given.targets, given.rslora)
    model = read_model(ModelDirectory(base), lora=lora, dtype=dtype)
    set_adapter(model, given)
    train(model, task, OPTIMIZER, TrainingConfig(), run)
    return adapter_tensors(model)


def cpt_task(rows: PackedRows, training: TrainingConfig) -> Task:
    return Task(
        loss_fn=partial(cpt_loss_fn, remat=training.gradient_checkpointing),
        steps=trainer_order(len(rows.tokens), training),
        batch=lambda step: cpt_step(rows, step, training),
        units=lambda step: 1,
        unit="tokens",
        settings={},
    )


def check_log(found: Run, expected: Run, tolerance: Any, names: tuple[str, ...]) -> None:
    assert [line["step"] for line in found.metrics()] == [line["step"] for line in expected.metrics()]
    for name in names:
        tolerance.check([line[name] for line in found.metrics()], [line[name] for line in expected.metrics()], name)


def fresh_adapter(model: ModelConfig, folder: Path) -> Path:
    """The adapter torch_ref starts from, as a PEFT directory."""
    save_adapter(add_adapter(open_model(model), LORA), folder)
    return folder


def float64_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """transformers' ForCausalLMLoss without its rounding of the logits to fp32."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


def test_cpt_in_float64_takes_the_steps_of_transformers_trainer(float64, tiny_model, tiny_adapter, tmp_path):
    """Model, masks, loss, accumulation over unequal token counts, clipping and AdamW, without rounding to hide behind."""
    base = tiny_model()
    adapter = tiny_adapter(base)
    rows, training = documents(), TrainingConfig(epochs=2, batch_size=1, accumulation=2, seed=11)
    config = CptConfig(ModelConfig(str(base), dtype="float32"), str(tmp_path / "torch"), optimizer=OPTIMIZER, training=training)
    run = Run(config.run, config)
    oracle = float64_model(base, adapter, trainable=True)
    oracle.config.use_cache = False
    arguments = TrainingArguments(**trainer_arguments(config.model, OPTIMIZER, training, run, batch=1, accumulation=2))
    trainer = Trainer(
        model=oracle, args=arguments, train_dataset=RowFeatures(rows), data_collator=default_collate,
        callbacks=[RunLog(run, training)], compute_loss_func=float64_loss,
    )  # fmt: skip
    trainer.train()
    expected = {n.replace(".default", ""): p.detach().numpy() for n, p in oracle.named_parameters() if p.requires_grad}

    own = Run(tmp_path / "jax", config)
    found = jax_training(base, adapter, cpt_task(rows, training), own, jnp.float64)
    targets = rows.targets.sum(1)
    assert len(set(targets.tolist())) > 2
    assert len(rows.tokens) % 2 == 1, "an epoch ends in a step of a single row"
    norms = [line["grad_norm"] for line in run.metrics()]
    assert min(norms) < OPTIMIZER.clip_norm < max(norms)
    check_log(own, run, FLOAT64_TRAJECTORY, ("grad_norm", "learning_rate"))
    check_log(own, run, FLOAT32_TRAJECTORY_LOSS, ("loss",))  # the Trainer adds up what it logs in fp32
    assert found.keys() == expected.keys()
    start = read_adapter(adapter).tensors
    for name, value in found.items():
        FLOAT64_TRAJECTORY.check(value, expected[name], name)
        assert np.abs(value - start[name]).max() > 1e-3, "the adapter has moved"


def test_cpt_in_fp32_follows_the_reference_recipe(tiny_model, tmp_path):
    base = tiny_model()
    rows, training = documents(), TrainingConfig(epochs=1, batch_size=1, accumulation=2, seed=4)
    model = ModelConfig(str(base), dtype="float32")
    config = CptConfig(model, str(tmp_path / "torch"), lora=LORA, optimizer=OPTIMIZER, training=training)
    run, own = Run(config.run, config), Run(tmp_path / "jax", config)
    summary = train_cpt(rows, config, run)
    found = jax_training(base, fresh_adapter(model, tmp_path / "start"), cpt_task(rows, training), own, jnp.float32)
    check_log(own, run, FLOAT32_TRAJECTORY_LOSS, ("loss", "grad_norm", "learning_rate"))
    for name, value in load_file(f"{summary.adapter}/adapter_model.safetensors").items():
        FLOAT32_TRAJECTORY_ADAPTER.check(found[name], value, name)


@pytest.mark.parametrize(("reduction", "batch_size", "accumulation"), [("sequence", 1, 5), ("micro_batch_tokens", 2, 2)])
def test_rpo_in_fp32_follows_trl(tiny_model, tmp_path, reduction, batch_size, accumulation):
    """Two epochs of twelve pairs: ``sequence`` is TRL at one pair a micro-batch, the other reduction TRL at any size."""
    base = tiny_model()
    letters().save_pretrained(tmp_path / "tokenizer")
    model = ModelConfig(str(base), tokenizer=str(tmp_path / "tokenizer"), dtype="float32")
    training = TrainingConfig(epochs=2, batch_size=batch_size, accumulation=accumulation, seed=7)
    pairs = PairConfig(PAIRS.max_chosen, PAIRS.max_rejected, "pair", PAIRS.max_length)
    loss = PreferenceLoss(beta=0.5, alpha=2.0, nll_reduction=reduction)
    config = RpoConfig(model, str(tmp_path / "torch"), "memory", loss, pairs, LORA, OPTIMIZER, training)
    run, own = Run(config.run, config), Run(tmp_path / "jax", config)
    summary = train_preferences(preferences(), config, run)

    groups = [group for one in preferences() if (group := tokenize_group(letters(), one, pairs)) is not None]
    data = PreferenceData(single_pairs(groups), training)
    task = Task(
        loss_fn=partial(preference_loss_fn, loss_config=loss),
        steps=trainer_order(len(data.groups), training),
        batch=data.step,
        units=data.pairs,
        unit="pairs",
        settings={},
    )
    found = jax_training(base, fresh_adapter(model, tmp_path / "start"), task, own, jnp.float32)
    assert len(data.groups) == 12
    check_log(own, run, FLOAT32_TRAJECTORY_LOSS, ("loss", "grad_norm", "learning_rate"))
    check_log(own, run, FLOAT32_TRAJECTORY_LOSS, ("rewards/chosen", "rewards/rejected", "rewards/margins"))
    assert run.metrics()[0]["rewards/margins"] == 0 < abs(run.metrics()[-1]["rewards/margins"])
    for name, value in load_file(f"{summary.adapter}/adapter_model.safetensors").items():
        FLOAT32_TRAJECTORY_ADAPTER.check(found[name], value, name)
