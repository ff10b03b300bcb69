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


@dataclass(frozen=True)
class StepBounds:
    """What a step taken anew in float64 may differ by from one that a run took.

    ``loss`` and ``norm`` (the gradient's) bound a number relative to itself, the others the largest difference in a matrix over
    the largest number in it; none for ``moments``: they are not compared.
    """

    loss: Tolerance
    norm: Tolerance
    moments: Tolerance | None
    reference: Tolerance

    def widened(self, own: StepErrors) -> StepBounds:
        """Twice what the run's own type is off in this step, where that is more (as ``AUDIT`` allows)."""

        def wide(bound: Tolerance, error: float) -> Tolerance:
            if not _ROUGH.factor * error > bound.relative:
                return bound
            reason = f"twice what transformers' own modules in the run's type are off in this step, {error:.2g}"
            return Tolerance(_ROUGH.factor * error, reason, error)

        moments = None if self.moments is None or own.moments > _ROUGHEST else wide(self.moments, own.moments)
        return StepBounds(wide(self.loss, own.loss), wide(self.norm, own.norm), moments, wide(self.reference, own.reference))


@dataclass(frozen=True)
class StepErrors:
    """How far a step in a run's own type is from float64, measured as :class:`StepBounds` bounds."""

    loss: float
    norm: float
    moments: float
    reference: float

    @property
    def largest(self) -> float:
        """Of what is logged or kept as a number."""
        return max(self.loss, self.norm, self.reference)

    @property
    def is_too_rough(self) -> bool:
        """Whether twice that is more than rounding explains, or the gradient's direction is lost (a moment is off by more than
        its largest number): then no bound would say anything, though a norm be right by luck."""
        return self.largest > _ROUGHEST or self.moments > 1

    def excuses_no(self, loss: float) -> bool:
        """Whether a relative error of the loss is more than rounding explains, while the type's own is not."""
        return loss > _ROUGH.ceiling and self.loss <= _ROUGHEST


_ROUGH = AUDIT["bfloat16"]
_ROUGHEST = _ROUGH.ceiling / _ROUGH.factor
_NORM, _MOMENTS = "the gradient's error, over all matrices", "running means of the gradient and of its square"
_LOGPROBS = "log-probabilities summed over a response"
_WALKED = "as many steps since a known adapter: AdamW's first are close to sign(gradient) · rate, which magnifies rounding"
VERIFY = {
    "float32": StepBounds(
        Tolerance(2e-5, "fp32 against float64", 1.7e-7),
        Tolerance(5e-5, _NORM, 2.5e-7),
        Tolerance(2e-4, _MOMENTS, 1.4e-6),
        Tolerance(2e-5, _LOGPROBS, 1.7e-7),
    ),
    "float32, walked": StepBounds(
        Tolerance(2e-5, _WALKED, 7.9e-7),
        Tolerance(1e-4, _WALKED, 8.9e-6),
        Tolerance(1e-3, _WALKED, 1.1e-4),
        Tolerance(2e-5, _LOGPROBS, 1.7e-7),
    ),
    "bfloat16": StepBounds(
        Tolerance(5e-3, "a product is rounded at 2^-9, in other places than those where the truth is", 1.2e-3),
        Tolerance(2e-2, _NORM, 4.4e-3),
        Tolerance(1e-1, _MOMENTS, 3.0e-2),
        Tolerance(1e-2, _LOGPROBS, 2.2e-3),
    ),
    "bfloat16, walked": StepBounds(
        Tolerance(1e-1, _WALKED, 2.6e-2),
        Tolerance(5e-1, _WALKED, 2.2e-1),
        None,
        Tolerance(1e-2, _LOGPROBS, 2.2e-3),
    ),
}
"""By the type a run computed in (4-bit weights count as bfloat16: a CPU packs some of them otherwise), right after a state that
is known, and after more steps since."""
ADAMW_ROUNDINGS = Tolerance(8.0, "roundings of the type that the adapter is kept in: AdamW rounds a few times on the way", 2.4)
