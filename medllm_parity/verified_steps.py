"""Optimizer steps of a run, taken anew in float64 from states that are known, and held against its log and its checkpoints.

Known are the fresh adapter and what the checkpoints hold. From one of them the walk takes every step up to the one that is
asked for; each is held against its line of the log, and where it comes to a checkpoint, against that: the adapter and both
moments. From there it goes on with the checkpoint's own.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medllm.config import LoraConfig, ModelConfig
from medllm.errors import UserError
from medllm.host.progress import Progress
from medllm.metrics import METRICS
from medllm.model.adapter import Adapter, read_adapter, write_adapter
from medllm.model.directory import ModelDirectory
from medllm.run import MERGED
from medllm.stages.handover import merges
from medllm.verify.adamw import TrainingState, adamw_step, global_norm, learning_rate, moved
from medllm.verify.data import TrainingData
from medllm.verify.files import check_adapter_weights
from medllm.verify.findings import STEPS, Finding, held, refuted_by
from medllm.verify.record import Record
from medllm.verify.training_log import RATE_REASON, RATE_TOLERANCE, check_log
from medllm_parity.collector import seeing_only_what_is_new
from medllm_parity.kept_reference import check_reference
from medllm_parity.layered_step import LayeredModel, StepNumbers
from medllm_parity.measure import apart
from medllm_parity.planned_steps import Plan, plan_cpt, plan_preferences
from medllm_parity.preference_formulas import FORMULAS
from medllm_parity.rough_steps import beyond_noise, step_errors
from medllm_parity.tolerances import ADAMW_ROUNDINGS, VERIFY, StepBounds, StepErrors, Tolerance
from medllm_parity.training_states import checkpoints, fresh_state, places, planned_length, read_checkpoint, state_of


@dataclass(frozen=True)
class Trained:
    """What a run trained: weights, the adapters under the trained one, those of the reference, and what the trained one was."""

    model: ModelConfig
    frozen: Sequence[Adapter]
    reference: Sequence[Adapter] | None
    lora: LoraConfig
    start: Adapter | None


def trained_by(record: Record) -> Trained:
    """What the settings of a run say it trained (:mod:`medllm.stages.handover`).

    Raises:
        UserError: an adapter, or the merged weights, are not there.
    """
    config = record.config
    if record.stage == "cpt":
        return Trained(config.model, [read_adapter(path) for path in config.model.adapters], None, config.lora, None)
    if merges(config.model, config):
        merged = record.path / MERGED
        if not merged.is_dir():
            raise UserError(f"{merged}: the merged weights that the run was trained on are gone")
        return Trained(dataclasses.replace(config.model, path=str(merged), adapter=None), [], [], config.lora, None)
    adapters = [read_adapter(path) for path in config.model.adapters]
    if adapters and config.handover == "continue":
        return Trained(config.model, adapters[:-1], adapters, adapters[-1].lora, adapters[-1])
    return Trained(config.model, adapters, adapters, config.lora, None)


def check_steps(
    record: Record,
    data: TrainingData,
    steps: int,
    reach: int,
    seed: int,
    progress: Progress = lambda done, total, doing="": None,
) -> list[Finding]:
    """Take steps of a run anew.

    Args:
        record: The run.
        data: What it trains on, made anew.
        steps: How many are drawn.
        reach: How many may be taken from one known state to get to one.
        seed: Of the draw.
        progress: Called with (steps done, steps in all).
    """
    try:
        trained = trained_by(record)
    except UserError as error:
        return [refuted_by(STEPS, error)]
    plan = _plan(record, data)
    if plan.loss is not None and plan.loss.name not in FORMULAS:
        return [
            Finding(STEPS, "not checked", said=f"loss {plan.loss.name!r} has no formula here that a step could be taken by")
        ]
    findings = check_log(record, len(plan.steps))
    known, flaws = _known_states(record, trained)
    findings += flaws
    if any(known):
        last = known[max(known)]
        findings += check_adapter_weights(record, last.adapter, last.source) if record.result is not None else []
        findings += _same_length(record, len(plan.steps))
    wanted, out_of_reach, least = _choose(record, known, plan, steps, reach, seed)
    if out_of_reach:
        more = f"; --reach {least} takes the first" if steps and not wanted and least else ""
        said = (
            f"{out_of_reach} steps are not within --reach {reach} of a known state, or behind one left out or filled up{more}"
        )
        findings.append(Finding(STEPS, "not checked", said=said))
    with seeing_only_what_is_new(), tempfile.TemporaryDirectory() as folder:
        return findings + _Walk(record, trained, plan, known, Path(folder)).take(wanted, progress)


def _plan(record: Record, data: TrainingData) -> Plan:
    processes = max(_processes(record))
    if data.rows is not None:
        return plan_cpt(record.engine, data.rows, record.config.training, processes)
    assert data.preferences is not None
    return plan_preferences(record.engine, data.preferences, record.config, processes)


def _processes(record: Record) -> set[int]:
    """In how many processes the sessions of a run trained."""
    said = [session.get("processes", 1) for session in record.sessions]
    return {one if isinstance(one, int) and one > 0 else 1 for one in said} or {1}


def _known_states(record: Record, trained: Trained) -> tuple[dict[int, TrainingState], list[Finding]]:
    directory = ModelDirectory(trained.model.path)
    where = places(trained.lora, directory)
    if trained.start is not None:
        first = state_of(0, trained.start.tensors, "the adapter it went on from")
    else:
        first = fresh_state(record.engine, trained.lora, where, directory.architecture.num_layers)
    known, flaws = {0: first}, []
    for step, folder in checkpoints(record.engine, record.path).items():
        try:
            known[step] = read_checkpoint(record.engine, folder, step, trained.lora, where)
        except UserError as error:
            flaws.append(refuted_by("a checkpoint", error))
    return known, flaws


def _same_length(record: Record, total: int) -> list[Finding]:
    _, folder = max(checkpoints(record.engine, record.path).items())
    found = planned_length(record.engine, folder)
    differences = [] if found == total else [f"the schedule spans {found} steps, data and settings give {total}"]
    return held("the number of steps", f"checkpoints/{folder.name}", differences, f"{total} steps")


@dataclass(frozen=True)
class _Target:
    """A step that can be held against something, and the known state that the walk to it begins at."""

    step: int
    start: int


def _choose(
    record: Record, known: Mapping[int, Any], plan: Plan, steps: int, reach: int, seed: int
) -> tuple[list[_Target], int, int]:
    """Steps drawn from those within reach, the last of them always; how many are not within it; and the least reach that takes
    one, 0 where none does."""
    lines = [int(line["step"]) for line in record.lines]
    before = dict(zip(lines, [0, *lines], strict=False))
    # Several torch processes fill up a step, and one does not: which did is not known where sessions differ.
    several = record.engine == "torch" and len(_processes(record)) > 1
    taken = [[unit for micro in step for unit in micro] for step in plan.steps] if several else []
    filled = [step for step, units in enumerate(taken, 1) if len(set(units)) < len(units)]
    left_out = [int(line["step"]) for line in record.lines if line.get("skipped")] + filled
    targets = []
    total = len(plan.steps)
    for step in sorted(one for one in {*lines, *known} - {0} if one <= total):
        start = max(one for one in known if one <= before.get(step, step - 1))
        targets.append(_Target(step, start))
    # Which step of a line was left out is not logged, so none is walked past; nor one that several processes filled up.
    takable = [one for one in targets if not any(one.start < step <= one.step for step in left_out)]
    near = [one for one in takable if one.step - one.start <= reach]
    drawn = random.Random(seed).sample(near, min(steps, len(near)))
    least = min((one.step - one.start for one in takable), default=0)
    return sorted({*drawn, *near[-1:]} if steps else [], key=lambda one: one.step), len(targets) - len(near), least


@dataclass
class _Walk:
    """Steps taken one after the other."""

    record: Record
    trained: Trained
    plan: Plan
    known: Mapping[int, TrainingState]
    folder: Path
    done: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Of each step that was taken its loss, and the norm of its gradient."""

    def __post_init__(self) -> None:
        parts = self.trained.model, self.trained.frozen, self.trained.reference
        self.model, self.rough = LayeredModel(*parts), LayeredModel(*parts, exact=False)
        self.lines = {int(line["step"]): line for line in self.record.lines}
        types = self.trained.model
        self.type = "float32" if types.dtype == "float32" and types.quantization == "none" else "bfloat16"
        write_adapter(self.folder / "adapter", self.trained.lora, _narrow(self.known[0].adapter), self.trained.model.path)

    def take(self, wanted: Sequence[_Target], progress: Progress) -> list[Finding]:
        """The findings on every step on the way to those that are wanted."""
        ends: dict[int, int] = {}
        for target in wanted:
            ends[target.start] = max(ends.get(target.start, 0), target.step)
        walks: list[tuple[int, int]] = []
        for start, end in sorted(ends.items()):
            begun = walks.pop() if walks and start < walks[-1][1] else (start, end)
            walks.append((begun[0], max(begun[1], end)))  # one that begins on the way of another is part of it
        total, findings = sum(end - start for start, end in walks), []
        for start, end in walks:
            state: TrainingState | None = self.known[start]
            for step in range(start + 1, end + 1):
                progress(len(self.done), total)
                state = self.known.get(step - 1, state)
                if state is not None:
                    state, found = self._step(state, step)
                    findings += found
        progress(total, total)
        return findings

    def _step(self, state: TrainingState, step: int) -> tuple[TrainingState | None, list[Finding]]:
        """The state after a step, and what was found of it. No state where the run's type is too rough to walk on in."""
        config = self.record.config.optimizer
        batches = self.plan.batches(step)
        adapter = Adapter(self.trained.lora, state.adapter, str(self.folder / "adapter"))
        numbers = self.model.step(adapter, batches)
        self.done[step] = numbers.terms["loss"], global_norm(numbers.gradients)
        rate = learning_rate(config, len(self.plan.steps), step)
        anew = adamw_step(state, numbers.gradients, config, rate)
        found = self._held_against(state, step, numbers, anew, None)
        if self.type != "float32" and any(one.status == "refuted" for one in found):
            rough = self.rough.step(adapter, batches)
            own = step_errors(rough, numbers, batches, (adamw_step(state, rough.gradients, config, rate), anew))
            if own.is_too_rough:
                said = (
                    f"{self.trained.model.dtype} itself is {own.largest:.2g} off float64 here, in moments {own.moments:.2g}: "
                    "nothing can be held against it, nor what follows until a known state"
                )
                return None, [*beyond_noise(found, own), Finding(STEPS, "not checked", f"step {step}", said)]
            found = self._held_against(state, step, numbers, anew, own)
        refuted = [one for one in found if one.status == "refuted"]
        if refuted or not found:
            return self.known.get(step, anew), refuted
        worst = max((one for one in found if one.tolerance), key=lambda one: (one.error or 0) / (one.tolerance or 1))
        said = f"from {state.source}: {', '.join(one.what for one in found)}; the closest to its bound is {worst.what}"
        whole = Finding(STEPS, "proved", f"step {step}", said, worst.error, worst.tolerance, worst.reason)
        return self.known.get(step, anew), [whole]

    def _held_against(
        self, state: TrainingState, step: int, numbers: StepNumbers, anew: TrainingState, own: StepErrors | None
    ) -> list[Finding]:
        """A step taken anew against what the run left of it; ``own`` is what the run's type is off, where that was measured."""
        walked = VERIFY[f"{self.type}, walked"]
        bounds = VERIFY[self.type] if self.known.get(state.step) is state else walked
        logged = bounds if step - 1 in {0, *self.lines} else walked
        if own is not None:
            bounds, logged = bounds.widened(own), logged.widened(own)
        found = self._against_log(step, logged)
        if numbers.reference is not None:
            batches = self.plan.batches(step)
            found += check_reference(self.record, self.plan, step, batches, numbers.reference, bounds.reference)
        if step in self.known:
            found += self._against_checkpoint(state, anew, self.known[step], bounds)
        return found

    def _against_log(self, step: int, bounds: StepBounds) -> list[Finding]:
        """A line of the log, which tells of one step or of the mean of several."""
        line = self.lines.get(step)
        if line is None:
            return []
        before = max((one for one in self.lines if one < step), default=0)
        told = range(before + 1, step + 1)
        if any(one not in self.done for one in told):
            return []
        numbers = [self.done[one] for one in told]
        loss, norm = (float(mean) for mean in np.mean(numbers, axis=0))
        norm = numbers[-1][1] if self.record.engine == "torch" else norm
        where = f"step {step}" if len(told) == 1 else f"steps {told[0]} to {step}"
        data = self.plan.named(step)
        found = [self._number("loss", where, line.get("loss"), loss, bounds.loss, data)]
        found.append(self._number("gradient norm", where, line.get("grad_norm"), norm, bounds.norm, data))
        config = self.record.config.optimizer
        rate = learning_rate(config, len(self.plan.steps), step)
        bound = Tolerance(RATE_TOLERANCE, RATE_REASON, 0.0)
        found.append(self._number("learning rate", where, line.get("learning_rate"), rate, bound, "", config.learning_rate))
        return found

    def _number(
        self, what: str, where: str, logged: float | None, anew: float, bound: Tolerance, data: str, scale: float | None = None
    ) -> Finding:
        if logged is None:
            return Finding(what, "refuted", where, f"{METRICS} has none; it comes to {anew:.6g}")
        error = abs(logged - anew) / (scale or max(abs(anew), 1e-9))
        ok = error <= bound.relative
        said = "" if ok else f"{logged:.6g} is logged, taken anew it comes to {anew:.6g}" + (f" ({data})" if data else "")
        return Finding(what, "proved" if ok else "refuted", where, said, error, bound.relative, bound.reason)

    def _against_checkpoint(
        self, before: TrainingState, anew: TrainingState, kept: TrainingState, bounds: StepBounds
    ) -> list[Finding]:
        """Moments against those of the gradient taken anew; and where the adapter before is known, whether the kept moments
        move it to the kept one. That needs no gradient, and is as exact as the type the adapter is kept in."""
        where, found = f"step {kept.step}, {kept.source}", []
        for what, ours, theirs in (("first moment", anew.first, kept.first), ("second moment", anew.second, kept.second)):
            if bounds.moments is not None:
                errors = {name: apart(ours[name], theirs[name]) for name in theirs}
                found.append(_worst_of(what, where, errors, bounds.moments))
        if self.known.get(before.step) is before:
            config = self.record.config.optimizer
            rate = learning_rate(config, len(self.plan.steps), kept.step)
            adapter = moved(before, kept.first, kept.second, config, rate)
            bound = dataclasses.replace(ADAMW_ROUNDINGS, relative=ADAMW_ROUNDINGS.relative * kept.rounding)
            errors = {name: apart(adapter[name], value) for name, value in kept.adapter.items()}
            found.append(_worst_of("update", where, errors, bound))
        return found


def _worst_of(what: str, where: str, errors: Mapping[str, float], bound: Tolerance) -> Finding:
    name = max(errors, key=lambda one: errors[one] if errors[one] == errors[one] else np.inf)
    ok = errors[name] <= bound.relative
    said = "" if ok else f"{name} is not what the step makes of it"
    return Finding(what, "proved" if ok else "refuted", where, said, errors[name], bound.relative, bound.reason)


def _narrow(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
