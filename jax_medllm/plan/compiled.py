"""Compiles traced programs and says what they take: memory by kind, what is sent between devices, operations, traffic."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_medllm.mesh.layout import Layout, device_bytes, entry
from jax_medllm.plan.flops import matrix_flops
from jax_medllm.plan.hlo import Program
from jax_medllm.plan.programs import Stage, Traced
from jax_medllm.plan.targets import READABLE

GIB = 2**30


def measure(
    stage: Stage, layout: Layout, progress: Callable[[int, int, str], None] = lambda done, total, doing: None
) -> dict[str, Any]:
    """Compile the programs of a stage; ``progress`` is called with (programs done, in all, the next one's name).

    Returns:
        ``by_kind``: GiB on a device where the programs need most, ``programs``: each one's own, ``collectives``, ``flops`` and
        ``bytes`` of memory traffic of a device in one step, ``parameters``: where each is kept, ``compile_s``. A program that
        the compiler refuses for its memory leaves ``by_kind`` empty, and ``refused_gib`` says what it would need; where a
        program cannot be read, there are neither ``collectives`` nor ``bytes``.
    """
    found: list[dict[str, Any]] = []
    held = {kind: device_bytes(arrays) for kind, arrays in stage.held.items()}
    work = _Work()
    options = READABLE.get(layout.mesh.devices.flat[0].platform)
    with layout.in_use():
        for done, program in enumerate(stage.programs):
            progress(done, len(stage.programs), program.name)
            lowered = program.traced.lower()
            started = time.perf_counter()
            try:
                compiled = lowered.compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                if needed := _refused(str(error)):
                    seconds = time.perf_counter() - started
                    return {"by_kind": {}, "refused_gib": needed, **_facts(stage, layout, seconds)}
                raise
            found.append(_memory(program, compiled, held) | {"compile_s": time.perf_counter() - started})
            if program.runs:
                work.add(program, compiled)
    most = max(found, key=lambda program: sum(program["by_kind"].values()))
    return {
        "by_kind": most["by_kind"],
        "programs": found,
        "flops": work.flops / layout.mesh.size,
        **work.moved(),
        **_facts(stage, layout, sum(program["compile_s"] for program in found)),
    }


class _Work:
    """What the programs of a step do, added up."""

    def __init__(self) -> None:
        self.flops = 0.0
        self._traffic = 0.0
        self._sent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0])
        self._is_read = True

    def add(self, program: Traced, compiled: Any) -> None:
        """A program, as often as it runs in a step."""
        self.flops += program.runs * matrix_flops(program.traced.jaxpr, program.while_trips)
        text = _text(compiled)
        if text is None:
            self._is_read = False
            return
        read = Program(text, program.while_trips)
        self._traffic += program.runs * read.traffic()
        for one in read.collectives():
            self._sent[one.kind, one.dtype][0] += program.runs * one.times
            self._sent[one.kind, one.dtype][1] += program.runs * one.bytes

    def moved(self) -> dict[str, Any]:
        """Collectives and traffic, where every program was read."""
        if not self._is_read:
            return {}
        collectives = [
            {"kind": kind, "dtype": dtype, "times": times, "bytes": size}
            for (kind, dtype), (times, size) in sorted(self._sent.items(), key=lambda item: -item[1][1])
        ]
        return {"collectives": collectives, "bytes": self._traffic}


def _memory(program: Traced, compiled: Any, held: dict[str, int]) -> dict[str, Any]:
    """GiB on a device while a program runs."""
    memory = compiled.memory_analysis()
    kinds = _by_kind(program, memory, held)
    return {
        "name": program.name,
        "by_kind": kinds,
        "arguments_gib": memory.argument_size_in_bytes / GIB,
        "temporaries_gib": kinds["activations"],
        "output_gib": kinds["output"],
    }


def _facts(stage: Stage, layout: Layout, seconds: float) -> dict[str, Any]:
    """What is known of a stage whether or not it fits."""
    return {
        "tokens_per_step": stage.tokens,
        "compile_s": seconds,
        "mesh": dict(layout.mesh.shape),
        "mesh_devices": np.vectorize(lambda device: device.id, otypes=[int])(layout.mesh.devices).tolist(),
        "parameters": _parameters(stage),
    }


def _text(compiled: Any) -> str | None:
    """The compiled program; None where this JAX cannot read what a newer compiler has written."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def _refused(error: str) -> float | None:
    """GiB that a program would need, where the compiler refused it for its memory."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", error)
    return float(found[1]) * 2.0 ** (10 * ("KMGT".index(found[2]) - 2)) if found else None


def _by_kind(program: Traced, memory: Any, held: dict[str, int]) -> dict[str, float]:
    """GiB on a device while the program runs."""
    kinds: dict[str, int] = defaultdict(int)
    for kind in (*program.takes, *program.beside):
        kinds[kind] += held[kind]
    kinds["batch"] = max(0, memory.argument_size_in_bytes - sum(held[kind] for kind in program.takes))
    kinds["activations"] = memory.temp_size_in_bytes
    kinds["output"] = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {kind: size / GIB for kind, size in kinds.items()}


def _parameters(stage: Stage) -> list[dict[str, Any]]:
    """Where each parameter is kept."""
    return [
        {
            "name": ".".join(map(str, path)),
            "kind": kind,
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "spread": [list(entry(part)) for part in _entries(leaf)],
            "gib": device_bytes(leaf) / GIB,
        }
        for kind in ("base", "adapters")
        for path, variable in nnx.to_flat_state(stage.held[kind])
        for leaf in jax.tree.leaves(variable)
    ]


def _entries(leaf: Any) -> tuple[Any, ...]:
    spec = tuple(leaf.sharding.spec) if hasattr(leaf.sharding, "spec") else ()
    return (*spec, *[None] * (len(leaf.shape) - len(spec)))
