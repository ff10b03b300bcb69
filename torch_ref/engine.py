"""The reference engine behind :class:`medllm.engine.Engine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from medllm.config import CptConfig, ModelConfig, RpoConfig, Sampling, TorchConfig
from medllm.corpus.packing import PackedRows
from medllm.engine import Continuation, Generation, Prompt, TrainSummary
from medllm.preferences.records import Preference
from medllm.run import Run
from torch_ref.cpt import train_cpt
from torch_ref.generate import generate, logprobs
from torch_ref.model import check_model, open_model, open_tokenizer
from torch_ref.rpo import train_preferences
from torch_ref.switches import check_switches


class TorchEngine:
    """transformers, bitsandbytes, PEFT and TRL, one process a GPU.

    The folder is checked at once; the weights are read when they are first needed, and training reads them for itself, so a
    process never holds them twice.

    Args:
        model: What to open.
        switches: What training is going to ask for, to be refused at once where it cannot be had.

    Raises:
        UserError: the model, adapter or tokenizer folder cannot be used, or a switch cannot be had here.
    """

    name = "torch"

    def __init__(self, model: ModelConfig, switches: TorchConfig | None = None):
        self.config = model
        check_switches(switches or TorchConfig(), model)
        check_model(model)
        self.tokenizer = open_tokenizer(model)

    @cached_property
    def model(self) -> Any:
        """The opened model: frozen, in evaluation mode."""
        return open_model(self.config)

    def train_cpt(self, rows: PackedRows, config: CptConfig, run: Run) -> TrainSummary:
        """See :func:`torch_ref.cpt.train_cpt`."""
        self._release()
        return train_cpt(rows, config, run)

    def train_preferences(self, preferences: Sequence[Preference], config: RpoConfig, run: Run) -> TrainSummary:
        """See :func:`torch_ref.rpo.train_preferences`."""
        self._release()
        return train_preferences(preferences, config, run)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Generation]]:
        """See :func:`torch_ref.generate.generate`."""
        return generate(self.model, self.tokenizer, prompts, sampling, batch_size, progress)

    def logprobs(self, continuations: Sequence[Continuation], batch_size: int = 32) -> list[np.ndarray]:
        """See :func:`torch_ref.generate.logprobs`."""
        return logprobs(self.model, self.tokenizer, continuations, batch_size)

    def _release(self) -> None:
        self.__dict__.pop("model", None)
