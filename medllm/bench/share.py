"""The share of the machine's matrix rate that a training step reaches: what it needs on paper over the time it takes."""

from __future__ import annotations

from collections.abc import Mapping

from medllm.bench.arithmetic import training_flops, work_of
from medllm.bench.comparison import Figures, Share
from medllm.bench.shapes import CptShape, RpoShape


def shares(shape: CptShape | RpoShape, figures: Mapping[str, Figures]) -> dict[str, Share]:
    """Of each engine. What it recomputes, by its ``remat``, counts as work. The reference trains preferences pair by pair."""
    units = shape.rows * shape.length if isinstance(shape, CptShape) else shape.problems
    found = {}
    for engine, one in figures.items():
        assert one.remat is not None  # as it is in training
        flops = training_flops(shape.model, work_of(shape, pairwise=engine != "jax"), one.remat)
        rate = flops * one.rate / units / 1e9
        found[engine] = Share(flops / 1e9, rate, rate / one.matmul_gflops)
    return found


def share_lines(found: Mapping[str, Share]) -> list[str]:
    """The shares as lines of text."""
    return [
        f"{engine:>6}  {one.step_gflop:.1f} GFLOP a step on paper, {one.step_gflops:.1f} GFLOP/s: "
        f"{one.matrix_share:.0%} of its matrix rate"
        for engine, one in found.items()
    ]
