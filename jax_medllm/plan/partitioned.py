"""A program as a target's compiler has cut it for the devices of a mesh, and that program run on this machine's CPU.

Each compiler first partitions a program: one for all devices comes to be the one that each device runs, with collectives
between them, still in operations that every backend has. That text is written to a folder
(:func:`medllm.plan.planning.compiling_environment`), and runs here on as many devices as the target has: the partitioning is
the target's, the arithmetic the CPU's.
"""

from __future__ import annotations

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

from jax_medllm.plan.replica_groups import groups_written_out

_PARTITIONED = "*.after_*spmd-partitioning.before_*.txt"

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
    text = groups_written_out(text)
    for pattern, instead in _OF_PARTITIONS:
        text = pattern.sub(instead, text)
    return text
