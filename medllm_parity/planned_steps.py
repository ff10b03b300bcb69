"""The optimizer steps that a run's settings and data ask for: which units each takes, in which micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jax_medllm.train.batches import PreferenceData, plan_steps, single_pairs
from medllm.config import PreferenceLoss, PreferenceRecipe, TrainingConfig
from medllm.corpus.packing import PackedRows
from medllm.preferences.tokenization import TokenizedPreferences
from medllm_parity.micro_batches import MicroBatch, PairTokens, cpt_step, preference_micro_batch
from torch_ref.rpo import micro_batches

Units = Sequence[Sequence[int]]
"""Numbers of the units of each micro-batch of a step."""


@dataclass(frozen=True)
class Plan:
    """Every step of a run. ``data`` is packed rows, or of each unit its problem and its pairs."""

    engine: str
    steps: Sequence[Units]
    data: PackedRows | Sequence[tuple[str, Sequence[PairTokens]]]
    loss: PreferenceLoss | None = None

    def batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step number ``step``, from 1."""
        units = self.steps[step - 1]
        if isinstance(self.data, PackedRows):
            return cpt_step(self.data, units)
        return [self._pairs(micro, units) for micro in units]

    def named(self, step: int) -> str:
        """What a user knows its data by."""
        units = [unit for micro in self.steps[step - 1] for unit in micro]
        if isinstance(self.data, PackedRows):
            return self.data.named(units)
        return f"problems {', '.join(dict.fromkeys(self.data[unit][0] for unit in units))}"

    def _pairs(self, micro: Sequence[int], units: Units) -> MicroBatch:
        assert self.loss is not None
        pairs = [pair for unit in micro for pair in self._pairs_of(unit)]
        return preference_micro_batch(pairs, [self._weight(pairs, units)] * len(pairs), self.loss)

    def problems(self) -> Sequence[tuple[str, Sequence[PairTokens]]]:
        """The problem and the pairs of each unit of preference training."""
        assert not isinstance(self.data, PackedRows)
        return self.data

    def _pairs_of(self, unit: int) -> Sequence[PairTokens]:
        return self.problems()[unit][1]

    def _weight(self, pairs: Sequence[PairTokens], units: Units) -> float:
        """Every pair of a step counts the same; to TRL every micro-batch does, and the last of an epoch may be smaller."""
        if self.engine == "torch":
            return 1.0 / (len(units) * len(pairs))
        return 1.0 / sum(len(self._pairs_of(unit)) for micro in units for unit in micro)


def plan_cpt(engine: str, rows: PackedRows, training: TrainingConfig, processes: int = 1) -> Plan:
    """The steps of continued pretraining in so many processes."""
    if engine == "jax":
        steps: Sequence[Units] = [step.micro_batches for step in plan_steps(len(rows.tokens), training)]
    else:
        own = training.batch_size // processes
        steps = _trainer_steps(len(rows.tokens), training, own, training.accumulation, processes)
    return Plan(engine, steps, rows)


def plan_preferences(engine: str, preferences: TokenizedPreferences, recipe: PreferenceRecipe, processes: int = 1) -> Plan:
    """The steps of preference training: a unit is a problem with all its pairs, or a single pair."""
    whole = engine == "jax" and recipe.pairs.unit == "problem"
    groups = list(preferences.groups) if whole else single_pairs(preferences.groups)
    if engine == "jax":
        steps: Sequence[Units] = [step.micro_batches for step in PreferenceData(groups, recipe.training).steps]
    else:
        sizes = micro_batches(recipe, len(groups) / len(preferences.groups), processes)
        steps = _trainer_steps(len(groups), recipe.training, *sizes, processes)
    return Plan(engine, steps, [(group.problem_id, list(group.pair_tokens())) for group in groups], recipe.loss)


def _trainer_steps(units: int, training: TrainingConfig, own: int, accumulation: int, processes: int) -> list[Units]:
    """transformers' Trainer: a permutation an epoch, seeded with seed + epoch (accelerate's SeedableRandomSampler), of which
    every process takes ``own`` units at a time. Of several each gets as many: what the last pass lacks is taken from the
    epoch's beginning (its BatchSamplerShard)."""
    steps: list[Units] = []
    passes, together = accumulation * processes, own * processes
    for epoch in range(training.epochs):
        order = torch.randperm(units, generator=torch.Generator().manual_seed(training.seed + epoch)).tolist()
        while processes > 1 and len(order) % together:
            order += order[: -len(order) % together]
        micro = [order[start : start + own] for start in range(0, len(order), own)]
        steps += [micro[start : start + passes] for start in range(0, len(micro), passes)]
    return steps
