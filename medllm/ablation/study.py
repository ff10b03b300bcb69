"""The folder of a study while it is carried out: one process begins it, others may join in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from medllm.ablation.design import Design
from medllm.ablation.jobs import Plan, plan
from medllm.ablation.work import carry_out, clear_claims
from medllm.engines import TrainerName
from medllm.errors import UserError
from medllm.host.processes import process_count, unannounced
from medllm.host.progress import Say
from medllm.run import RESULT, Run, check_begun
from medllm.text_files import read_json_object

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def await_file(file: Path, seconds: float = 20.0) -> None:
    """Give whoever began a study the time to write a file, where it is not there yet."""
    until = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.1)


@contextmanager
def study_folder(
    out: Path, config: DataclassInstance, engine: TrainerName, *, seeds: int = 1, join: bool = False
) -> Iterator[None]:
    """Begin a study with these settings in a folder, go on with it there, or join those that are at it.

    Args:
        out: A folder that is not there yet, is empty, or holds a study with these settings: one that is not finished, or one
            with fewer seeds.
        config: The settings; their ``seeds`` may be more than they were.
        engine: Which engine trains and answers.
        seeds: Trainings of each row.
        join: Work along with a study that has begun, and leave the folder to whoever began it.

    Raises:
        UserError: the folder is in use, its study is finished or was begun with other settings, or there is none to join.
    """
    if join:
        if process_count() > 1:
            raise UserError(
                "several processes of one launch cannot join a study; start them each by itself, or leave --join out"
            )
        if out.is_dir():
            await_file(out / "config.yaml")
        check_begun(out, config, engine)
        with unannounced():
            yield
        clear_claims(out)
        return
    finished = (out / RESULT).exists()
    if finished and seeds <= read_json_object(out / RESULT, "a study writes it").get("seeds", 1):
        raise UserError(f"{out}: holds a finished study; give another folder (--out), or remove it")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "config.yaml").exists())):
        raise UserError(f"{out}: is in use; give another folder for the study (--out), or remove it")
    with unannounced(), Run(out, config, engine=engine, resume=True if finished else "auto"):
        yield
        clear_claims(out)


def run_design(design: Design, engine: TrainerName, out: Path, say: Say, *, join: bool = False) -> Plan:
    """Carry out a design in folders below ``out``; of one that was begun there, what is left.

    Raises:
        UserError: as for :func:`study_folder`, a setting does not fit, or a stage's input cannot be used.
    """
    whole = plan(design, out)
    with study_folder(out, design, engine, seeds=design.seeds, join=join):
        carry_out(whole, engine, out, say)
    return whole
