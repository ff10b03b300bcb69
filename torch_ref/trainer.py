"""What both training recipes share: the Trainer's arguments, the run's log, the adapter and the summary."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medllm.config import ModelConfig, OptimizerConfig, TrainingConfig
from medllm.errors import UserError
from medllm.host.processes import is_primary_process
from medllm.run import Run, atomic_path
from medllm.training import TrainSummary

_FAR_AWAY = 1_000_000_000


def processes() -> int:
    """Data-parallel processes of this launch (``accelerate launch`` and ``torchrun`` set WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def per_process(units: int, setting: str) -> int:
    """``units`` over all devices → units of one process.

    Raises:
        UserError: they do not divide evenly.
    """
    share, rest = divmod(units, processes())
    if rest or not share:
        raise UserError(f"{setting} is {units}: it counts over all devices and must be a multiple of {processes()} processes")
    return share


def trainer_arguments(
    model: ModelConfig, optimizer: OptimizerConfig, training: TrainingConfig, run: Run, *, batch: int, accumulation: int
) -> dict[str, Any]:
    """Keyword arguments of ``TrainingArguments`` (and of TRL's ``DPOConfig``, which extends it).

    Args:
        model: Its dtype decides about bf16 autocast.
        optimizer: AdamW and its schedule.
        training: The loop.
        run: Checkpoints go to its ``checkpoints`` folder.
        batch: Rows of one forward pass of one process.
        accumulation: Forward passes added up before a step.

    Raises:
        UserError: ``remat`` is a policy that transformers does not have.
    """
    return {
        "output_dir": str(run.path / "checkpoints"),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": training.epochs,
        "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.clip_norm,
        "lr_scheduler_type": "cosine",
        "warmup_steps": optimizer.warmup_ratio,  # below 1 it is a fraction of all steps, rounded up
        "bf16": model.dtype == "bfloat16",
        "gradient_checkpointing": checkpoints_layers(training),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": training.seed,
        "data_seed": training.seed,
        "logging_steps": training.log_every,
        # A NaN is to be seen, not replaced by the average of the steps before it.
        "logging_nan_inf_filter": False,
        # The last step is saved in any case.
        "save_steps": training.checkpoint_every or _FAR_AWAY,
        "save_total_limit": 2,
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": not (sys.stderr.isatty() and is_primary_process()),
        "use_cpu": not torch.cuda.is_available(),
        # With frozen weights and every adapter in use in each pass, DDP has nothing to search for.
        "ddp_find_unused_parameters": False,
    }


def checkpoints_layers(training: TrainingConfig) -> bool:
    """Whether each layer keeps its input alone.

    Raises:
        UserError: transformers has no such policy.
    """
    if training.remat not in ("none", "layer"):
        raise UserError(f"training.remat is {training.remat!r}: engine torch knows 'none' and 'layer'; give one of these")
    return training.remat == "layer"


class RunLog(TrainerCallback):
    """Sends the Trainer's log lines to the run folder, stops at ``max_steps`` and measures the rate.

    Stopping here rather than through ``TrainingArguments.max_steps`` keeps the learning-rate schedule spanning all epochs.
    ``constants`` stand in every line.
    """

    def __init__(self, run: Run, training: TrainingConfig, **constants: float):
        self._run = run
        self._constants = constants
        self.max_steps = training.max_steps
        self._marks: list[tuple[float, float]] = []  # (seconds, epochs) at the start, after the first and after the last step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget lines a stopped session logged beyond the checkpoint it is resumed from: those steps are taken anew."""
        self._marks = [(time.monotonic(), state.epoch or 0.0)]
        self._run.forget_after(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the time, and close the run at its last step with a log line and a checkpoint."""
        self._marks = [*self._marks[:2], (time.monotonic(), state.epoch or 0.0)]
        stop = self.max_steps and state.global_step >= self.max_steps
        if stop or state.global_step >= state.max_steps:
            control.should_training_stop = control.should_log = control.should_save = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """One line of metrics; the Trainer's closing summary (``train_runtime`` …) is not one."""
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise UserError(
                f"step {state.global_step}: the loss is {logs['loss']}; lower --optimizer.learning_rate or look at the data of "
                "that step; the last checkpoint is whole"
            )
        if state.is_world_process_zero and "loss" in logs:
            numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
            self._run.log(state.global_step, **numbers, **self._constants)

    def seconds_per_epoch(self) -> float:
        """By the steps after the first, which pays for allocations and kernel selection; by that step if it is the only one."""
        if len(self._marks) < 2:
            return math.inf
        (began, start), (ended, end) = self._marks[-2:]
        return (ended - began) / (end - start)


def run_trainer(
    trainer: Trainer, log: RunLog, run: Run, *, resume: bool, units_per_epoch: int, seconds_ahead: float = 0.0
) -> TrainSummary:
    """Train (from the run's last checkpoint with ``resume``), write ``run.path/adapter`` and sum up.

    Args:
        trainer: Ready to train, its model a ``PeftModel``.
        log: The callback of this run.
        run: The run folder.
        resume: Go on from ``checkpoints``; a run that had not reached its first checkpoint begins anew.
        units_per_epoch: Tokens or pairs in one pass over the data, for the rate.
        seconds_ahead: What was spent on all the data before the first step; every epoch bears its share in the rate.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(log)
    checkpoints = run.path / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if resume and checkpoints.is_dir() else None
    adapter = run.path / "adapter"
    reached = TrainerState.load_from_json(str(Path(last) / "trainer_state.json")).global_step if last else 0
    if log.max_steps and reached >= log.max_steps:  # the Trainer would take one more step before it asks whether to stop
        losses = [line["loss"] for line in run.metrics() if "loss" in line]
        return TrainSummary(reached, losses[-1] if losses else float("nan"), seconds_ahead, 0.0, str(adapter))
    began = time.monotonic()
    # The optimizer's state is this run's own file; transformers reads it with torch's restricted loader (weights_only).
    trainer.train(resume_from_checkpoint=last)
    seconds = time.monotonic() - began
    if trainer.is_world_process_zero():
        save_adapter(trainer.model, adapter)
    trainer.accelerator.wait_for_everyone()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return TrainSummary(
        steps=trainer.state.global_step,
        loss=losses[-1] if losses else float("nan"),
        seconds=seconds_ahead + seconds,
        rate=units_per_epoch / (log.seconds_per_epoch() + seconds_ahead / trainer.args.num_train_epochs),
        adapter=str(adapter),
    )


def save_adapter(model: peft.PeftModel, path: Path) -> None:
    """Write the trained adapter as a PEFT directory (safetensors), all of it or nothing."""
    with atomic_path(path) as scratch:
        # Left to itself PEFT asks the Hub whether the base model's embedding was resized.
        model.save_pretrained(str(scratch), selected_adapters=["default"], save_embedding_layers=False)
