"""The preference file: one problem a line, its hierarchy ground truth > chosen > rejected."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One response to a problem's prompt: explanation and answer as text, and how it came about."""

    text: str
    answer: str
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preference:
    """Everything known about one problem's responses."""

    problem_id: str
    prompt: str
    ground_truth: Sample
    chosen: tuple[Sample, ...] = ()
    rejected: tuple[Sample, ...] = ()
