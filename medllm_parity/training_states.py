"""The states of a training that are known without taking a step: the fresh adapter, and those in the run's checkpoints."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import torch

from medllm.architecture import PROJECTIONS
from medllm.checkpoints import CHECKSUMS, damage
from medllm.config import ALL_LINEAR, LoraConfig
from medllm.errors import UserError
from medllm.model.adapter import module_name, read_adapter, tensor_name
from medllm.model.directory import ModelDirectory
from medllm.verify.adamw import Tensors, TrainingState

_TORCH = "checkpoint-"


@dataclass(frozen=True)
class Place:
    """A matrix of an adapter: its PEFT name, its layer, its target, which of the two it is, and its shape."""

    name: str
    layer: int
    target: str
    matrix: str
    shape: tuple[int, int]


def places(lora: LoraConfig, directory: ModelDirectory) -> list[Place]:
    """The matrices of an adapter in the order of the model: layer by layer, as a layer computes, A before B."""
    sizes = directory.architecture
    found = []
    for layer in range(sizes.num_layers):
        for target in PROJECTIONS:
            module = module_name(layer, target)
            if rank := lora.rank_of(module):
                outputs, inputs = directory.logical_shape(f"{module}.weight")
                for matrix, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                    found.append(Place(tensor_name(module, matrix), layer, target, matrix, shape))
    return found


def fresh_state(engine: str, lora: LoraConfig, where: list[Place], layers: int) -> TrainingState:
    """The state before the first step: A from the seed as the engine documents it, B zero."""
    draw = {"jax": _drawn_by_jax, "torch": _drawn_by_torch}[engine]
    return state_of(0, draw(lora, where, layers), "the seed of the adapter")


def state_of(step: int, adapter: Tensors, source: str) -> TrainingState:
    """An adapter that no step was taken with yet."""
    wide = {name: tensor.astype(np.float64) for name, tensor in adapter.items()}
    zeros = {name: np.zeros_like(tensor) for name, tensor in wide.items()}
    return TrainingState(step, wide, zeros, dict(zeros), source)


def checkpoints(engine: str, run: Path) -> dict[int, Path]:
    """The finished checkpoints of a run, by their step."""
    prefix = {"jax": "", "torch": _TORCH}[engine]
    folders = (path for path in (run / "checkpoints").glob(f"{prefix}*") if (path / CHECKSUMS).exists())
    numbered = {path.name.removeprefix(prefix): path for path in folders}
    return {int(number): path for number, path in sorted(numbered.items()) if number.isdigit()}


def read_checkpoint(engine: str, folder: Path, step: int, lora: LoraConfig, where: list[Place]) -> TrainingState:
    """What a checkpoint holds.

    Raises:
        UserError: its files are not what its checksums were taken of, or it holds other matrices than the run's adapter has.
    """
    name = f"checkpoints/{folder.name}"
    if flaw := damage(folder):
        raise UserError(f"{name}: {flaw}")
    parts = {"jax": _read_orbax, "torch": _read_trainer}[engine](folder, lora, where)
    shapes = {place.name: place.shape for place in where}
    for part in parts:
        if {key: tensor.shape for key, tensor in part.items()} != shapes:
            raise UserError(f"{name}: holds other matrices than the adapter that config.yaml describes")
    rounding = 2.0**-9 if any(tensor.dtype.name == "bfloat16" for tensor in parts[0].values()) else 2.0**-24
    adapter, first, second = ({key: np.asarray(part[key], np.float64) for key in shapes} for part in parts)
    return TrainingState(step, adapter, first, second, name, rounding)


def planned_length(engine: str, folder: Path) -> int:
    """The optimizer steps that the run's schedule spans, as a checkpoint has it."""
    file = folder / ("position/metadata" if engine == "jax" else "trainer_state.json")
    said: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return int(said["settings"]["steps"] if engine == "jax" else said["max_steps"])


def _read_orbax(folder: Path, lora: LoraConfig, where: list[Place]) -> tuple[Tensors, Tensors, Tensors]:
    logging.getLogger("absl").setLevel(logging.ERROR)
    state, reader = (folder / "state").absolute(), ocp.PyTreeCheckpointer()
    try:
        # Into numpy: the devices that a run was spread over need not be here.
        plain = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(reader.metadata(state).item_metadata.tree)
        )
        stacks: Mapping[str, np.ndarray] = reader.restore(state, restore_args=plain)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:  # what it makes of what it cannot read
        raise UserError(f"checkpoints/{folder.name}: cannot be read ({type(error).__name__})") from error

    def part(prefix: str) -> Tensors:
        found = {}
        for place in where:
            rank = lora.rank_of(module_name(place.layer, place.target))
            stack = stacks.get(f"{prefix}.layers.{PROJECTIONS[place.target]}.lora.{place.matrix}.value")
            if stack is not None:
                layer = stack[place.layer]
                found[place.name] = layer[:rank] if place.matrix == "A" else layer[:, :rank]
        return found

    return part("0"), part("1.1.mu"), part("1.1.nu")


def _read_trainer(folder: Path, lora: LoraConfig, where: list[Place]) -> tuple[Tensors, Tensors, Tensors]:
    del lora
    # torch's restricted loader (weights_only), as transformers reads its own file
    state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")["state"]
    if len(state) != len(where):
        raise UserError(f"checkpoints/{folder.name}: optimizer.pt has {len(state)} matrices, the adapter {len(where)}")
    first, second = (
        {place.name: state[number][moment].float().numpy() for number, place in enumerate(where)}
        for moment in ("exp_avg", "exp_avg_sq")
    )
    return dict(read_adapter(folder).tensors), first, second


def _drawn_by_jax(lora: LoraConfig, where: list[Place], layers: int) -> Tensors:
    """A stack over the layers for each target, as wide as its widest layer, from a key of the target's own."""
    of_target = {target: [place for place in where if place.target == target] for target in ALL_LINEAR}
    shapes = {
        target: (layers, max(place.shape[0] for place in here if place.matrix == "A"), here[0].shape[1])
        for target, here in of_target.items()
        if here
    }

    @jax.jit
    def draw() -> dict[str, jax.Array]:
        seed = jax.random.key(lora.seed)
        keys = {target: jax.random.fold_in(seed, ALL_LINEAR.index(target)) for target in shapes}
        bounds = {target: 1 / math.sqrt(shape[-1]) for target, shape in shapes.items()}
        return {
            target: jax.random.uniform(keys[target], shape, "float32", -bounds[target], bounds[target])
            for target, shape in shapes.items()
        }

    stacks = {target: np.asarray(stack) for target, stack in draw().items()}
    return {
        place.name: stacks[place.target][place.layer][: place.shape[0]] if place.matrix == "A" else np.zeros(place.shape)
        for place in where
    }


def _drawn_by_torch(lora: LoraConfig, where: list[Place], layers: int) -> Tensors:
    """One generator, in the order of the layers."""
    del layers
    generator = torch.Generator().manual_seed(lora.seed)
    found = {}
    for place in where:
        bound = 1 / math.sqrt(place.shape[1])
        drawn = torch.empty(place.shape).uniform_(-bound, bound, generator=generator) if place.matrix == "A" else None
        found[place.name] = np.zeros(place.shape) if drawn is None else drawn.numpy()
    return found
