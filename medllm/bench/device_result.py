"""What ``scripts/gpu_bench.sh`` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from medllm.bench.device_shapes import DeviceShape


@dataclass(frozen=True)
class Target:
    """A goal, held against what was measured.

    Attributes:
        target: What is aimed at, in words.
        at_most: The bound is a ceiling; else a floor.
        bound: The figure aimed at.
        found: The figure measured; None where it was not.
        met: Whether it meets the goal; None where nothing was measured, or the goal is another device's.
        anchor: What others publish.
        note: Why it is not judged, where it is not.
    """

    target: str
    at_most: bool
    bound: float
    found: float | None
    met: bool | None
    anchor: str
    note: str


@dataclass(frozen=True)
class DeviceResult:
    """All of it, or what there is so far.

    Attributes:
        smoke: Tiny shapes on the CPU: nothing in it is a measurement.
        environment: Versions and machine.
        preflight: What :func:`medllm.bench.preflight.preflight` saw.
        seconds: Since the beginning.
        parts: What each part's process answered and what follows from it; ``ok`` and, where it is not, ``error``.
        device: The device's name, memory and own rates; None before they are known.
        shapes: (part, what it runs).
        targets: The goals of the parts that were tried.
        stopped: An interrupt ended it early.
    """

    smoke: bool
    environment: Mapping[str, Any]
    preflight: Mapping[str, Any]
    seconds: float
    parts: tuple[Mapping[str, Any], ...] = ()
    device: Mapping[str, Any] | None = None
    shapes: tuple[tuple[str, DeviceShape], ...] = ()
    targets: tuple[Target, ...] = ()
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        """As it is written to ``--out``."""
        return asdict(self)
