"""``medllm verify``: a run folder → what can be proved of it."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from medllm import __version__
from medllm.config import expect
from medllm.engines import load, require_engine
from medllm.errors import UserError
from medllm.host.progress import Progress
from medllm.verify.answers import ANSWERS, SCORE, check_answers
from medllm.verify.data import DATA, check_data, check_leaks, training_data
from medllm.verify.files import check_adapter_settings, check_files
from medllm.verify.findings import STEPS, Certificate, Finding, refuted_by
from medllm.verify.record import Record, open_record

_PACKAGES = ("numpy", "torch", "transformers", "peft", "bitsandbytes", "jax", "orbax-checkpoint", "safetensors")


@dataclass(frozen=True)
class VerifyConfig:
    """How much of a run is verified.

    Args:
        run: Run folder of ``cpt``, ``curate``, ``rpo`` or ``evaluate``.
        steps: Optimizer steps that are taken anew, drawn at random from those within reach; the last one within reach is
            always among them (0: none, and nothing is then proved of a training).
        reach: Steps that are taken anew from one state that is known, the fresh adapter or a checkpoint, to get to a step.
        seed: Seed of the draw.
        exam: Problem files that must not be in what was trained on.
    """

    run: str
    steps: int = 4
    reach: int = 8
    seed: int = 0
    exam: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expect(self.steps >= 0, "steps", self.steps, "0 or more")
        expect(self.reach >= 1, "reach", self.reach, "at least 1")
        expect(self.seed >= 0, "seed", self.seed, "0 or more")


def verify(config: VerifyConfig, progress: Progress = lambda done, total, doing="": None) -> Certificate:
    """Verify a run; nothing in its folder is changed.

    Raises:
        UserError: it is no run folder, or what it was made from is not there.
    """
    record = open_record(Path(config.run))
    began = time.monotonic()
    findings = check_files(record)
    if record.trains:
        findings += check_adapter_settings(record)
        findings += _check_training(record, config, progress)
        needed: tuple[str, ...] = (STEPS, DATA)
    else:
        findings += check_answers(record)
        needed = (SCORE,) if record.stage == "evaluate" and record.config.method != "generate" else (ANSWERS, SCORE)
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - began, 1),
        "medllm": __version__,
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "asked": {"steps": config.steps, "reach": config.reach, "seed": config.seed},
    }
    return Certificate(record.path.resolve().name, record.stage, record.engine, needed, findings, facts)


def _check_training(record: Record, config: VerifyConfig, progress: Progress) -> list[Finding]:
    try:
        data = training_data(record)
    except UserError as error:
        return [refuted_by(DATA, error)]
    findings = [*check_data(record, data), *check_leaks(data, config.exam)]
    require_engine("jax", "medllm verify of a training")
    require_engine("torch", "medllm verify of a training")
    steps: Any = load("parity", "steps")
    return findings + steps.check_steps(record, data, config.steps, config.reach, config.seed, progress)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
