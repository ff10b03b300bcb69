"""An exam: problems to predictions and the official score."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medllm.config import ModelConfig, Sampling
from medllm.engine import Generates, Scores, account, place
from medllm.engines import EngineName, open_engine, open_scorer
from medllm.exam.answers import Readings
from medllm.exam.endings import EndingCounts
from medllm.exam.evaluation import check_exam, prompt_of, sit, write_predictions
from medllm.exam.option_journal import OPTION_JOURNAL, OptionJournal
from medllm.exam.option_scores import OptionMethod, OptionScores, compared, scorable, score_options
from medllm.exam.problem import Problem
from medllm.exam.scoring import NO_GROUP, ScoreSheet, score
from medllm.exam.setting import setting_name
from medllm.host.processes import is_primary_process, preface
from medllm.host.progress import Progress
from medllm.journal import JOURNAL, Journal
from medllm.remote import spending
from medllm.report.statistics import Estimate, wilson
from medllm.run import Run
from medllm.shortage import advising
from medllm.stage_config import EvaluateConfig
from medllm.stages.problems import control_tokens_in, of_subjects, read_problems, read_shots

PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class ExamResult:
    """An exam that was sat.

    Attributes:
        engine: Which engine did the work.
        model: The model's label in tables.
        setting: The exam's.
        seconds: Of the stage, opening the model not counted.
        left_out: Rows of the problem files that could not be used, by reason.
        control_tokens: Special tokens that are written out in problems and shots.
        score: The official score.
        endings: How the texts ended.
        readings: How many answers were read by each rule, and how many texts gave none, by reason.
        problem_set: What the problems are called in a table of sets; None where they are an exam of its own.
        server: What a server was asked for in all; None where none was.
    """

    engine: str
    model: str
    setting: str
    seconds: float
    left_out: Mapping[str, int]
    control_tokens: Mapping[str, int]
    score: ScoreSheet
    endings: EndingCounts
    readings: Readings
    problem_set: str | None = None
    server: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        return {"stage": "evaluate", **asdict(self), "score": self.score.to_json()}


@dataclass(frozen=True)
class OptionsResult:
    """An exam whose options were chosen by their likelihood: an :class:`ExamResult`, but for ``scores``."""

    engine: str
    model: str
    setting: str
    seconds: float
    control_tokens: Mapping[str, int]
    scores: OptionScores
    problem_set: str
    server: Mapping[str, Any] | None = None

    @property
    def share(self) -> Estimate:
        """The share of problems answered right, with Wilson's interval."""
        return wilson(sum(one.correct for one in self.scores.results), len(self.scores.results))

    def to_json(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        plain, scores = asdict(self), self.scores
        del plain["scores"]
        by_category: dict[str, dict[str, int]] = {}
        for one in scores.results:
            tally = by_category.setdefault(one.category or NO_GROUP, {"correct": 0, "questions": 0})
            tally["correct"] += one.correct
            tally["questions"] += 1
        return plain | {
            "stage": "options",
            "left_out": dict(scores.left_out),
            "questions": len(scores.results),
            "accuracy": scores.accuracy,
            "interval": [self.share.low, self.share.high],
            "normalized_accuracy": scores.normalized_accuracy,
            "by_category": dict(sorted(by_category.items())),
            "results": [
                asdict(one) | {"prediction": one.chosen, "correct": one.correct, "points": 1} for one in scores.results
            ],
        }


def read_exam(config: EvaluateConfig) -> tuple[tuple[Problem, ...], dict[str, int]]:
    """The problems that are sat, and how many rows were left out, by reason.

    Raises:
        UserError: as for :func:`medllm.stages.problems.read_problems`, or a subject that no problem has.
    """
    problems, left_out = read_problems(config.problems, config)
    return of_subjects(problems, config.subjects)[: config.limit or None], left_out


def run_evaluate(
    config: EvaluateConfig, engine: EngineName = "jax", progress: Progress | None = None
) -> ExamResult | OptionsResult | spending.Estimate:
    """Sit an exam: prompts → generations → predictions → the official score.

    Raises:
        UserError: the model, problems or shots cannot be used, or a prompt does not fit the context.
    """
    problems, skipped = read_exam(config)
    if config.method != "generate":
        scored, method = scorable(problems)[0], config.method
        if config.dry_run:
            asked = (compared(problem, config.option_prompt, method) for problem in scored)
            texts = (f"{before}{answer}" for before, answers in asked for answer in answers)
            return spending.estimate("evaluate", engine, texts, Sampling(max_new_tokens=1), config.server)
        return _choose_options(open_scorer(engine, config.model, config), problems, config, method, skipped, progress)
    shots = read_shots(config.shots, config.shot_count, config)
    check_exam(problems, shots, config)
    if config.dry_run:
        prompts = (prompt_of(problem, shots, config) for problem in problems)
        return spending.estimate("evaluate", engine, prompts, config.sampling, config.server)
    return _sit(open_engine(engine, config.model, config), problems, shots, config, progress, skipped)


def sit_exam(
    model: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: EvaluateConfig,
    progress: Progress | None = None,
    left_out: Mapping[str, int] | None = None,
) -> ExamResult:
    """:func:`run_evaluate` with a model that is already open, and problems that are read, but for those ``left_out``."""
    check_exam(problems, shots, config)
    return _sit(model, problems, shots, config, progress, left_out or {})


def _sit(
    model: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: EvaluateConfig,
    progress: Progress | None,
    left_out: Mapping[str, int],
) -> ExamResult:
    began = time.monotonic()
    with advising(config, model.name), Run(config.run, config, engine=model.name, resume="auto") as run:
        most = config.sampling.max_new_tokens
        preface(
            f"{place(model)}: {len(problems):,} problems, answers of up to {most:,} tokens, {config.batch_size} at a time, "
            f"into {run.path}"
        )
        journal = Journal(run.path / JOURNAL)
        sat = sit(model, problems, shots, config, progress, journal)
        predictions = [prediction for prediction, _, _ in sat]
        if is_primary_process():
            write_predictions(run.path / PREDICTIONS, predictions)
        result = ExamResult(
            engine=model.name,
            model=config.label or model_label(config.model),
            setting=setting_name(config.shot_count, explanation=config.explanation),
            seconds=time.monotonic() - began,
            left_out=left_out,
            control_tokens=control_tokens_in(model, (*problems, *shots)),
            score=score(problems, predictions, lenient=config.lenient),
            endings=EndingCounts.count(ended for _, ended, _ in sat),
            readings=Readings.count(reading for _, _, reading in sat),
            problem_set=config.problem_set,
            server=account(model, journal.facts),
        )
        run.finish(result.to_json())
    return result


def _choose_options(
    model: Scores,
    problems: Sequence[Problem],
    config: EvaluateConfig,
    method: OptionMethod,
    left_out: Mapping[str, int],
    progress: Progress | None,
) -> OptionsResult:
    began = time.monotonic()
    with advising(config, model.name), Run(config.run, config, engine=model.name, resume="auto") as run:
        preface(f"{place(model)}: the {method} of {len(problems):,} problems, {config.batch_size} at a time, into {run.path}")
        journal = OptionJournal(run.path / OPTION_JOURNAL)
        scores = score_options(
            model,
            model.tokenizer,
            problems,
            prompt=config.option_prompt,
            method=method,
            batch_size=config.batch_size,
            journal=journal,
            progress=progress,
        )
        result = OptionsResult(
            engine=model.name,
            model=config.label or model_label(config.model),
            setting=f"zero-shot {method}",
            seconds=time.monotonic() - began,
            control_tokens=control_tokens_in(model, problems),
            scores=replace(scores, left_out={**left_out, **scores.left_out}),
            problem_set=config.problem_set or ", ".join(Path(path).stem for path in config.problems),
            server=account(model, journal.facts),
        )
        run.finish(result.to_json())
    return result


def model_label(model: ModelConfig) -> str:
    """How a model is called in tables: its folder, and its adapters'."""
    return " + ".join((model.path, *model.adapters))
