"""An optimizer step over a mesh, as a target's compiler cuts it, against the same step on one device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from jax_medllm.mesh.layout import Layout
from jax_medllm.model.attention import using
from jax_medllm.model.decoder import LoraParam
from jax_medllm.plan.partitioned import HostProgram, partitioned_text
from jax_medllm.plan.probe import random_step
from jax_medllm.plan.programs import STEPS, trace_step
from jax_medllm.plan.targets import READABLE, devices_of
from jax_medllm.train.loop import make_step
from jax_medllm.weights.random import random_model
from medllm.architecture import Architecture
from medllm.config import OptimizerConfig
from medllm.host.child import tell
from medllm.plan.mesh_check import DUMPED
from medllm.plan.request import held_as


@dataclass(frozen=True)
class CutProgram:
    """A program of a step, cut for the devices of a mesh.

    Attributes:
        name: What it does.
        text: What each device runs.
        given: Each argument, as every device gets it.
        wanted: Name of each result, and what one device computes.
        pieces: Of each result, the piece that every device has.
    """

    name: str
    text: str
    given: Sequence[Sequence[np.ndarray]]
    wanted: Sequence[tuple[str, np.ndarray]]
    pieces: Sequence[Sequence[Any]]

    def compared(self, text: str | None = None) -> list[dict[str, Any]]:
        """Run it, or a changed ``text`` of it: of each result its ``name``, ``error``, the largest difference from one device
        as a share of its largest value, and ``apart``, that between devices which hold the same piece of it.

        Rewards are differences of likelihoods that are nearly the same: their scale is the loss's.
        """
        results = HostProgram(text or self.text, len(self.pieces[0]))(self.given)
        compared = []
        largest = {name: float(np.abs(whole.astype(np.float64)).max(initial=0.0)) or 1.0 for name, whole in self.wanted}
        loss = max((size for name, size in largest.items() if name.endswith(".loss")), default=0.0)
        for (name, whole), places, parts in zip(self.wanted, self.pieces, results, strict=True):
            first: dict[str, np.ndarray] = {}
            error = max(_difference(part, whole[place]) for place, part in zip(places, parts, strict=True))
            apart = max(
                _difference(part, first.setdefault(str(place), part)) for place, part in zip(places, parts, strict=True)
            )
            scale = max(largest[name], loss) if ".rewards." in name else largest[name]
            compared.append({"program": self.name, "name": name, "error": error / scale, "apart": apart / scale})
        return compared


def check_mesh(target: dict[str, Any], mesh: str, rules: str, stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run both programs of a step over the mesh on this machine's devices, and on one of them.

    Args:
        target: As :func:`jax_medllm.plan.targets.devices_of` reads it.
        mesh: As ``--mesh`` says it.
        rules: As ``--rules`` does.
        stage: ``cpt`` or ``rpo``.
        settings: As :class:`medllm.plan.request.Request` has them; ``model`` is narrow.

    Returns:
        ``arrays``: those of :meth:`CutProgram.compared`; ``reductions``: how many each program has.
    """
    arrays: list[dict[str, Any]] = []
    reductions: dict[str, int] = {}
    layout = Layout.of(mesh, rules, devices_of(target))
    for done, program in enumerate(cut_programs(layout, target["kind"], stage, settings)):
        tell(done, 2, program.name)
        reductions[program.name] = program.text.count(" all-reduce(") + program.text.count(" reduce-scatter(")
        arrays += program.compared()
    return {
        "arrays": arrays,
        "reductions": reductions,
        "mesh": dict(layout.mesh.shape),
        "versions": {"jax": version("jax"), "jaxlib": version("jaxlib")},
    }


def cut_programs(layout: Layout, kind: str, stage: str, settings: Mapping[str, Any]) -> Iterator[CutProgram]:
    """Gradients and update of a step, as the compiler of the layout's devices cuts them."""
    settings = {**settings, "rows": settings["rows"] * layout.shards("batch"), "attention": "xla"}
    loss_fn, batches = random_step(stage, settings)
    batch = jax.tree.map(partial(_padded, to=layout.shards("batch")), batches[0])
    with using("xla"):
        expected = _on_one_device(settings, loss_fn, batch)
    for program in trace_step(settings, layout, loss_fn, batch).programs:
        given, wanted = expected[program.name]
        with layout.in_use():
            lowered = program.traced.lower()
            text, compiled = partitioned_text(lowered, Path(os.environ[DUMPED]), READABLE.get(kind))
        # What a program does not read is no argument of it.
        kept = sorted(lowered._lowering.compile_args["kept_var_idx"])
        leaves, wheres = jax.tree.leaves(given), jax.tree.leaves(compiled.input_shardings)
        named = [
            (jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)
        ]
        outputs = jax.tree.leaves(compiled.output_shardings)
        yield CutProgram(
            program.name,
            text,
            [_cut(np.asarray(leaves[number]), where, layout) for number, where in zip(kept, wheres, strict=True)],
            named,
            [_pieces(whole.shape, where, layout) for (_, whole), where in zip(named, outputs, strict=True)],
        )


def _padded(array: Any, to: int) -> np.ndarray:
    """Rows of zeros added, so that the devices divide them, as :func:`jax_medllm.mesh.layout.place_rows` does."""
    array = np.asarray(array)
    return np.pad(array, ((0, -len(array) % to), *[(0, 0)] * (array.ndim - 1))) if array.ndim else array


def _on_one_device(settings: Mapping[str, Any], loss_fn: Any, batch: Any) -> dict[str, tuple[Any, Any]]:
    """Arguments and results of both programs, on the host."""
    quantization, _ = held_as(settings["quantization"])
    model = random_model(
        Architecture.from_hf(settings["model"]), quantization=quantization, dtype=settings["dtype"], rank=settings["rank"]
    )
    graph, trainable, *others = nnx.split(model, LoraParam, ...)
    frozen = others[0]
    # B starts at zero, and with it most gradients.
    trainable = jax.tree.map(lambda leaf: leaf + 0.02 * np.cos(np.arange(leaf.size).reshape(leaf.shape)), trainable)
    step = make_step(graph, loss_fn, OptimizerConfig(), STEPS)
    moments, index = step.init(trainable), np.int32(STEPS // 2)
    total = jax.device_get(step.gradients(trainable, frozen, batch))
    taken = jax.device_get((trainable, moments, index, total))
    return {
        "gradients": (jax.device_get((trainable, frozen, batch)), total),
        "update": (taken, jax.device_get(step.update(trainable, moments, index, total))),
    }


def _pieces(shape: tuple[int, ...], where: Sharding, layout: Layout) -> list[Any]:
    """Which piece of an array each device of the mesh has."""
    pieces = where.devices_indices_map(shape)
    return [pieces[device] for device in layout.mesh.devices.flat]


def _cut(array: np.ndarray, where: Sharding, layout: Layout) -> list[np.ndarray]:
    return [np.ascontiguousarray(array[piece]) for piece in _pieces(array.shape, where, layout)]


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest; infinite where one of them is no number."""
    difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return float(difference.max(initial=0.0)) if np.isfinite(difference).all() else float("inf")
