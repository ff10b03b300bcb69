"""How far the two stacks may differ, and why: the one table every parity test reads, and ``docs/parity.md`` prints.

``relative`` bounds the largest difference over the largest magnitude of the reference array; a single bound for a whole array
is the right one where its values are sums of many products. The bounds named ``…_EXCESS`` bound a ratio of two errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medllm_parity import tolerances as audit


@dataclass(frozen=True)
class Tolerance(audit.Tolerance):
    """A bound that a test checks."""

    def assert_close(self, actual: object, expected: object, what: str) -> None:
        """Raise AssertionError with the measured difference where it is above the bound, or where a shape or NaN differs."""
        x, y = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert x.shape == y.shape, f"{what}: shapes {x.shape} and {y.shape}"
        assert np.isfinite(x).all(), f"{what}: not all finite"
        assert np.isfinite(y).all(), f"{what}: the reference is not all finite"
        difference = relative_difference(x, y)
        assert difference <= self.relative, f"{what}: relative difference {difference:.3g} > {self.relative:g} ({self.reason})"


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """max|x − y| / max|y|; max|x| where y is all zero, 0 for empty arrays."""
    if not expected.size:
        return 0.0
    largest = np.abs(expected).max()
    return float(np.abs(actual - expected).max() / largest if largest else np.abs(actual).max())


FLOAT64_FORWARD = Tolerance(1e-12, "the same arithmetic in float64, summed in another order", 9e-15)
FLOAT64_GRADIENT = Tolerance(1e-10, "as the forward pass, through a longer backward pass", 2e-14)
FLOAT64_HANDED_OUT = Tolerance(1e-7, "computed in float64, rounded once to the fp32 in which an engine answers", 5.7e-8)
FLOAT32_FORWARD = Tolerance(1e-5, "fp32 sums of ~100 terms in another order over a few layers", 1.4e-6)
FLOAT32_GRADIENT = Tolerance(2e-5, "the same through the backward pass", 2.3e-6)
TRL_FLOAT32_LOSS = Tolerance(1e-5, "fp32 log-probabilities summed over a response and subtracted", 2e-6)
TRL_FLOAT32_GRADIENT = Tolerance(2e-5, "fp32 gradients of such losses", 3e-6)
FLOAT32_EXCESS = Tolerance(
    1.1,
    "RMS error against float64 over the reference's, median of five seeds: the two add up products in different orders",
    1.01,
)
BFLOAT16_EXCESS = Tolerance(1.1, "the same in bf16: the two round at different places, and the ratio scatters around 1", 1.05)
NF4_OWN_SCALES = Tolerance(
    5e-3,
    "bitsandbytes on a CPU looks scales up in a table and misses the nearest code in under 1 % of blocks, by one step of the "
    "dynamic map (up to 1 % of that block's scale); on CUDA it searches, as we do",
    1.3e-3,
)
FLOAT64_OPTIMIZER = Tolerance(1e-12, "the same formulas in float64; torch takes 1 − βᵗ in another order", 3.2e-15)
FLOAT64_TRAJECTORY = Tolerance(1e-12, "twenty optimizer steps, all in float64", 2.5e-14)
FLOAT32_TRAJECTORY_LOSS = Tolerance(2e-5, "what a step logs after steps whose fp32 gradients agree to 3e-6", 6.6e-6)
FLOAT32_TRAJECTORY_ADAPTER = Tolerance(
    5e-4, "AdamW's first steps are close to sign(gradient) · rate, which magnifies the digits a small gradient lacks", 5e-5
)
HANDOVER_WEIGHT_ERROR = Tolerance(
    2e-4, "the size of NF4's own error, measured on weights whose scales a CPU looks up (NF4_OWN_SCALES)", 3.8e-5
)
HANDOVER_KL = Tolerance(1e-2, "what a model with such weights says, against one with the nearest scales", 2.7e-3)


TOLERANCES = {name: value for name, value in (globals() | vars(audit)).items() if isinstance(value, audit.Tolerance)}
"""All of them by name, the audit's among them."""


def table() -> str:
    """Every tolerance as a Markdown table, the one in ``docs/parity.md``."""
    lines = ["| tolerance | bound | largest seen | why it is not zero |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {one.relative:g} | {one.seen:g} | {one.reason} |" for name, one in TOLERANCES.items()]
    for dtype, allowed in audit.AUDIT.items():
        bound = f"{allowed.factor:g} × the reference's error + {allowed.floor:.2g}, neither above {allowed.ceiling:g}"
        lines.append(f"| `AUDIT` {dtype} | {bound} | | {allowed.reason} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
