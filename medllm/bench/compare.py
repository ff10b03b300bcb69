"""Both engines on the same work, on this machine, one after the other, several times: medians, and their ratio.

The reference runs as the fastest of its variants (:mod:`medllm.bench.variants`).
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medllm.bench.comparison import UNITS, Comparison, Figures
from medllm.bench.engines import measure
from medllm.bench.shapes import CptShape, GenerateShape, RpoShape
from medllm.bench.variants import Choice, choose, variant_lines
from medllm.config import RematPolicy
from medllm.errors import UserError
from medllm.host.progress import Say
from medllm.run import environment


def compare(
    name: str,
    shape: CptShape | RpoShape | GenerateShape,
    *,
    engines: Sequence[str],
    runs: int,
    torch_variant: str,
    profile: str | None = None,
    say: Say = lambda line: None,
    **settings: Any,
) -> Comparison:
    """Measure ``name`` (``cpt``, ``rpo`` or ``generate``) on each engine ``runs`` times, alternating.

    Each measurement is a process of its own, which opens the model from disk.

    Args:
        name: What is measured.
        shape: Its sizes.
        engines: Which engines; the first is held against the second.
        runs: Measurements of each.
        torch_variant: How the reference is set; ``all`` tries every variant once, shortly, and measures the fastest.
        profile: Folder for a trace of each engine, taken in a run beside the measured ones.
        say: Told what was measured, as it comes.
        settings: More arguments of the measurement.

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
    figures = {engine: _medians(ones, matrix[engine], arguments[engine].get("remat")) for engine, ones in found.items()}
    return Comparison(name, shape, settings, figures, found, choice, environment())


def _trace(name: str, arguments: Mapping[str, dict[str, Any]], folder: Path, say: Say) -> None:
    for engine, given in arguments.items():
        measure(engine, name, **given, profile=str(folder / engine))
        say(f"bench {name}: trace of {engine}: {folder / engine}")


def _check(engines: Sequence[str], runs: int) -> None:
    if runs < 1:
        raise UserError(f"--runs is {runs}; at least 1 is needed")
    if not engines or len(set(engines)) < len(engines):
        raise UserError(f"--engines is {' '.join(engines) or 'empty'}; name each engine once")


def _alternating(name: str, arguments: Mapping[str, dict[str, Any]], runs: int, say: Say) -> dict[str, list[dict[str, Any]]]:
    """What each engine measured, run by run, one after the other in every run."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in arguments}
    for run in range(1, runs + 1):
        for engine, given in arguments.items():
            one = measure(engine, name, **given, profile=None)
            found[engine].append(one)
            say(f"bench {name}: run {run} of {runs}, {engine}: {one['rate']:.4g} {UNITS[name]}")
    return found


def table(found: Comparison) -> list[str]:
    """The result as lines of text."""
    lines = [
        f"{engine:>6}  {one.rate:>10.4g} {found.unit}   peak {one.peak_rss_gib:.2f} GiB   "
        f"compile {one.compile_s:.1f} s   matrix rate {one.matmul_gflops:.0f} GFLOP/s"
        for engine, one in found.figures.items()
    ]
    lines += variant_lines(found.choice)
    if found.ratio is not None:
        first, second = found.figures
        lines.append(
            f"bench {found.action}: {first} is {found.ratio:.2f} times as fast as {second}, "
            f"with {found.memory_ratio:.2f} times its memory"
        )
    return lines


def _matrix(shape: CptShape | RpoShape | GenerateShape) -> dict[str, int]:
    """The matrix product that a training step is mostly made of."""
    return {"rows": 2048, "inner": shape.model.width, "columns": shape.model.mlp}


def _medians(ones: Sequence[dict[str, Any]], matmul_gflops: float, remat: RematPolicy | None) -> Figures:
    def median(name: str) -> float:
        return statistics.median(one[name] for one in ones)

    return Figures(median("rate"), median("peak_rss_bytes") / 2**30, median("compile_s"), matmul_gflops, remat)
