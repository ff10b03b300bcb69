"""What both training recipes share: the Trainer's arguments, the checkpoint it goes on from, the adapter and the summary."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
from transformers import PrinterCallback, Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medllm.checkpoints import newest_whole
from medllm.config import ModelConfig, OptimizerConfig, TrainingConfig
from medllm.errors import Stopped, UserError
from medllm.host.processes import is_primary_process, process_count
from medllm.host.progress import progress_bar
from medllm.host.stopping import stop_requests
from medllm.run import Run, atomic_path
from medllm.training import TrainSummary
from torch_ref.run_log import RunLog, checkpoint_steps


def per_process(units: int, setting: str, processes: int | None = None) -> int:
    """``units`` over all devices → units of one process.

    Raises:
        UserError: they do not divide evenly.
    """
    processes = processes or process_count()
    share, rest = divmod(units, processes)
    if rest or not share:
        raise UserError(f"{setting} is {units}: it counts over all devices and must be a multiple of {processes} processes")
    return share


class HasPath(Protocol):
    """A folder that checkpoints go into: that of a run, or :class:`OutputFolder`."""

    path: Path


@dataclass
class OutputFolder:
    """A folder for what a Trainer would write."""

    path: Path


def trainer_arguments(
    model: ModelConfig, optimizer: OptimizerConfig, training: TrainingConfig, run: HasPath, *, batch: int, accumulation: int
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
        "save_strategy": "no",  # the run's log says when, and what is kept
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,  # the bar is the one that the JAX engine has
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


def run_trainer(trainer: Trainer, log: RunLog, run: Run, *, seconds_ahead: float = 0.0) -> TrainSummary:
    """Train from the run's last whole checkpoint on, write ``run.path/adapter`` and sum up.

    Args:
        trainer: Ready to train, its model a ``PeftModel``.
        log: The callback of this run.
        run: The run folder; a run that had not reached its first checkpoint begins anew.
        seconds_ahead: What was spent on all the data before the first step; every epoch bears its share in the rate.

    Raises:
        UserError: the checkpoints that there are are damaged, or a loss or gradient is not finite.
        Stopped: a signal asked for it; what was done is saved.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(log)
    last = _last_checkpoint(trainer, run.path / "checkpoints")
    reached = TrainerState.load_from_json(str(last / "trainer_state.json")) if last else None
    if last and reached and reached.global_step >= log.end(reached):
        # The Trainer would take one more step before it asks whether to stop.
        log.go_on(reached)
        trainer._load_from_checkpoint(str(last))
        steps = reached.global_step
    else:
        with log.watching(trainer), progress_bar("training", "steps") as log.progress, stop_requests() as log.request:
            # The optimizer's state is this run's own file; transformers reads it with torch's restricted loader (weights_only).
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        steps, end = trainer.state.global_step, log.end(trainer.state)
        if steps < end:
            raise Stopped(f"stopped after step {steps:,} of {end:,}, which is saved")
    if trainer.is_world_process_zero():
        save_adapter(trainer.model, run.path / "adapter")
    trainer.accelerator.wait_for_everyone()
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    return TrainSummary(
        steps=steps,
        loss=losses[-1] if losses else float("nan"),
        seconds=seconds_ahead + log.seconds,
        rate=log.per_epoch / (log.seconds_per_epoch() + seconds_ahead / trainer.args.num_train_epochs),
        adapter=str(run.path / "adapter"),
    )


def _last_checkpoint(trainer: Trainer, folder: Path) -> Path | None:
    """The newest whole one; those after it are removed."""
    steps = sorted(checkpoint_steps(folder), reverse=True)
    found = newest_whole(folder / f"{PREFIX_CHECKPOINT_DIR}-{step}" for step in steps)
    trainer.accelerator.wait_for_everyone()  # all have looked before the first is taken away
    if is_primary_process():
        for useless in found.useless:
            shutil.rmtree(useless)
    trainer.accelerator.wait_for_everyone()
    return found.newest


def save_adapter(model: peft.PeftModel, path: Path) -> None:
    """Write the trained adapter as a PEFT directory (safetensors), all of it or nothing."""
    with atomic_path(path) as scratch:
        # Left to itself PEFT asks the Hub whether the base model's embedding was resized.
        model.save_pretrained(str(scratch), selected_adapters=["default"], save_embedding_layers=False)
