"""What can be said of a training's log without taking a step: every step once, at its rate, and the result that it gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from medllm.metrics import METRICS
from medllm.run import RESULT
from medllm.verify.adamw import learning_rate
from medllm.verify.findings import Finding, held
from medllm.verify.record import Record

RATE_TOLERANCE = 1e-6
RATE_REASON = "the schedule is computed in fp32"


def check_log(record: Record, total: int) -> list[Finding]:
    """The lines of ``metrics.jsonl`` against the schedule, which spans ``total`` steps, and against ``result.json``."""
    if not record.lines:
        return [Finding("the log", "not checked", METRICS, "has no line of a step")]
    return [*_order(record, total), *_rates(record, total), *_ends(record)]


def _order(record: Record, total: int) -> list[Finding]:
    steps = [int(line["step"]) for line in record.lines]
    wrong = [f"step {after} stands behind step {before}" for before, after in pairwise(steps) if after <= before]
    config = record.config.training
    end = min(config.max_steps or total, total)
    wrong += [f"line of step {step}: the run has {total} steps" for step in steps if step > total]
    expected = {step for step in range(1, end + 1) if step % config.log_every == 0}
    if record.result is not None and (missing := sorted(expected - set(steps))):
        wrong.append(f"step {missing[0]} is missing ({len(missing)} of {len(expected)})")
    return held("each step once", METRICS, wrong, f"{len(steps)} lines, to step {steps[-1]} of {total}")


def _rates(record: Record, total: int) -> list[Finding]:
    what, worst = "the learning rate of every line", 0.0
    peak = record.config.optimizer.learning_rate
    for line in record.lines:
        step = int(line["step"])
        if "learning_rate" not in line or step > total:
            continue
        expected = learning_rate(record.config.optimizer, total, step)
        error = abs(line["learning_rate"] - expected) / peak
        if not error <= RATE_TOLERANCE:
            said = f"{line['learning_rate']:.6e} was taken, the schedule gives {expected:.6e}"
            return [Finding(what, "refuted", f"step {step}", said, error, RATE_TOLERANCE, RATE_REASON)]
        worst = max(worst, error)
    return [Finding(what, "proved", METRICS, "", worst, RATE_TOLERANCE, RATE_REASON)]


def _ends(record: Record) -> list[Finding]:
    result: Mapping[str, Any] | None = record.result
    if result is None:
        return [Finding("the result", "not checked", RESULT, "the run has not finished")]
    losses = [line["loss"] for line in record.lines if "loss" in line]
    wrong = []
    loss, steps = (_number(result, name) for name in ("loss", "steps"))
    if losses and not math.isclose(loss, losses[-1], rel_tol=1e-9):
        wrong.append(f"loss is {result.get('loss')}, in the last line of the log {losses[-1]}")
    if not steps >= record.lines[-1]["step"]:
        wrong.append(f"steps is {result.get('steps')}, the log has step {int(record.lines[-1]['step'])}")
    return held("the result is the log's", RESULT, wrong)


def _number(result: Mapping[str, Any], name: str) -> float:
    value = result.get(name)
    return float(value) if isinstance(value, int | float) else math.nan
