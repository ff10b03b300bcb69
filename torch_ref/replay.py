"""A step that was not finite, computed alone: the Trainer is set up as the run had it, and takes no step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medllm.checkpoints import newest_whole
from medllm.config import ModelConfig, PreferenceRecipe, Recipe
from medllm.host.progress import Say
from medllm.replay import Batch, Replay, adapter_words
from torch_ref.cpt import cpt_trainer
from torch_ref.micro_batch import micro_batch, replay
from torch_ref.rpo import dpo_trainer
from torch_ref.run_log import checkpoint_steps
from torch_ref.trainer import OutputFolder


def replay_step(model: ModelConfig, tokenizer: Any, batch: Batch, recipe: Recipe, run: Path, say: Say) -> Iterator[Replay]:
    """See :meth:`medllm.training.Trains.replay`.

    Args:
        model: What is trained on.
        tokenizer: Its tokenizer.
        batch: The step.
        recipe: Of the run.
        run: Its folder.
        say: Told with which adapter.
    """
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = _trainer(model, tokenizer, recipe, OutputFolder(Path(nowhere)), len(batch.parts))
        steps = sorted((step for step in checkpoint_steps(run / "checkpoints") if step < batch.step), reverse=True)
        newest = newest_whole(run / "checkpoints" / f"{PREFIX_CHECKPOINT_DIR}-{step}" for step in steps).newest
        if newest is not None:
            trainer._load_from_checkpoint(str(newest))
        say(adapter_words(int(newest.name.rsplit("-", 1)[1]) if newest else 0, batch.step))
        opened = trainer.accelerator.prepare_model(trainer.model)
        trainer.model_wrapped = opened
        for part, arrays in zip(batch.parts, batch.arrays, strict=True):
            yield replay(
                opened, partial(trainer.training_step, opened), micro_batch(batch, arrays, trainer.accelerator.device), part
            )


def _trainer(model: ModelConfig, tokenizer: Any, recipe: Recipe, output: OutputFolder, accumulation: int) -> Trainer:
    """The stage's trainer; of data it is given none, or a pair of which TRL looks at the columns."""
    if isinstance(recipe, PreferenceRecipe):
        pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
        trainer: Trainer = dpo_trainer(model, tokenizer, [pair], recipe, output, batch=1, accumulation=accumulation)
    else:
        trainer = cpt_trainer(model, None, recipe, output)
    trainer.current_gradient_accumulation_steps = accumulation
    return trainer
