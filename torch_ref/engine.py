"""The reference engine: what :class:`medllm.engine.Generates`, ``Scores`` and :class:`medllm.training.Trains` ask for."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from medllm.config import MeshConfig, ModelConfig, PreferenceRecipe, Recipe, Sampling
from medllm.corpus.packing import PackedRows
from medllm.engine import Continuation, Generation
from medllm.model.endings import read_endings
from medllm.model.tokenizer import Prompt
from medllm.preferences.tokenization import TokenizedPreferences
from medllm.run import Run
from medllm.training import TrainSummary
from torch_ref.cpt import train_cpt
from torch_ref.generate import generate, logprobs
from torch_ref.model import check_model, open_model, open_tokenizer
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

    def with_weights(self, folder: str) -> TorchEngine:
        """See :class:`medllm.training.Trains`."""
        other = copy.copy(self)
        other._release()
        other.config = dataclasses.replace(self.config, path=folder, adapter=None)
        return other

    def train_cpt(self, rows: PackedRows, recipe: Recipe, run: Run) -> TrainSummary:
        """See :func:`torch_ref.cpt.train_cpt`."""
        self._release()
        return train_cpt(self.config, rows, recipe, run)

    def train_preferences(self, preferences: TokenizedPreferences, recipe: PreferenceRecipe, run: Run) -> TrainSummary:
        """See :func:`torch_ref.rpo.train_preferences`."""
        self._release()
        return train_preferences(self.config, self.tokenizer, preferences.texts, recipe, run)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Generation]]:
        """See :func:`torch_ref.generate.generate`."""
        return generate(self.model, self.tokenizer, prompts, sampling, self._endings, batch_size, progress)

    def logprobs(self, continuations: Sequence[Continuation], batch_size: int = 32) -> list[np.ndarray]:
        """See :func:`torch_ref.generate.logprobs`."""
        return logprobs(self.model, self.tokenizer, continuations, batch_size)

    def _release(self) -> None:
        self.__dict__.pop("model", None)
