"""What a training is about to do and what it takes, said before it starts: devices, work, the least time, and room on the disk.

What the step takes of a device's memory is its compiler's to say, and is told when it is compiled.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from medllm.architecture import Architecture
from medllm.config import LoraConfig, ModelConfig, Recipe, TrainingConfig
from medllm.errors import UserError
from medllm.host.memory import size_words
from medllm.host.processes import is_primary_process, preface
from medllm.host.progress import duration
from medllm.model.adapter import module_name
from medllm.model.directory import ModelDirectory
from medllm.plan.calibrating import device_name
from medllm.plan.targets import DEVICES

_FP32 = 4


@dataclass(frozen=True)
class Devices:
    """What a stage runs on.

    Attributes:
        count: Devices in all.
        platform: ``cpu``, or what their makers' drivers go by.
        name: What one calls itself.
        mesh: How they are arranged, where they are.
    """

    count: int
    platform: str
    name: str
    mesh: str = ""

    def words(self) -> str:
        """In a word or two."""
        return f"{self.count} x {self.name}" + (f" as {self.mesh}" if self.mesh else "")

    def least_seconds(self, flops: float) -> float | None:
        """What so many operations take at the peak rate of all devices; None where that is not known (docs/planning.md)."""
        name = device_name({"kind": self.platform, "name": self.name})
        return None if name in (None, "cpu") else flops / (DEVICES[name].flops * self.count)


@dataclass(frozen=True)
class Work:
    """What is trained on.

    Attributes:
        what: In words: ``1,204 rows of 2,048 tokens``.
        tokens: Of all passes over it.
        steps: Optimizer steps.
    """

    what: str
    tokens: int
    steps: int


def announce(
    engine: str, model: ModelConfig, recipe: Recipe, lora: LoraConfig, run: Path, devices: Devices, work: Work
) -> None:
    """Say what a training is about to do; one process of several does.

    Args:
        engine: Its name.
        model: What is trained on.
        recipe: How.
        lora: The adapter, where it is not a fresh one.
        run: The run folder.
        devices: On what.
        work: On which data.

    Raises:
        UserError: there is no room for the checkpoints and the adapter.
    """
    if not is_primary_process():
        return
    training, batch = recipe.training, f"{recipe.training.accumulation} x {recipe.training.batch_size}"
    on = f"{engine} on {devices.words()}: {held_words(model)}, remat {training.remat}"
    try:
        base = ModelDirectory(model.path).described
    except UserError:  # of a family that only the reference engine knows: it says itself what it takes
        preface(on)
        preface(f"{work.what}: {work.steps:,} steps of {batch}")
        preface(f"writing to {run}")
        return
    adapter = adapter_parameters(base, lora)
    least = devices.least_seconds(training_flops(base, work.tokens, training.remat == "layer"))
    time = f"; at least {duration(least)}, by the devices' peak rate" if least is not None else ""
    preface(f"{on}, adapter of {adapter:,} parameters")
    preface(f"{work.what}: {work.steps:,} steps of {batch}{time}")
    needed = checkpoint_bytes(adapter, recipe.optimizer.moments) * checkpoints_kept(training, work.steps) + adapter * _FP32
    check_room(run, needed)
    preface(f"writing to {run}: about {size_words(needed)} with its checkpoints, of {size_words(_free(run))} that are free")


def held_words(model: ModelConfig) -> str:
    """Which weights, and how they are held."""
    return f"{model.path} in {model.dtype}" + (f", {model.quantization}" if model.quantization != "none" else "")


def adapter_parameters(base: Architecture, lora: LoraConfig) -> int:
    """Of an adapter, by the modules that it covers."""
    return sum(
        lora.rank_of(module_name(layer, target)) * sum(projection.shape)
        for layer in range(base.num_layers)
        for target, projection in base.projections.items()
    )


def training_flops(base: Architecture, tokens: int, again: bool) -> float:
    """Operations of the linear layers alone: 2 a weight and token in the forward pass, as many for the gradients of what goes
    in, none for those of the frozen weights, and the forward pass once more where it is computed ``again``."""
    return 2.0 * base.linear_parameters * tokens * (3 if again else 2)


def checkpoint_bytes(adapter: int, moments: int) -> int:
    """Of the adapter and what the optimizer remembers of each parameter, all in fp32."""
    return adapter * _FP32 * (1 + moments)


def checkpoints_kept(training: TrainingConfig, steps: int) -> int:
    """The most that lie in the run folder at a time: one that is being written stands beside those that are kept."""
    if not (training.checkpoint_every or training.checkpoint_minutes):
        return 1
    for_good = steps // training.keep_every if training.keep_every else 0
    return min(training.keep + 1 + for_good, steps)


def check_room(run: Path, needed: float, what: str = "its checkpoints and its adapter") -> None:
    """Refuse a run that its disk has no room for; what the folder holds already counts.

    Raises:
        UserError: says how much is missing.
    """
    there = sum(path.stat().st_size for path in run.rglob("*") if path.is_file() and not path.is_symlink())
    free = _free(run)
    if needed - there > free:
        raise UserError(
            f"{run}: {what} take about {size_words(needed)}, and {size_words(free)} are free on that disk; make room, give "
            "another --run, or lower --training.keep or --lora.rank"
        )


def _free(path: Path) -> int:
    """Bytes that are free on the disk of a folder."""
    return shutil.disk_usage(path if path.exists() else Path(os.path.abspath(path)).parent).free
