"""How far the two stacks may differ in an audit, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """A bound: on max|x − y| / max|y|, or, where its reason says so, on a share of numbers.

    Attributes:
        relative: The bound.
        reason: Why it is this.
        seen: The largest value met when the bound was set.
    """

    relative: float
    reason: str
    seen: float


@dataclass(frozen=True)
class Allowance:
    """What an audit allows one quantity, given the reference's own error: no worse than the reference.

    Errors are max|x − truth| / max|truth| against float64 on the same input.

    Attributes:
        factor: How many times the reference's error.
        floor: Added to it: the reference may be right by luck.
        ceiling: The largest error that rounding explains. A reference beyond it is itself at fault.
        reason: Why these.
    """

    factor: float
    floor: float
    ceiling: float
    reason: str

    def tolerance(self, reference_error: float) -> float:
        """The bound on our error."""
        return self.factor * reference_error + self.floor


AUDIT = {
    "float32": Allowance(
        3.0,
        2**-20,
        1e-3,
        "the same sums in another order; the largest error of a tensor scatters (at most 2.3 times the reference's seen), and "
        "2^-20 is sixteen roundings. The angles of far positions and large attention scores magnify one a thousand times",
    ),
    "bfloat16": Allowance(
        2.0,
        2**-8,
        0.5,
        "the two round at different places: one rounding is at most 2^-9, and a projection with bias is rounded once in torch "
        "and twice in JAX (at most 2.5 times the reference's error seen, 3.2 where that one was below half a rounding). Large "
        "attention scores magnify a rounding a hundred times",
    ),
}
NF4_CODES = Tolerance(0.0, "share of differing bytes: both take the nearest of 16 codes in the same fp32 arithmetic", 0.0)
NF4_SCALES = Tolerance(0.0, "share of differing scales, where they are kept in fp32: both take the largest magnitude", 0.0)
NF4_SCALE_CODES = Tolerance(
    0.02,
    "share of differing bytes: on a CPU bitsandbytes takes scales from a table and misses the nearest in some of them",
    0.008,
)

_WALK = "after up to eight steps taken one from the other"
VERIFY = {
    "float32": {
        "loss": Tolerance(2e-5, f"fp32 against float64, {_WALK}", 2.1e-7),
        "grad_norm": Tolerance(1e-4, f"fp32 gradients agree to 3e-6; {_WALK}", 1.0e-6),
        "reference": Tolerance(2e-5, "fp32 log-probabilities, summed over a response", 1.0e-6),
        "moments": Tolerance(5e-4, f"running means of such gradients, and of their squares; {_WALK}", 8.1e-6),
        "update": Tolerance(
            2e-2, "AdamW divides by the root of the second moment, which magnifies the digits a small gradient lacks", 1.5e-4
        ),
    },
}
"""What a step that is taken anew in float64 may differ by, from one that a run took in the type: the number itself, the largest
number of a matrix over its largest, and of an update the root of the mean square over the update's own."""
