"""Compiles traced programs and says what they take: memory by kind, what is sent between devices, operations, traffic."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from typing import Any

import jax
from flax import nnx

from jax_medllm.plan.flops import matrix_flops
from jax_medllm.plan.hlo import Program
from jax_medllm.plan.programs import Stage, Traced
from jax_medllm.sharding import Layout, entry

GIB = 2**30


def measure(stage: Stage, layout: Layout) -> dict[str, Any]:
    """Compile the programs of a stage.

    Returns:
        ``by_kind``: GiB on a device where the programs need most, ``programs``: each one's own, ``collectives``, ``flops`` and
        ``bytes`` of memory traffic of a device in one step, ``parameters``: where each is kept, ``compile_s``. A program that
        the compiler refuses for its memory leaves ``by_kind`` empty, and ``refused_gib`` says what it would need; where a
        program cannot be read, there are neither ``collectives`` nor ``bytes``.
    """
    held = {kind: device_bytes(arrays) for kind, arrays in stage.held.items()}
    found: list[dict[str, Any]] = []
    flops = traffic = 0.0
    sent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0])
    unread: list[str] = []
    with layout.in_use():
        for program in stage.programs:
            lowered = program.traced.lower()
            started = time.perf_counter()
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if needed := _refused(str(error)):
                    return _too_large(needed, stage, layout, time.perf_counter() - started)
                raise
            seconds = time.perf_counter() - started
            memory = compiled.memory_analysis()
            kinds = _by_kind(program, memory, held)
            found.append(
                {
                    "name": program.name,
                    "compile_s": seconds,
                    "by_kind": kinds,
                    "arguments_gib": memory.argument_size_in_bytes / GIB,
                    "temporaries_gib": kinds["activations"],
                    "output_gib": kinds["output"],
                }
            )
            if not program.runs:
                continue
            flops += program.runs * matrix_flops(program.traced.jaxpr, program.while_trips) / layout.mesh.size
            text = _text(compiled)
            if text is None:
                unread.append(program.name)
                continue
            read = Program(text, program.while_trips)
            traffic += program.runs * read.traffic()
            for one in read.collectives():
                sent[one.kind, one.dtype][0] += program.runs * one.times
                sent[one.kind, one.dtype][1] += program.runs * one.bytes
    most = max(found, key=lambda program: sum(program["by_kind"].values()))
    moved = {
        "collectives": [
            {"kind": kind, "dtype": dtype, "times": times, "bytes": size}
            for (kind, dtype), (times, size) in sorted(sent.items(), key=lambda item: -item[1][1])
        ],
        "bytes": traffic,
    }
    return {
        "by_kind": most["by_kind"],
        "programs": found,
        "flops": flops,
        **({} if unread else moved),
        "tokens_per_step": stage.tokens,
        "compile_s": sum(program["compile_s"] for program in found),
        "mesh": dict(layout.mesh.shape),
        "parameters": _parameters(stage),
    }


def _text(compiled: Any) -> str | None:
    """The compiled program; None where this JAX cannot read what a newer compiler has written (some of a v6e's programs)."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def _refused(error: str) -> float | None:
    """GiB that a program would need, where the compiler refused it for its memory."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", error)
    return float(found[1]) * 2.0 ** (10 * ("KMGT".index(found[2]) - 2)) if found else None


def _too_large(needed: float, stage: Stage, layout: Layout, seconds: float) -> dict[str, Any]:
    """As :func:`measure`, of a program that the compiler refused."""
    return {
        "by_kind": {},
        "refused_gib": needed,
        "tokens_per_step": stage.tokens,
        "compile_s": seconds,
        "mesh": dict(layout.mesh.shape),
        "parameters": _parameters(stage),
    }


def device_bytes(arrays: Any) -> int:
    """Bytes on one device of arrays, or of their shapes with where they lie."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


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
