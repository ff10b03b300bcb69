"""What ``medllm bench cpt|rpo|generate`` found: figures of each engine, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from medllm.bench.profile_table import Row
from medllm.bench.shapes import CptShape, GenerateShape, RpoShape
from medllm.bench.variants import Choice
from medllm.config import RematPolicy

UNITS = {"cpt": "tokens/s", "rpo": "problems/s", "generate": "problems/s"}


@dataclass(frozen=True)
class Figures:
    """What an engine came to: medians of its runs.

    Attributes:
        rate: Of the comparison's unit, a second.
        peak_rss_gib: Largest resident memory of its process, libraries and compiler included.
        compile_s: Seconds of compiling.
        matmul_gflops: The fp32 matrix rate of its framework on this machine.
        remat: What it kept for the backward pass; None where there is none.
    """

    rate: float
    peak_rss_gib: float
    compile_s: float
    matmul_gflops: float
    remat: RematPolicy | None


@dataclass(frozen=True)
class Share:
    """What a training step reaches of the matrix rate.

    Attributes:
        step_gflop: Operations of a step on paper, in 1e9.
        step_gflops: Of them, in a second.
        matrix_share: Over :attr:`Figures.matmul_gflops`.
    """

    step_gflop: float
    step_gflops: float
    matrix_share: float


@dataclass(frozen=True)
class Comparison:
    """Engines on the same work, by name: the first is held against the second.

    Attributes:
        action: What was measured: ``cpt``, ``rpo`` or ``generate``.
        shape: Its sizes.
        settings: More arguments of the measurement.
        figures: Of each engine.
        runs: Every run of each, as it was measured.
        choice: How the reference was set, and what was tried.
        environment: The machine.
        shares: Of each engine, of a training step.
        profile: Where the time of each engine went; None where that was not looked at.
    """

    action: str
    shape: CptShape | RpoShape | GenerateShape
    settings: Mapping[str, Any]
    figures: Mapping[str, Figures]
    runs: Mapping[str, Sequence[Mapping[str, Any]]]
    choice: Choice
    environment: Mapping[str, Any]
    shares: Mapping[str, Share] = field(default_factory=dict)
    profile: Mapping[str, Sequence[Row]] | None = None

    @property
    def unit(self) -> str:
        """What the rates count."""
        return UNITS[self.action]

    @property
    def ratio(self) -> float | None:
        """Of the rates; None with one engine."""
        return self._ratio("rate")

    @property
    def memory_ratio(self) -> float | None:
        """Of the peaks; None with one engine."""
        return self._ratio("peak_rss_gib")

    def _ratio(self, figure: str) -> float | None:
        if len(self.figures) != 2:
            return None
        first, second = (float(getattr(one, figure)) for one in self.figures.values())
        return first / second

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` writes it: of each engine what there is under its name."""
        shares = {engine: asdict(share) for engine, share in self.shares.items()}
        found = {
            "ratio": self.ratio,
            "memory_ratio": self.memory_ratio,
            "unit": self.unit,
            **{engine: {**asdict(one), **shares.get(engine, {})} for engine, one in self.figures.items()},
            **self.choice.to_json(),
            "shape": asdict(self.shape),
            "settings": dict(self.settings),
            "runs": {engine: [dict(one) for one in runs] for engine, runs in self.runs.items()},
            "environment": dict(self.environment),
        }
        if self.profile is None:
            return found
        return {**found, "profile": {engine: [asdict(row) for row in rows] for engine, rows in self.profile.items()}}
