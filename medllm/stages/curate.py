"""Preference data: a model's own answers to problems, graded and ranked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medllm.corpus.leaks.guard import problem_texts, refuse_leaks
from medllm.engine import Generates, account, place
from medllm.engines import EngineName, open_engine
from medllm.exam.problem import Problem
from medllm.host.processes import is_primary_process, preface
from medllm.host.progress import Progress
from medllm.journal import JOURNAL, Journal
from medllm.preferences.curation import CurationReport, asked_problems, check_problems, curate
from medllm.preferences.records import write_preferences
from medllm.remote.spending import Estimate, estimate
from medllm.run import Run
from medllm.shortage import advising
from medllm.stage_config import CurateConfig
from medllm.stages.problems import control_tokens_in, read_problems, read_shots

PREFERENCES = "preferences.jsonl"


@dataclass(frozen=True)
class CurateResult:
    """How preference data came about.

    Attributes:
        engine: Which engine did the work.
        seconds: Of the stage, opening the model not counted.
        report: What became of the problems and of the samples.
        left_out: Rows of the problem files that could not be used, by reason.
        control_tokens: Special tokens that are written out in problems and shots.
        server: What a server was asked for in all; None where none was.
    """

    engine: str
    seconds: float
    report: CurationReport
    left_out: Mapping[str, int]
    control_tokens: Mapping[str, int]
    server: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        head = {"stage": "curate", "engine": self.engine, "seconds": self.seconds}
        tail = {"left_out": dict(self.left_out), "control_tokens": dict(self.control_tokens), "server": self.server}
        return {**head, **asdict(self.report), **tail}


def run_curate(config: CurateConfig, engine: EngineName = "jax", progress: Progress | None = None) -> CurateResult | Estimate:
    """Preference data: the model's own sampled answers, graded and ranked into ``preferences.jsonl``.

    Raises:
        UserError: a problem is from a held-out year or is one that is held out, or the model, problems or shots cannot be used.
    """
    problems, shots, skipped = read_curation(config)
    if config.dry_run:
        wanted, prompt_of = asked_problems(problems, shots, config)
        return estimate("curate", engine, map(prompt_of, wanted), config.sampling, config.server)
    return _curate(open_engine(engine, config.model, config), problems, shots, config, progress, skipped)


def build_preferences(
    model: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: CurateConfig,
    progress: Progress | None = None,
    left_out: Mapping[str, int] | None = None,
) -> CurateResult:
    """:func:`run_curate` on a model that is already open, and problems that are read, but for those ``left_out``."""
    check_curation(problems, shots, config)
    return _curate(model, problems, shots, config, progress, left_out or {})


def read_curation(config: CurateConfig) -> tuple[tuple[Problem, ...], tuple[Problem, ...], dict[str, int]]:
    """Problems and examples, fit to be curated, and how many rows were left out, by reason.

    Raises:
        UserError: as for :func:`check_curation`, or a file cannot be read.
    """
    problems, left_out = read_problems(config.problems, config)
    shots = read_shots(config.shots, config.shot_count, config) if config.shots else ()
    check_curation(problems, shots, config)
    return problems, shots, left_out


def check_curation(problems: Sequence[Problem], shots: Sequence[Problem], config: CurateConfig) -> None:
    """Refuse what cannot be curated, before a model is asked.

    Raises:
        UserError: a problem is from a held-out year or is its own example, or a held-out problem is among them.
    """
    check_problems(problems, shots, config)
    files = (*config.problems, *([config.shots] if config.shots else ()))
    refuse_leaks(problem_texts((*problems, *shots)), files, config.held_out)


def _curate(
    model: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: CurateConfig,
    progress: Progress | None,
    left_out: Mapping[str, int],
) -> CurateResult:
    began = time.monotonic()
    with advising(config, model.name), Run(config.run, config, engine=model.name, resume="auto") as run:
        sampling = config.sampling
        answers = f"{sampling.samples} samples of up to {sampling.max_new_tokens:,} tokens"
        preface(f"{place(model)}: {len(problems):,} problems x {answers}, {config.batch_size} at a time, into {run.path}")
        journal = Journal(run.path / JOURNAL)
        curation = curate(model, problems, shots, config, progress, journal)
        result = CurateResult(
            engine=model.name,
            seconds=time.monotonic() - began,
            report=curation.report,
            left_out=left_out,
            control_tokens=control_tokens_in(model, (*problems, *shots)),
            server=account(model, journal.facts),
        )
        if is_primary_process():
            write_preferences(run.path / PREFERENCES, curation.preferences)
        run.finish(result.to_json())
    return result
