"""An exam: problems to predictions and the official score."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from medllm.config import ModelConfig
from medllm.engine import Generates, Scores, account
from medllm.engines import EngineName, open_engine, open_scorer
from medllm.exam.answers import Readings
from medllm.exam.endings import EndingCounts
from medllm.exam.evaluation import OptionScores, check_exam, prompt_of, score_options, sit, write_predictions
from medllm.exam.problem import Problem, check_ids
from medllm.exam.scoring import ScoreSheet, score
from medllm.exam.setting import setting_name
from medllm.host.processes import is_primary_process
from medllm.host.progress import Progress
from medllm.journal import JOURNAL, Journal
from medllm.remote.spending import Estimate, estimate
from medllm.run import Run
from medllm.stage_config import EvaluateConfig
from medllm.stages.problems import read_problems, read_shots

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
        score: The official score.
        endings: How the texts ended.
        readings: How many answers were read by each rule, and how many texts gave none, by reason.
        server: What a server was asked for in all; None where none was.
    """

    engine: str
    model: str
    setting: str
    seconds: float
    left_out: Mapping[str, int]
    score: ScoreSheet
    endings: EndingCounts
    readings: Readings
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
    scores: OptionScores

    def to_json(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        plain = asdict(self)
        scores = plain.pop("scores")
        left_out, questions = scores.pop("left_out"), len(self.scores.results)
        return {"stage": "options", **plain, "left_out": left_out, "questions": questions, **scores}


def run_evaluate(
    config: EvaluateConfig, engine: EngineName = "jax", progress: Progress | None = None
) -> ExamResult | OptionsResult | Estimate:
    """Sit an exam: prompts → generations → predictions → the official score.

    Raises:
        UserError: the model, problems or shots cannot be used, or a prompt does not fit the context.
    """
    problems, skipped = read_problems(config.problems, config.problems_format)
    problems = problems[: config.limit] if config.limit else problems
    if config.method == "options":
        check_ids(problems)
        return _choose_options(open_scorer(engine, config.model, config), problems, config, skipped)
    shots = read_shots(config.shots, config.shot_count)
    check_exam(problems, shots, config)
    if config.dry_run:
        prompts = (prompt_of(problem, shots, config) for problem in problems)
        return estimate("evaluate", engine, prompts, config.sampling, config.server)
    return _sit(open_engine(engine, config.model, config), problems, shots, config, progress, skipped)


def sit_exam(
    model: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: EvaluateConfig,
    progress: Progress | None = None,
) -> ExamResult:
    """:func:`run_evaluate` with a model that is already open, and problems that are already read."""
    check_exam(problems, shots, config)
    return _sit(model, problems, shots, config, progress, {})


def _sit(
    model: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: EvaluateConfig,
    progress: Progress | None,
    left_out: Mapping[str, int],
) -> ExamResult:
    began = time.monotonic()
    with Run(config.run, config, engine=model.name, resume="auto") as run:
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
            score=score(problems, predictions, lenient=config.lenient),
            endings=EndingCounts.count(ended for _, ended, _ in sat),
            readings=Readings.count(reading for _, _, reading in sat),
            server=account(model, journal.facts),
        )
        run.finish(result.to_json())
    return result


def _choose_options(
    model: Scores, problems: Sequence[Problem], config: EvaluateConfig, left_out: Mapping[str, int]
) -> OptionsResult:
    began = time.monotonic()
    with Run(config.run, config, engine=model.name, resume="auto") as run:
        scores = score_options(model, model.tokenizer, problems, prompt=config.option_prompt, batch_size=config.batch_size)
        result = OptionsResult(
            engine=model.name,
            model=config.label or model_label(config.model),
            setting="zero-shot options",
            seconds=time.monotonic() - began,
            scores=replace(scores, left_out={**left_out, **scores.left_out}),
        )
        run.finish(result.to_json())
    return result


def model_label(model: ModelConfig) -> str:
    """How a model is called in tables: its folder, and its adapters'."""
    return " + ".join((model.path, *model.adapters))
