"""What a training logs of its steps, and how it went: over all the sessions it took."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float

from jax_medllm.train.batches import Step, TrainingData
from jax_medllm.train.compilation import compile_seconds, working_seconds
from jax_medllm.train.not_finite import NotFinite
from medllm.host.progress import Pace
from medllm.run import Run
from medllm.training import progress_words


class StepMetrics(NamedTuple):
    """Metrics of one optimizer step: those of the loss, the gradient norm before clipping, the learning rate it took, whether
    all was finite and it was taken, and of each micro-batch whether it was finite."""

    loss: Any
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""] | bool = True
    micro_batches: tuple[Bool[Array, ""], ...] = ()


@dataclass(frozen=True)
class Trained:
    """How a run went: steps done, last logged loss, seconds in all, units a second after the first step and without
    compilation, seconds of that. Of a run that went on they are over all its sessions."""

    steps: int
    loss: float
    seconds: float
    rate: float
    compile_seconds: float


class _Mark(NamedTuple):
    """A time, and the units that were done by then. ``seconds`` stand still while something is compiled."""

    seconds: float
    units: int


class TrainingLog:
    """Lines of ``metrics.jsonl``: means over steps, fetched from the device when they are written. And how the run went.

    A line's rate is over the last minute of work, the lines before it among them, and without compilation: over a step alone
    it would say when the host looked. Time runs from when the log is made.
    """

    def __init__(self, run: Run, data: TrainingData, not_finite: NotFinite, start: int = 0):
        self._run = run
        self._data = data
        self.not_finite = not_finite
        self._open: list[tuple[int, StepMetrics, Step]] = []
        self._due: list[tuple[int, StepMetrics, Step]] = []
        self._before, self._seconds_before, self._compiled_before, self._loss = self._of_earlier_sessions(start)
        self._began, self._compiled = time.perf_counter(), compile_seconds()
        self._start = self._first = self._written = _Mark(working_seconds(), 0)
        self._pace = Pace()
        self._pace.mark(*self._start)
        self.said = ""

    def add(self, step: int, metrics: StepMetrics, planned: Step) -> None:
        """A step that was started. The host waits for the first: it pays for allocations, and rates count from its end."""
        if self._first is self._start:
            jax.block_until_ready(metrics)
            self._first = _Mark(working_seconds(), self._data.units(planned))
        self._open.append((step, metrics, planned))

    def end_line(self) -> None:
        """The steps added since the last line make the next."""
        if self._open:
            self._due, self._open = self._open, []

    def write(self) -> None:
        """Write the line that is due, where one is: waits until its steps are done.

        Raises:
            UserError: a loss or a gradient is not finite, and such steps are not left out.
        """
        if not self._due:
            return
        due, self._due = self._due, []
        steps = [(step, jax.tree.map(float, jax.device_get(metrics))) for step, metrics, _ in due]
        self._written = _Mark(working_seconds(), self._written.units + sum(self._data.units(planned) for *_, planned in due))
        self._pace.mark(*self._written)
        for (step, metrics), (*_, planned) in zip(steps, due, strict=True):
            if metrics.finite:
                self.not_finite.taken()
                continue
            at_fault = [number for number, finite in enumerate(metrics.micro_batches) if not finite]
            what = f"the loss is {metrics.loss.loss} and its gradient's norm {metrics.grad_norm}"
            self.not_finite.left(step, planned, what, at_fault)
        means = _means([metrics for _, metrics in steps])
        self._loss = means.get("loss", self._loss)
        spent = {f"{self._data.unit}_per_second": self._pace.rate, "seconds": self._seconds, "compile_seconds": self._compiling}
        self._run.log(steps[-1][0], **means, **spent)
        self.said = progress_words(self._loss, self._pace.rate, self._data.unit)

    @property
    def rate(self) -> float:
        """Units a second over all steps but the first, without compilation; of the first if it is the only one."""
        sessions = [self._before]
        if self._written is not self._start:
            first = self._first if self._written.units > self._first.units else self._start
            sessions.append(_Mark(self._written.seconds - first.seconds, self._written.units - first.units))
        seconds, units = (sum(values) for values in zip(*sessions, strict=True))
        return units / max(seconds, 1e-9)

    def trained(self, steps: int) -> Trained:
        """How the run went, all of its lines written."""
        return Trained(
            steps=steps,
            loss=self._loss,
            seconds=self._seconds,
            rate=self.rate,
            compile_seconds=self._compiling,
        )

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began

    @property
    def _compiling(self) -> float:
        return self._compiled_before + compile_seconds() - self._compiled

    def _of_earlier_sessions(self, start: int) -> tuple[_Mark, float, float, float]:
        """What the lines up to step ``start`` tell: working seconds and units after the first line, seconds in all and of
        compilation, and the last loss."""
        lines = [line for line in self._run.metrics() if 0 < line["step"] <= start and "seconds" in line]
        if not lines:
            return _Mark(0.0, 0), 0.0, 0.0, math.nan
        first, last = lines[0], lines[-1]
        begins, seconds = int(first["step"]), _working(last) - _working(first)
        if first is last:  # the first line pays for allocations, and counts where it is the only one
            begins, seconds = 0, _working(last)
        units = sum(self._data.units(step) for step in self._data.steps[begins : int(last["step"])])
        losses = [line["loss"] for line in lines if "loss" in line]
        compiling = last.get("compile_seconds", 0.0)
        return _Mark(seconds, units), last["seconds"], compiling, losses[-1] if losses else math.nan


def _working(line: Mapping[str, float]) -> float:
    return line["seconds"] - line.get("compile_seconds", 0.0)


def _means(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Means of the loss metrics and of the gradient norm over the steps that were taken, the last learning rate, and how many
    were left out, where some were."""
    taken = [metrics for metrics in steps if metrics.finite]
    logged = {"learning_rate": steps[-1].learning_rate}
    if taken:
        paths, _ = jax.tree_util.tree_flatten_with_path(taken[0].loss)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
        columns = zip(*(jax.tree.leaves(metrics.loss) for metrics in taken), strict=True)
        means = {name: sum(values) / len(taken) for name, values in zip(names, columns, strict=True)}
        logged = {**means, **logged, "grad_norm": sum(metrics.grad_norm for metrics in taken) / len(taken)}
    return logged | ({"skipped": len(steps) - len(taken)} if len(taken) < len(steps) else {})
