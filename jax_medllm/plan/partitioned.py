"""A program as a target's compiler has cut it for the devices of a mesh, and that program run on this machine's CPU.

Each compiler first partitions a program: one for all devices comes to be the one that each device runs, with collectives
between them, still in operations that every backend has. That text is written to a folder
(:func:`medllm.plan.planning.compiling_environment`), and runs here on as many devices as the target has: the partitioning is
the target's, the arithmetic the CPU's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib._jax
import numpy as np
from jax._src import compiler, xla_bridge
from jax._src.lib import xla_client
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib import _hlo

_PARTITIONED = "*.after_*spmd-partitioning.before_*.txt"

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, *device_ids=\(\[([\d,]*)\](?:T\(([\d,]*)\))?\))? *\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]*)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?")
_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_OF_PARTITIONS = (
    # Of a program for replicas its collectives are among these, and its place is its replica's.
    (re.compile(r", channel_id=\d+|channel_id=\d+, *"), ""),
    (re.compile(r", use_global_device_ids=true"), ""),
    (re.compile(r"\bpartition-id\(\)"), "replica-id()"),
    (re.compile(r", num_partitions=\d+"), ""),
    # What only its own backend knows: how arrays lie, and what is said of the whole program.
    (re.compile(r"(?<=\])\{[\d,]*(?::[^{}]*)?\}"), ""),
    (re.compile(r", frontend_attributes=\{[^{}]*\}"), ""),
    (re.compile(r", sharding=\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"), ""),
)


def partitioned_text(lowered: jax.stages.Lowered, folder: Path, options: dict[str, Any] | None) -> tuple[str, Any]:
    """Compile a program, in a process whose flags have it write to ``folder``; its partitioned text, and the compiled program.

    Raises:
        RuntimeError: the compiler wrote none.
    """
    before = {*folder.glob(_PARTITIONED)}
    compiled = lowered.compile(compiler_options=options)
    written = sorted({*folder.glob(_PARTITIONED)} - before)
    if not written:
        raise RuntimeError("the compiler wrote no partitioned program")
    return written[-1].read_text(encoding="utf-8"), compiled


class HostProgram:
    """A partitioned program on this machine's CPU devices, one for each device of the mesh.

    Args:
        text: As :func:`partitioned_text` gives it.
        devices: How many.
    """

    def __init__(self, text: str, devices: int):
        module = _hlo.hlo_module_from_text(for_replicas(text))
        computation = _hlo.XlaComputation(module.as_serialized_hlo_module_proto())
        options = compiler.get_compile_options(devices, 1, np.arange(devices)[:, None])
        backend = xla_bridge.get_backend("cpu")
        self._devices = backend.devices()[:devices]
        program = jaxlib._jax.mlir.xla_computation_to_mlir_module(computation)
        self._loaded = backend.compile_and_load(program, xla_client.DeviceList(tuple(self._devices)), options)
        self._whole = NamedSharding(Mesh(np.array(self._devices), ("devices",)), PartitionSpec())

    def __call__(self, arguments: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
        """Each result as every device has it, of each argument as every device gets it."""
        given = []
        for parts in arguments:
            there = [jax.device_put(part, device) for part, device in zip(parts, self._devices, strict=True)]
            given.append(jax.make_array_from_single_device_arrays(there[0].shape, self._whole, there))
        results = self._loaded.execute_sharded(given).disassemble_into_single_device_arrays()
        return [[np.asarray(part) for part in parts] for parts in results]


def for_replicas(text: str) -> str:
    """A program of partitions as one of replicas, which is compiled as it stands; a partitioned one would be cut again."""
    text = _IOTA.sub(_counted_groups, _MESH.sub(_mesh_groups, text))
    for pattern, instead in _OF_PARTITIONS:
        text = pattern.sub(instead, text)
    return text


def _mesh_groups(found: re.Match[str]) -> str:
    """Groups along some axes of a mesh, in the order in which they are named, or along parts of axes (``'a':(2)4``: of its
    sizes 2, 4, … the second)."""
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(found[1])}
    along = [(name, int(before or 1), int(part or sizes[name])) for name, _, before, part in _AXIS.findall(found[4])]
    shape: list[int] = []
    place: dict[tuple[str, int, int], int] = {}
    for name, size in sizes.items():
        reached = 1
        for axis, before, part in sorted(one for one in along if one[0] == name):
            place[axis, before, part] = len(shape) + 1
            shape += [before // reached, part]
            reached = before * part
        shape.append(size // reached)
    within = [place[one] for one in along]
    apart = [number for number in range(len(shape)) if number not in within]
    numbers = _numbers(found[2] or str(math.prod(sizes.values())), found[3]).reshape(shape)
    return _listed(numbers.transpose(apart + within).reshape(-1, math.prod(shape[number] for number in within)))


def _counted_groups(found: re.Match[str]) -> str:
    return _listed(_numbers(found[2], found[3]).reshape(_integers(found[1])))


def _numbers(shape: str, order: str | None) -> np.ndarray:
    """Devices counted through in this shape, its axes then put into an order."""
    numbers = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return numbers.transpose(_integers(order)) if order else numbers


def _listed(groups: np.ndarray) -> str:
    return f"replica_groups={{{','.join('{' + ','.join(map(str, group)) + '}' for group in groups.tolist())}}}"


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
