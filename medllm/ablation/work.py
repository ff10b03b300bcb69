"""The jobs of a study done: those that are left, one after the other, by as many processes as join in."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from medllm.ablation.jobs import Job, Plan, Sitting, Training, finished
from medllm.config import MeshConfig, PreferenceLoss
from medllm.engine import Generates
from medllm.engines import TrainerName, open_engine, open_trainer
from medllm.errors import UserError
from medllm.host.lock import FolderLock, Held
from medllm.host.processes import is_primary_process, process_count
from medllm.host.progress import Say
from medllm.model.adapter import merge_adapter
from medllm.run import MERGED
from medllm.stage_config import CptConfig, CurateConfig, EvaluateConfig, RpoConfig
from medllm.stages.cpt import run_cpt
from medllm.stages.curate import build_preferences, read_curation
from medllm.stages.evaluate import read_exam, sit_exam
from medllm.stages.problems import read_shots
from medllm.stages.rpo import run_rpo
from medllm.trackers import require_tracker

_CLAIMS = ".jobs"
_LOOK_AGAIN = 0.5  # seconds until a process that has nothing to do looks whether there is something now


def carry_out(plan: Plan, engine: TrainerName, out: Path, say: Say) -> None:
    """Do what is left of the jobs, but for those that another process of this study is at; return when none is left.

    A job that another process leaves unfinished, because it was ended, is done here.

    Raises:
        UserError: a stage's input cannot be used.
    """
    left = [job for job in plan.jobs if not job.done()]
    check_first(left, engine, out)
    trainings = sum(isinstance(job, Training) for job in plan.jobs)
    there = f"; {len(plan.jobs) - len(left)} of these {len(plan.jobs)} are done" if len(left) < len(plan.jobs) else ""
    say(f"{trainings} trainings, {len(plan.jobs) - trainings} models to ask{there}")
    while left:
        # The processes of one launch must be at the same job; any others take what nobody is at.
        open_to_me = left if process_count() == 1 else left[:1]
        job = next((job for job in open_to_me if plan.ready(job) and _done_here(job, engine, out, say)), None)
        if job is None:
            time.sleep(_LOOK_AGAIN)
        else:
            left.remove(job)


def check_first(jobs: Sequence[Job], engine: TrainerName, out: Path) -> None:
    """Refuse what a later job would refuse, before the first begins.

    Raises:
        UserError: a file that is to be read is not there, or the engine or this machine has not what a training asks for.
    """
    losses: set[PreferenceLoss] = set()
    base = next((job.model for job in jobs if isinstance(job, Sitting) and Path(job.model.path).is_dir()), None)
    for job in jobs:
        for file in map(Path, _read_by(job)):
            if not file.exists() and not file.absolute().is_relative_to(out.absolute()):
                raise UserError(f"{file}: no such file or folder; row '{job.row}' is to read it")
        if isinstance(job, Training):
            require_tracker(job.config.tracker)
            if base is not None and isinstance(job.config, RpoConfig) and job.config.loss not in losses:
                losses.add(job.config.loss)
                open_trainer(engine, base, replace(job.config, model=base))


def _read_by(job: Job) -> tuple[str, ...]:
    """The files and folders that a job reads, those of other jobs aside."""
    if isinstance(job, Sitting):
        asked: tuple[CurateConfig | EvaluateConfig, ...] = (*job.exams, *job.curations)
        return tuple(file for one in asked for file in (*one.problems, *([one.shots] if one.shots else ())))
    if isinstance(job.config, CptConfig):
        return (*job.config.corpus.documents, *job.config.corpus.problems)
    return ()


def clear_claims(out: Path) -> None:
    """Remove what processes told each other by; nothing is left to do."""
    if is_primary_process():
        shutil.rmtree(out / _CLAIMS, ignore_errors=True)


def _done_here(job: Job, engine: TrainerName, out: Path, say: Say) -> bool:
    """See a job done, unless another process is at it."""
    if process_count() == 1 and job.done():  # by another process, since
        return True
    with _claim(out / _CLAIMS / job.folder.name) as mine:
        if not mine:
            return False
        if isinstance(job, Training):
            _train(job, engine, say)
        else:
            _ask(job, engine, say)
        return True


@contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Whether what is done in the block is this process's to do."""
    if process_count() > 1:  # of one launch, which all do the same; no other joins them
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(folder)
    except Held:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _train(job: Training, engine: TrainerName, say: Say) -> None:
    config = job.config
    if not finished(job.folder):
        if isinstance(config, CptConfig):
            say(f"{job.row}: continued pretraining, into {job.folder.name}")
            summary = run_cpt(config, engine).summary
        else:
            say(f"{job.row}: preference training ({config.loss.name}, alpha {config.loss.alpha:g}), into {job.folder.name}")
            summary = run_rpo(config, engine).summary
        say(f"{job.row}: {summary.steps} steps in {summary.seconds:.0f} s, loss {summary.loss:.3f}")
    if job.merges and is_primary_process() and not (job.folder / MERGED).exists():  # it is there whole, or not at all
        merge_adapter(job.trained.path, job.trained.adapters, job.folder / MERGED)


def _ask(job: Sitting, engine: TrainerName, say: Say) -> None:
    """The exams and the samples of a model, which is opened once for those that share a mesh."""
    opened: dict[tuple[str, str], Generates] = {}

    def model(config: MeshConfig) -> Generates:
        mesh = (config.mesh, config.rules)
        if mesh not in opened:
            opened.clear()
            opened[mesh] = open_engine(engine, job.model, config)
        return opened[mesh]

    for exam in job.exams:
        if not finished(Path(exam.run)):
            problems, left_out = read_exam(exam)
            result = sit_exam(model(exam), problems, read_shots(exam.shots, exam.shot_count, exam), exam, left_out=left_out)
            say(f"{job.row}, {result.setting}: {result.score.words()}")
    for curation in job.curations:
        if not finished(Path(curation.run)):
            problems, shots, left_out = read_curation(curation)
            samples = f"{len(problems):,} problems, {curation.sampling.samples} samples each"
            say(f"{job.row}: {samples}, into {Path(curation.run).name}")
            build_preferences(model(curation), problems, shots, curation, left_out=left_out)
