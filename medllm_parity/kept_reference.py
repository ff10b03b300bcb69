"""The reference's log-probabilities that a JAX run kept on disk, held against those that come of the model it was to have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from medllm.verify.findings import Finding
from medllm.verify.record import Record
from medllm_parity.measure import apart
from medllm_parity.micro_batches import MicroBatch, PreferenceMicroBatch
from medllm_parity.planned_steps import Plan
from medllm_parity.tolerances import Tolerance

WHAT = "reference log-probabilities on disk"


def check_reference(
    record: Record,
    plan: Plan,
    step: int,
    batches: Sequence[MicroBatch],
    logprobs: Sequence[torch.Tensor],
    bound: Tolerance,
) -> list[Finding]:
    """The kept sums of the pairs of a step; nothing where a run kept none.

    Args:
        record: The run.
        plan: Its steps, whose units the kept sums are in the order of.
        step: Which step.
        batches: Its micro-batches.
        logprobs: The reference's log-probabilities of each, taken anew.
        bound: Tolerance.
    """
    file = _kept(record, plan)
    if file is None:
        return []
    ends = np.cumsum([len(pairs) for _, pairs in plan.problems()])
    kept = np.split(load_file(file)["logprobs"].astype(np.float64), ends[:-1])
    for units, batch, values in zip(plan.steps[step - 1], batches, logprobs, strict=True):
        anew, found = pair_sums(batch, values), np.concatenate([kept[unit] for unit in units])
        error = apart(found, anew)
        if not error <= bound.relative:
            names = ", ".join(dict.fromkeys(plan.problems()[unit][0] for unit in units))
            said = f"{file.name} is stale: its numbers of problems {names} are another model's"
            return [Finding(WHAT, "refuted", f"step {step}", said, error, bound.relative, bound.reason)]
    return [Finding(WHAT, "proved", f"step {step}", "", error, bound.relative, bound.reason)]


def pair_sums(batch: MicroBatch, logprobs: torch.Tensor) -> np.ndarray:
    """Log-probabilities of the tokens of a micro-batch of pairs, summed over each response."""
    assert isinstance(batch, PreferenceMicroBatch)
    return batch.sums(logprobs).numpy()


def _kept(record: Record, plan: Plan) -> Path | None:
    """The file with as many pairs as the run has; of a shared folder it may be another run's, and is left alone."""
    if record.engine != "jax" or record.config.reference_cache is not None:
        return None
    pairs = sum(len(some) for _, some in plan.problems())
    files = sorted(record.path.glob("reference-*.safetensors"))
    return next((file for file in files if load_file(file)["logprobs"].shape == (pairs, 2)), None)
