"""What a stock trainer does, read off it while it runs: first adapter, batches of every step, optimizer, log."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from jax_medllm.train.batches import Step

MOMENTS_AFTER = (1, 10)


@dataclass
class TrainerRecord:
    """The last training of a transformers Trainer or a TRL trainer.

    Attributes:
        adapter: The adapter before the first step, under the names of its file.
        steps: The micro-batches of each optimizer step as the trainer's own data loader gave them.
        moments: After 1 and 10 steps: the number of steps AdamW counted, and its two moments of each tensor.
    """

    adapter: dict[str, np.ndarray] = field(default_factory=dict)
    steps: list[list[dict[str, torch.Tensor]]] = field(default_factory=list)
    moments: dict[int, tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]] = field(default_factory=dict)
    trainer: Any = None

    @property
    def log_history(self) -> list[dict[str, float]]:
        """What the trainer logged, step by step; without its closing summary."""
        return [line for line in self.trainer.state.log_history if "loss" in line]

    def order(self, units: Mapping[Hashable, int], key: Any) -> list[Step]:
        """The steps as indices of units.

        Args:
            units: Key of a unit → its index.
            key: From a micro-batch to the keys of its units.
        """
        return [Step(0, tuple(tuple(units[unit] for unit in key(micro_batch)) for micro_batch in step)) for step in self.steps]

    def observe(self, trainer: Any) -> None:
        """Look at a trainer that is about to fetch the batches of its next step."""
        self.trainer = trainer
        if not self.steps:
            self.adapter = {name: parameter.detach().numpy().copy() for name, parameter in _trained(trainer)}
        if len(self.steps) in MOMENTS_AFTER:
            states = {name: trainer.optimizer.state[parameter] for name, parameter in _trained(trainer)}
            first, second = (
                {name: state[moment].numpy().copy() for name, state in states.items()} for moment in ("exp_avg", "exp_avg_sq")
            )
            (count,) = {int(state["step"]) for state in states.values()}
            self.moments[len(self.steps)] = count, first, second


def record_trainers(monkeypatch: pytest.MonkeyPatch) -> TrainerRecord:
    """Record whatever trainer runs until ``monkeypatch`` is undone."""
    record, fetch = TrainerRecord(), Trainer.get_batch_samples

    def recorded(trainer: Any, *arguments: Any) -> Any:
        record.observe(trainer)
        batches, items = fetch(trainer, *arguments)
        record.steps.append(batches)
        return batches, items

    monkeypatch.setattr(Trainer, "get_batch_samples", recorded)
    return record


def _trained(trainer: Any) -> list[tuple[str, torch.nn.Parameter]]:
    parameters = trainer.model.named_parameters()
    return [(name.replace(".default", ""), parameter) for name, parameter in parameters if parameter.requires_grad]
