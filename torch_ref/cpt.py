"""Continued pretraining (stage 1): transformers' Trainer over packed rows, QLoRA underneath.

    rows → input_ids, position_ids, labels → Trainer (AdamW, cosine with warmup, clipping) → PEFT adapter

With flash attention the rows of a pass become one long row, because transformers reads document boundaries for it from a single
row only.

The loss is one token mean over all targets of an optimizer step, over accumulation and devices alike: the Trainer counts the
labels of a whole step before it divides. Where the rows do not divide over the devices, accelerate fills an epoch's last batch
with rows from its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate
from transformers import Trainer, TrainingArguments

from medllm.config import ModelConfig, Recipe
from medllm.corpus.packing import PackedRows
from medllm.run import Run
from medllm.training import TrainSummary
from torch_ref.model import add_adapter, open_model
from torch_ref.run_log import RunLog
from torch_ref.trainer import HasPath, per_process, run_trainer, trainer_arguments

_IGNORED = -100


class RowFeatures(Dataset):
    """Packed rows as the features transformers reads document boundaries from.

    There is no attention mask: where none is given and no cache is kept, transformers takes each restart of
    ``position_ids`` for the beginning of a document and lets no token see across it. Padding has position 0 throughout and
    stands at the end of a row, so nothing sees it. The first token of a document has no label: it is not predicted from
    the document before it.
    """

    def __init__(self, rows: PackedRows):
        self._tokens = torch.from_numpy(rows.tokens).long()
        self._positions = torch.from_numpy(rows.positions).long()
        self._labels = self._tokens.masked_fill(~torch.from_numpy(rows.targets), _IGNORED)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokens[index], "position_ids": self._positions[index], "labels": self._labels[index]}


def one_long_row(features: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The rows of a pass end to end, ``[1, rows * length]``: a row begins where positions restart, as a document does."""
    return {name: torch.cat([feature[name] for feature in features])[None] for name in features[0]}


def train_cpt(model: ModelConfig, rows: PackedRows, recipe: Recipe, run: Run) -> TrainSummary:
    """Train a LoRA adapter on ``rows`` and leave it in ``run.path/adapter``; the rate is in tokens a second.

    Raises:
        UserError: the batch does not divide over the processes, or the model cannot be opened.
    """
    trainer = cpt_trainer(model, RowFeatures(rows), recipe, run)
    tokens = int((rows.segment_ids > 0).sum())
    named = partial(_documents, rows)
    log = RunLog(run, recipe.training, named, stage="cpt", unit="tokens", per_epoch=tokens)
    return run_trainer(trainer, log, run)


def cpt_trainer(model: ModelConfig, rows: RowFeatures | None, recipe: Recipe, run: HasPath) -> Trainer:
    """The Trainer over ``rows``, its model opened with a fresh adapter.

    Raises:
        UserError: as for :func:`train_cpt`.
    """
    arguments = TrainingArguments(
        **trainer_arguments(
            model,
            recipe.optimizer,
            recipe.training,
            run,
            batch=per_process(recipe.training.batch_size, "--training.batch_size"),
            accumulation=recipe.training.accumulation,
        ),
        use_liger_kernel=recipe.torch.liger,
    )
    opened = add_adapter(open_model(model, recipe.torch), recipe.lora)
    # A cache would switch off the reading of document boundaries from position_ids.
    opened.config.use_cache = False
    collator = one_long_row if recipe.torch.attention.startswith("flash") else default_collate
    return Trainer(model=opened, args=arguments, train_dataset=rows, data_collator=collator)


def _documents(rows: PackedRows, ids: torch.Tensor) -> str:
    """What a user knows the rows of a micro-batch by: a row is found by its tokens."""
    length = rows.tokens.shape[1]
    return rows.named([int(np.flatnonzero((rows.tokens == row).all(1))[0]) for row in ids.reshape(-1, length).cpu().numpy()])
