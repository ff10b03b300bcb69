"""Both engines on the same work, on this machine, one after the other, several times: medians, and their ratio.

The reference runs as the fastest of its variants (:mod:`medllm.bench.variants`).
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medllm.bench.engines import measure
from medllm.bench.shapes import CptShape, GenerateShape, RpoShape
from medllm.bench.variants import Choice, choose, variant_lines
from medllm.errors import UserError
from medllm.run import environment

UNITS = {"cpt": "tokens/s", "rpo": "problems/s", "generate": "problems/s"}


def compare(
    name: str,
    shape: CptShape | RpoShape | GenerateShape,
    *,
    engines: Sequence[str],
    runs: int,
    torch_variant: str,
    profile: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure ``name`` (``cpt``, ``rpo`` or ``generate``) on each engine ``runs`` times, alternating.

    Each measurement is a process of its own, which opens the model from disk; its peak is the largest resident memory of that
    process, libraries and compiler included.

    Args:
        name: What is measured.
        shape: Its sizes.
        engines: Which engines; the first is held against the second.
        runs: Measurements of each.
        torch_variant: How the reference is set; ``all`` tries every variant once, shortly, and measures the fastest.
        profile: Folder for a trace of each engine, taken in a run beside the measured ones.
        say: Told what was measured, as it comes.
        settings: More arguments of the measurement.

    Returns:
        ``ratio`` of the rates (None with one engine) and ``memory_ratio``, for each engine the medians ``rate``,
        ``peak_rss_gib`` and ``compile_s`` with the fp32 matrix rate of its framework here and what it kept for the backward
        pass, every run, the shape, the machine. ``torch_variant`` is the name of what was measured of the reference,
        ``torch_variants`` the trials.

    Raises:
        UserError: an engine is not installed, comes twice, or there is not at least one run.
    """
    _check(engines, runs)
    with tempfile.TemporaryDirectory(prefix="medllm-bench-") as scratch:
        model = dataclasses.asdict(shape.model.write(Path(scratch)))
        given = {"model": model, "shape": dataclasses.asdict(shape), **settings}
        choice = choose(torch_variant, name, shape, given, say) if "torch" in engines else Choice()
        arguments = {engine: given | (choice.settings if engine == "torch" else {}) for engine in engines}
        found = _alternating(name, arguments, runs, say)
        if profile:
            _trace(name, arguments, Path(profile), say)
        matrix = {engine: measure(engine, "matmul", **_matrix(shape))["gflops"] for engine in engines}
    medians: dict[str, dict[str, Any]] = {
        engine: _medians(ones) | {"matmul_gflops": matrix[engine], "remat": arguments[engine].get("remat")}
        for engine, ones in found.items()
    }
    return {
        "ratio": _ratio(medians, engines, "rate"),
        "memory_ratio": _ratio(medians, engines, "peak_rss_gib"),
        "unit": UNITS[name],
        **medians,
        **choice.to_json(),
        "shape": dataclasses.asdict(shape),
        "settings": settings,
        "runs": found,
        "environment": environment(),
    }


def _trace(name: str, arguments: Mapping[str, dict[str, Any]], folder: Path, say: Callable[[str], None]) -> None:
    for engine, given in arguments.items():
        measure(engine, name, **given, profile=str(folder / engine))
        say(f"bench {name}: trace of {engine}: {folder / engine}")


def _check(engines: Sequence[str], runs: int) -> None:
    if runs < 1:
        raise UserError(f"--runs is {runs}; at least 1 is needed")
    if not engines or len(set(engines)) < len(engines):
        raise UserError(f"--engines is {' '.join(engines) or 'empty'}; name each engine once")


def _alternating(
    name: str, arguments: Mapping[str, dict[str, Any]], runs: int, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """What each engine measured, run by run, one after the other in every run."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in arguments}
    for run in range(1, runs + 1):
        for engine, given in arguments.items():
            one = measure(engine, name, **given, profile=None)
            found[engine].append(one)
            say(f"bench {name}: run {run} of {runs}, {engine}: {one['rate']:.4g} {UNITS[name]}")
    return found


def table(name: str, result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    lines = []
    for engine in result["runs"]:
        one = result[engine]
        lines.append(
            f"{engine:>6}  {one['rate']:>10.4g} {result['unit']}   peak {one['peak_rss_gib']:.2f} GiB   "
            f"compile {one['compile_s']:.1f} s   matrix rate {one['matmul_gflops']:.0f} GFLOP/s"
        )
    lines += variant_lines(name, result)
    if result["ratio"] is not None:
        first, second = result["runs"]
        lines.append(
            f"bench {name}: {first} is {result['ratio']:.2f} times as fast as {second}, "
            f"with {result['memory_ratio']:.2f} times its memory"
        )
    return lines


def _matrix(shape: CptShape | RpoShape | GenerateShape) -> dict[str, int]:
    """The matrix product that a training step is mostly made of."""
    return {"rows": 2048, "inner": shape.model.width, "columns": shape.model.mlp}


def _medians(ones: Sequence[dict[str, Any]]) -> dict[str, float]:
    def median(name: str) -> float:
        return statistics.median(one[name] for one in ones)

    return {"rate": median("rate"), "peak_rss_gib": median("peak_rss_bytes") / 2**30, "compile_s": median("compile_s")}


def _ratio(medians: dict[str, dict[str, Any]], engines: Sequence[str], figure: str) -> float | None:
    if len(engines) != 2:
        return None
    first, second = engines
    return medians[first][figure] / medians[second][figure]
