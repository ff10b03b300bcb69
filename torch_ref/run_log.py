"""What follows the Trainer: the run's log, its end, and that no number that is not finite goes any further."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medllm.checkpoints import Saving, seal, surplus
from medllm.config import TrainingConfig
from medllm.errors import UserError
from medllm.host.processes import is_primary_process
from medllm.host.progress import Pace, Progress
from medllm.host.stopping import StopRequest
from medllm.replay import Batch, Part, Replay
from medllm.run import Run
from medllm.training import Skips, progress_words
from torch_ref.micro_batch import MicroBatch, replay


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder."""
    return [int(path.name.rsplit("-", 1)[1]) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]


class RunLog(TrainerCallback):
    """Sends the Trainer's log lines to the run folder, ends the run where it is to end, and measures the rate.

    Ending here rather than through ``TrainingArguments.max_steps`` keeps the learning-rate schedule spanning all epochs.

    Args:
        run: The run folder.
        training: The loop.
        named: What a user knows the data of a micro-batch by, given its ``input_ids``.
        stage: ``cpt`` or ``rpo``.
        unit: What the rate counts, ``tokens`` or ``pairs``.
        per_epoch: So many of them are in a pass over the data.
        constants: Stand in every line.
    """

    def __init__(
        self,
        run: Run,
        training: TrainingConfig,
        named: Callable[[torch.Tensor], str],
        *,
        stage: str,
        unit: str,
        per_epoch: int,
        **constants: float,
    ):
        self._run = run
        self._training = training
        self._named = named
        self._stage = stage
        self._unit = unit
        self.per_epoch = per_epoch
        self._constants = constants
        self._pace = Pace()
        self._saving = Saving(training)
        self._said = ""
        self._marks: list[tuple[float, float]] = []  # (seconds, epochs) at the start, after the first and after the last step
        self._began = time.monotonic()
        self._seconds_before = 0.0
        self._went_on = False
        self._skipped = 0
        self._skips = Skips(training)
        self._micro_batches: list[MicroBatch] = []  # of the step
        self._replay: Callable[[MicroBatch, Part], Replay] | None = None
        self.request = StopRequest()
        self.progress: Progress = lambda done, total, doing="": None

    def end(self, state: TrainerState) -> int:
        """The step that the run ends at."""
        return min(self._training.max_steps or state.max_steps, state.max_steps)

    def go_on(self, state: TrainerState) -> None:
        """Begin where ``state`` is: later lines of the log are dropped."""
        self._run.go_on(state.global_step, self.end(state))
        lines = [line for line in self._run.metrics() if "seconds" in line and line["step"] <= state.global_step]
        self._seconds_before = lines[-1]["seconds"] if lines else 0.0
        self._went_on = state.global_step > 0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of training, over all sessions."""
        return self._seconds_before + time.monotonic() - self._began

    @contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """Look at each micro-batch that ``trainer`` computes: whether its loss, and the gradient with it, is finite."""
        compute = trainer.training_step

        def watched(model: Any, inputs: dict[str, Any], items: Any = None) -> torch.Tensor:
            given = dict(inputs)  # TRL takes some out
            loss = compute(model, inputs, items)
            norms = torch._foreach_norm([one.grad for one in model.parameters() if one.grad is not None])
            finite = torch.isfinite(torch.stack([*norms, loss.detach().to(norms[0])])).all()
            self._micro_batches.append(MicroBatch(given, items, finite, loss.detach()))
            return torch.nan_to_num(loss) if self._training.on_nan == "skip" else loss

        def replayed(one: MicroBatch, part: Part) -> Replay:
            return replay(trainer.model_wrapped, partial(compute, trainer.model_wrapped), one, part)

        trainer.training_step = watched  # type: ignore[method-assign]
        self._replay = replayed
        yield
        self._replay = None
        trainer.training_step = compute  # type: ignore[method-assign]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget lines a stopped session logged beyond the checkpoint it is resumed from: those steps are taken anew."""
        self.go_on(state)
        self._marks = [(time.monotonic(), state.epoch or 0.0)]
        self._pace.mark(time.monotonic(), (state.epoch or 0.0) * self.per_epoch)
        self._saving.saved()
        self.progress(state.global_step, self.end(state))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        """Take no step with numbers that are not finite.

        Raises:
            UserError: there are some, and such steps are not left out.
        """
        found, self._micro_batches = self._micro_batches, []
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
        if torch.stack([torch.isfinite(one).all() for one in gradients]).all() and all(one.finite for one in found):
            self._skips.taken()
            return
        try:
            self._skips.leave_out(self._fault(state.global_step + 1, found))
        finally:
            for one in model.parameters():
                one.grad = None
        self._skipped += 1

    def _fault(self, step: int, found: Sequence[MicroBatch]) -> str:
        """What is said of a step that is not finite, whose batch is kept."""
        number = next((number for number, one in enumerate(found, 1) if not one.finite), 0)
        if not number:
            return f"step {step}: a loss or its gradient is not finite in another process"
        # Gradients add up: what the first of them spoiled, the later ones do not mend. Each is computed alone to tell.
        parts = [Part(one, self._named(micro.inputs["input_ids"]), one < number) for one, micro in enumerate(found, 1)]
        fault, part = found[number - 1], parts[number - 1]
        what = f"the loss is {float(fault.loss)}, and it or its gradient is not finite"
        said = f"step {step}: {what}, by micro-batch {number} ({part.named})"
        arrays = [one.arrays() for one in found]
        file = Batch(self._stage, "torch", step, said, parts, arrays).keep(self._run.path)
        return f"{said}{self._first(fault, part)}; medllm replay {self._run.path} computes it alone" if file else said

    def _first(self, fault: MicroBatch, part: Part) -> str:
        """The first tensor of a micro-batch that is not finite. Of several processes none is looked for: all would have to
        compute it, also where one of them fails."""
        if self._replay is None or torch.distributed.is_initialized():
            return ""
        try:
            found = self._replay(fault, part)
        except Exception:  # it may lack the memory, and what is to be told is the step
            return ""
        return f", first in {found.first.words}" if found.first else ""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        """Note the time, say how far it is, save where that is due, and close the run at its last step, or where that is asked
        for, with a log line and a checkpoint.

        Raises:
            UserError: the adapter that would be saved is not finite.
        """
        self._marks = [*self._marks[:2], (time.monotonic(), state.epoch or 0.0)]
        self._pace.mark(time.monotonic(), (state.epoch or 0.0) * self.per_epoch)
        self.progress(state.global_step, self.end(state), self._said)
        if self._saving.by_steps(state.global_step) or (self._saving.timed and _anywhere(self._saving.by_time())):
            control.should_save = True
        if state.global_step >= self.end(state) or _anywhere(self.request.asked):
            control.should_training_stop = control.should_log = control.should_save = True
        if control.should_save and not all(torch.isfinite(one).all() for one in model.parameters() if one.requires_grad):
            raise UserError(f"step {state.global_step}: the adapter is not finite; lower --optimizer.learning_rate")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The checkpoint is written, by all processes: from now on it is one, and those that are not kept any more go."""
        self._saving.saved()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not is_primary_process():
            return
        folder = Path(str(args.output_dir))
        seal(folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        for step in surplus(checkpoint_steps(folder), self._training.keep, self._training.keep_every):
            shutil.rmtree(folder / f"{PREFIX_CHECKPOINT_DIR}-{step}")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """One line of metrics; the Trainer's closing summary (``train_runtime`` …) is not one."""
        if state.is_world_process_zero and "loss" in logs:
            numbers = {name: value for name, value in logs.items() if isinstance(value, int | float) and math.isfinite(value)}
            skipped = {"skipped": float(self._skipped)} if self._skipped else {}
            self._skipped = 0
            rate = {f"{self._unit}_per_second": self._pace.rate}
            self._run.log(state.global_step, **numbers, **self._constants, **skipped, **rate, seconds=self.seconds)
            self._said = progress_words(logs["loss"], self._pace.rate, self._unit)

    def seconds_per_epoch(self) -> float:
        """By the steps after the first, which pays for allocations and kernel selection; by that step if it is the only one.
        Of a run that went on, by the lines of all its sessions."""
        marks = self._marks
        if self._went_on:
            marks = [(line["seconds"], line["epoch"]) for line in self._run.metrics() if {"seconds", "epoch"} <= line.keys()]
            marks = [marks[0], marks[-1]] if len(marks) > 1 else [(0.0, 0.0), *marks]
        if len(marks) < 2:
            return math.inf
        (began, start), (ended, end) = marks[-2:]
        return (ended - began) / (end - start)


def _anywhere(flag: bool) -> bool:
    """Whether it holds in any of the processes: they decide alike at the same step."""
    if not torch.distributed.is_initialized():
        return flag
    held = torch.tensor(float(flag), device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MAX)
    return bool(held)
