"""How far the two stacks may differ, and why: the one table every parity test reads.

``relative`` bounds the largest difference over the largest magnitude of the reference array; a single bound for a whole array
is the right one where its values are sums of many products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """A bound on max|x − y| / max|y|, with its reason."""

    relative: float
    reason: str

    def check(self, actual: object, expected: object, what: str) -> None:
        """Raise AssertionError with the measured difference where it is above the bound, or where a shape or NaN differs."""
        x, y = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert x.shape == y.shape, f"{what}: shapes {x.shape} and {y.shape}"
        assert np.isfinite(x).all(), f"{what}: not all finite"
        assert np.isfinite(y).all(), f"{what}: the reference is not all finite"
        largest = np.abs(y).max()
        difference = np.abs(x - y).max() / largest if largest else np.abs(x).max()
        assert difference <= self.relative, f"{what}: relative difference {difference:.3g} > {self.relative:g} ({self.reason})"


FLOAT64_FORWARD = Tolerance(1e-12, "the same arithmetic in float64, summed in another order: 2e-15 seen")
FLOAT64_GRADIENT = Tolerance(1e-10, "as the forward pass, through a longer backward pass: 4e-15 seen")
FLOAT32_FORWARD = Tolerance(1e-5, "fp32 sums of ~100 terms in another order over a few layers: 7e-7 seen")
TRL_FLOAT32_LOSS = Tolerance(1e-5, "fp32 log-probabilities summed over a response and subtracted: 2e-6 seen")
TRL_FLOAT32_GRADIENT = Tolerance(2e-5, "fp32 gradients of such losses: 3e-6 seen")
BFLOAT16_EXCESS = Tolerance(
    1.1, "RMS error against float64 over the reference's: they round to bf16 at different places, the ratio scatters around 1"
)
NF4_OWN_SCALES = Tolerance(
    5e-3,
    "bitsandbytes on a CPU looks scales up in a table and misses the nearest code in under 1 % of blocks, by one step of the "
    "dynamic map (up to 1 % of that block's scale); on CUDA it searches, as we do; 1.3e-3 seen",
)
FLOAT64_TRAJECTORY = Tolerance(1e-12, "ten optimizer steps, all in float64: 1e-15 seen")
FLOAT32_TRAJECTORY_LOSS = Tolerance(2e-5, "what a step logs after steps whose fp32 gradients agree to 3e-6: 4e-6 seen")
FLOAT32_TRAJECTORY_ADAPTER = Tolerance(
    5e-4, "AdamW's first steps are close to sign(gradient) · rate, which magnifies the digits a small gradient lacks: 5e-5 seen"
)
