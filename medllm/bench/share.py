"""The share of the machine's matrix rate that a training step reaches: what it needs on paper over the time it takes."""

from __future__ import annotations

from typing import Any

from medllm.bench.arithmetic import training_flops, work_of
from medllm.bench.shapes import CptShape, RpoShape


def add_shares(shape: CptShape | RpoShape, result: dict[str, Any]) -> list[str]:
    """Add to each engine's figures ``step_gflop``, ``step_gflops`` (a second) and ``matrix_share``; the lines that say so.

    What an engine recomputes, by its ``remat``, counts as work. The reference trains preferences pair by pair.

    Args:
        shape: What was measured.
        result: As :func:`medllm.bench.compare.compare` gives it.
    """
    units = shape.rows * shape.length if isinstance(shape, CptShape) else shape.problems
    said = []
    for engine in result["runs"]:
        figures = result[engine]
        flops = training_flops(shape.model, work_of(shape, pairwise=engine != "jax"), figures["remat"])
        rate = flops * figures["rate"] / units / 1e9
        share = rate / figures["matmul_gflops"]
        figures |= {"step_gflop": flops / 1e9, "step_gflops": rate, "matrix_share": share}
        said.append(f"{engine:>6}  {flops / 1e9:.1f} GFLOP a step on paper, {rate:.1f} GFLOP/s: {share:.0%} of its matrix rate")
    return said
