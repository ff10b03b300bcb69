"""The reference engine: what :class:`medllm.engine.Generates`, ``Scores`` and :class:`medllm.training.Trains` ask for."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medllm.config import LoraConfig, MeshConfig, ModelConfig, PreferenceRecipe, Recipe, Sampling
from medllm.corpus.packing import PackedRows
from medllm.engine import Continuation, Generation
from medllm.forecast import Devices, Work, announce, held_words
from medllm.host.memory import watch_device
from medllm.host.processes import process_count
from medllm.host.progress import Progress, Say
from medllm.model.endings import read_endings
from medllm.model.tokenizer import Prompt
from medllm.preferences.tokenization import TokenizedPreferences
from medllm.replay import Batch, Replay
from medllm.run import Run
from medllm.stages.handover import continued_adapter
from medllm.training import TrainSummary
from torch_ref.cpt import train_cpt
from torch_ref.generate import generate, logprobs
from torch_ref.model import check_model, open_model, open_tokenizer
from torch_ref.replay import replay_step
from torch_ref.rpo import loss_arguments, train_preferences
from torch_ref.switches import check_switches
from torch_ref.trainer import checkpoints_layers


class TorchEngine:
    """transformers, bitsandbytes, PEFT and TRL, one process a GPU.

    The folder is checked at once; the weights are read when they are first needed, and training reads them for itself, so a
    process never holds them twice.

    Args:
        model: What to open.
        stage: What is going to be asked for, to be refused at once where it cannot be had.

    Raises:
        UserError: the model, adapter or tokenizer folder cannot be used, or a setting of the stage cannot be had here.
    """

    name = "torch"

    def __init__(self, model: ModelConfig, stage: MeshConfig | None = None):
        self.config = model
        watch_device(peak_device_bytes)
        if isinstance(stage, Recipe):
            check_switches(stage.torch, model)
            checkpoints_layers(stage.training)
        if isinstance(stage, PreferenceRecipe):
            loss_arguments(stage.loss)
        sizes = check_model(model).config
        self.context = sizes.get("max_position_embeddings", sys.maxsize)
        self.tokenizer = open_tokenizer(model, sizes["vocab_size"])
        self._endings = read_endings(self.tokenizer, model.path)

    @cached_property
    def model(self) -> Any:
        """The opened model: frozen, in evaluation mode."""
        return open_model(self.config)

    @property
    def place(self) -> str:
        """See :class:`medllm.engine.Placed`."""
        return f"{self.name} on {self._devices().words()}: {held_words(self.config)}"

    def with_weights(self, folder: str) -> TorchEngine:
        """See :class:`medllm.training.Trains`."""
        other = copy.copy(self)
        other._release()
        other.config = dataclasses.replace(self.config, path=folder, adapter=None)
        return other

    def train_cpt(self, rows: PackedRows, recipe: Recipe, run: Run) -> TrainSummary:
        """See :func:`torch_ref.cpt.train_cpt`."""
        self._release()
        count, length = rows.tokens.shape
        self._announce(recipe, recipe.lora, run, f"{count:,} rows of {length:,} tokens", count, rows.tokens.size)
        return train_cpt(self.config, rows, recipe, run)

    def train_preferences(self, preferences: TokenizedPreferences, recipe: PreferenceRecipe, run: Run) -> TrainSummary:
        """See :func:`torch_ref.rpo.train_preferences`."""
        self._release()
        units = len(preferences.groups) if recipe.pairs.unit == "problem" else preferences.pairs
        continued = continued_adapter(self.config, recipe)
        lora = continued.lora if continued else recipe.lora
        self._announce(recipe, lora, run, preferences.words(), units, preferences.tokens)
        return train_preferences(self.config, self.tokenizer, preferences, recipe, run)

    def replay(self, batch: Batch, recipe: Recipe, run: Path, say: Say) -> Iterator[Replay]:
        """See :class:`medllm.training.Trains`."""
        self._release()
        return replay_step(self.config, self.tokenizer, batch, recipe, run, say)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> list[list[Generation]]:
        """See :func:`torch_ref.generate.generate`."""
        return generate(self.model, self.tokenizer, prompts, sampling, self._endings, batch_size, progress)

    def logprobs(self, continuations: Sequence[Continuation], batch_size: int = 32) -> list[np.ndarray]:
        """See :func:`torch_ref.generate.logprobs`."""
        return logprobs(self.model, self.tokenizer, continuations, batch_size)

    def _devices(self) -> Devices:
        gpu = torch.cuda.is_available()
        return Devices(process_count(), "cuda" if gpu else "cpu", torch.cuda.get_device_name() if gpu else "cpu")

    def _announce(self, recipe: Recipe, lora: LoraConfig, run: Run, what: str, units: int, tokens: int) -> None:
        training = recipe.training
        all_steps = math.ceil(units / (training.batch_size * training.accumulation)) * training.epochs
        steps = min(training.max_steps or all_steps, all_steps)
        work = Work(what, round(tokens * training.epochs * steps / max(1, all_steps)), steps)
        announce(self.name, self.config, recipe, lora, run.path, self._devices(), work)

    def _release(self) -> None:
        self.__dict__.pop("model", None)


def peak_device_bytes() -> int:
    """The most that was in use on this process's GPU; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
