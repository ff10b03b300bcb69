"""Rows whose micro-batches hold unequal numbers of targets, and the two ways a Trainer is given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

from medllm.config import ModelConfig, OptimizerConfig, TrainingConfig
from medllm.corpus.packing import PackedRows, pack
from medllm.run import Run
from parity_tests.tiny_models import VOCAB
from torch_ref.cpt import RowFeatures
from torch_ref.trainer import trainer_arguments


def documents() -> PackedRows:
    """Nine rows of one to four documents, some padded; the numbers of targets differ from row to row."""
    rng = np.random.default_rng(2)
    return pack([rng.integers(0, VOCAB, length) for length in (20, 19, 20, 4, 3, 9, 11, 2, 17, 5, 13, 8, 6, 4, 18)], 20, 0)


def stock_trainer(
    model: Any, base: Path, optimizer: OptimizerConfig, training: TrainingConfig, run: Run, **more: Any
) -> Trainer:
    """transformers' Trainer with the recipe's arguments over :func:`documents`."""
    batch, accumulation = training.batch_size, training.accumulation
    settings = trainer_arguments(
        ModelConfig(str(base), dtype="float32"), optimizer, training, run, batch=batch, accumulation=accumulation
    )
    model.config.use_cache = False
    return Trainer(
        model=model, args=TrainingArguments(**settings), train_dataset=RowFeatures(documents()), data_collator=default_collate,
        **more,
    )  # fmt: skip


def float64_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """transformers' ForCausalLMLoss without its rounding of the logits to fp32."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch
