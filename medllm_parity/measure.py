"""Errors, verdicts and what an audit is in the end: a list of checks, and how far each stack drifted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from medllm_parity.tolerances import Allowance


@dataclass(frozen=True)
class Check:
    """One verdict.

    Attributes:
        name: What was compared, and where.
        error: The larger evidence against the two being the same: max|x − truth| / max|truth|, of the JAX stack; of the
            torch stack where that one is the stack which is off.
        tolerance: What ``error`` may be.
        ok: Whether it is.
        layer: Index of the layer; None outside the layers.
        module: Hugging Face's name of the module.
        quantity: What of it.
        reference_error: The torch stack's error against the same truth.
        difference: Largest difference of the two stacks over the largest magnitude of the truth.
        where: Place of the largest error.
        stack: Which stack is off, where one is.
    """

    name: str
    error: float
    tolerance: float
    ok: bool
    layer: int | None
    module: str
    quantity: str
    reference_error: float = 0.0
    difference: float = 0.0
    where: str = ""
    stack: str = ""


@dataclass(frozen=True)
class Drift:
    """How far both stacks are from the truth, each fed with its own output of the layer before."""

    layer: int | None
    quantity: str
    jax: float
    torch: float
    adapter: bool = True


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        checks: The verdicts, in the order of the computation.
        drift: Accumulated errors, for the heat map.
        layers: Layers of the model.
        stopped: Whether ``--bisect`` ended the sweep at the first divergence.
        facts: What was audited, for the page.
    """

    layers: int
    facts: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    stopped: bool = False

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def first_divergence(self) -> Check | None:
        """The first check, in the order of the computation, that did not pass."""
        return next((check for check in self.checks if not check.ok), None)

    def to_json(self) -> dict[str, Any]:
        """The contents of ``result.json``."""
        first = self.first_divergence
        keys = ("layer", "module", "quantity", "error", "tolerance", "where", "stack")
        return {
            "ok": self.ok,
            "first_divergence": None if first is None else {key: asdict(first)[key] for key in keys},
            **self.facts,
            "stopped_at_first_divergence": self.stopped,
            "checks": [asdict(check) for check in self.checks],
            "drift": [asdict(drift) for drift in self.drift],
        }


@dataclass(frozen=True)
class Values:
    """One quantity in the three computations, [..., n] each, of real tokens only."""

    jax: np.ndarray
    torch: np.ndarray
    truth: np.ndarray

    def errors(self) -> tuple[float, float, float]:
        """Relative errors of JAX and of torch, and their relative difference."""
        scale = magnitude(self.truth)
        return tuple(
            relative(magnitude(a - b), scale)
            for a, b in ((self.jax, self.truth), (self.torch, self.truth), (self.jax, self.torch))
        )  # type: ignore[return-value]

    def worst(self, stack: str) -> tuple[int, ...]:
        """Index of the largest error of ``stack``."""
        apart = np.abs((self.torch if stack == "torch" else self.jax) - self.truth)
        return tuple(int(i) for i in np.unravel_index(int(np.argmax(np.nan_to_num(apart, nan=np.inf))), apart.shape))


def magnitude(x: np.ndarray) -> float:
    """Largest absolute value; infinite where something is not finite."""
    largest = float(np.abs(x).max(initial=0.0))
    return largest if np.isfinite(largest) else float("inf")


def relative(difference: float, scale: float) -> float:
    """``difference / scale``; against a truth of zeros, the difference itself."""
    return difference / scale if scale else difference


def apart(x: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference of two arrays, relative to the largest number of the second."""
    return relative(magnitude(x - truth), magnitude(truth))


def judge(
    allowance: Allowance,
    errors: tuple[float, float, float],
    *,
    quantity: str,
    module: str,
    layer: int | None = None,
    label: str = "",
    where: str = "",
) -> Check:
    """A verdict on (error of JAX, error of torch, difference): no worse than the reference, and a reference that is sound."""
    ours, theirs, difference = errors
    name = f"{module}: {quantity}" + (f" ({label})" if label else "")
    sound = theirs <= allowance.ceiling
    error, tolerance = (ours, allowance.tolerance(theirs)) if sound else (theirs, allowance.ceiling)
    ok = error <= tolerance
    stack = "" if ok else "jax" if sound else "torch"
    return Check(name, error, tolerance, ok, layer, module, quantity, theirs, difference, "" if ok else where, stack)
