"""How rough a run's own type is in a step, and what that does not excuse."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medllm.verify.adamw import TrainingState, global_norm
from medllm.verify.findings import Finding
from medllm_parity.kept_reference import pair_sums
from medllm_parity.layered_step import StepNumbers
from medllm_parity.measure import apart
from medllm_parity.micro_batches import MicroBatch
from medllm_parity.tolerances import StepErrors


def step_errors(
    rough: StepNumbers, exact: StepNumbers, batches: Sequence[MicroBatch], states: tuple[TrainingState, TrainingState]
) -> StepErrors:
    """How far the run's own type is from float64 in a step that both were taken in.

    Nothing is small by luck: of the gradient's norm that is the norm of the difference, which is no smaller than the difference
    of the norms; the loss has beside its difference what its tokens' would scatter by.

    Args:
        rough: The step in the run's own type.
        exact: The same in float64.
        batches: Its micro-batches.
        states: What AdamW makes of the rough gradient, and of the exact one.
    """
    ours, truth = states
    moments = [(ours.first, truth.first), (ours.second, truth.second)]
    gradients = {name: rough.gradients[name] - gradient for name, gradient in exact.gradients.items()}
    loss = abs(rough.terms["loss"] - exact.terms["loss"]) + _scatter(rough, exact)
    reference = 0.0
    if rough.reference is not None and exact.reference is not None:
        parts = zip(batches, rough.reference, exact.reference, strict=True)
        reference = max(apart(pair_sums(batch, one), pair_sums(batch, other)) for batch, one, other in parts)
    return StepErrors(
        loss=loss / max(abs(exact.terms["loss"]), 1e-9),
        norm=global_norm(gradients) / max(global_norm(exact.gradients), 1e-30),
        moments=max(apart(one[name], other[name]) for one, other in moments for name in other),
        reference=reference,
    )


def beyond_noise(found: Sequence[Finding], own: StepErrors) -> list[Finding]:
    """What is refuted though a step's type is too rough to take it in: what needs no gradient, what is missing, and a loss that
    is further off than any rounding."""

    def counts(one: Finding) -> bool:
        needs_no_gradient = one.what in ("update", "learning rate") or one.error is None
        return needs_no_gradient or (one.what == "loss" and own.excuses_no(one.error or 0.0))

    return [one for one in found if one.status == "refuted" and counts(one)]


def _scatter(rough: StepNumbers, exact: StepNumbers) -> float:
    """The standard deviation of a loss whose log-probabilities are off by chance as much as these, each for itself."""
    parts = zip(exact.weights, rough.logprobs, exact.logprobs, strict=True)
    return math.sqrt(sum(float((weight * (one - other)).square().sum()) for weight, one, other in parts))
