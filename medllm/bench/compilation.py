"""``medllm bench compile``: layers are scanned, so a deeper model should take no longer to compile."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from medllm.bench.engines import measure
from medllm.bench.shapes import ModelShape
from medllm.errors import UserError
from medllm.host.progress import Say
from medllm.run import environment


def bench_compile(model: ModelShape, depths: Sequence[int], runs: int, say: Say = lambda line: None) -> dict[str, Any]:
    """Seconds from a traced CPT step to a compiled one at each depth, median of ``runs``; ``ratio`` is the last over the first.

    Nothing is loaded: shapes are enough to compile.

    Raises:
        UserError: fewer than two depths or one run, a depth below 1, or JAX is not installed.
    """
    if len(depths) < 2 or min(depths) < 1 or runs < 1:
        raise UserError(f"--depths is {list(depths)}, --runs {runs}; expected two depths of at least 1, and a run")
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    for _ in range(runs):
        for depth in depths:
            found = measure("jax", "compile_step", model=dataclasses.asdict(dataclasses.replace(model, layers=depth)))
            seconds[depth].append(found["seconds"])
            say(f"bench compile: {depth} layers in {found['seconds']:.2f} s")
    medians = {depth: statistics.median(times) for depth, times in seconds.items()}
    return {
        "ratio": medians[depths[-1]] / medians[depths[0]],
        "seconds": {str(depth): median for depth, median in medians.items()},
        "runs": {str(depth): times for depth, times in seconds.items()},
        "shape": dataclasses.asdict(model),
        "environment": environment(),
    }


def summary(found: dict[str, Any]) -> str:
    """The result in a line."""
    times = ", ".join(f"{depth} layers {seconds:.2f} s" for depth, seconds in found["seconds"].items())
    return f"bench compile: {times}; ratio {found['ratio']:.2f}"
