"""An exam sat by a model: problems → prompts → generated text → predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from medllm.engine import Generates, Generation
from medllm.errors import UserError
from medllm.exam.answering import answered
from medllm.exam.answers import Reading, extract_answer
from medllm.exam.endings import Ending, ending
from medllm.exam.predictions import Prediction, write_predictions
from medllm.exam.problem import Problem, check_ids
from medllm.exam.prompts import evaluation_prompt, stop_strings
from medllm.host.progress import Progress
from medllm.journal import Journal
from medllm.model.tokenizer import Prompt
from medllm.stage_config import CheckServingConfig, EvaluateConfig

__all__ = ["Prediction", "evaluate", "write_predictions"]

# An engine sorts what it is given by length.
_BATCHES_AT_A_TIME = 4


def check_exam(problems: Sequence[Problem], shots: Sequence[Problem], config: EvaluateConfig) -> None:
    """Refuse what cannot be sat before a model is opened for it.

    Raises:
        UserError: a problem id comes twice, a problem that is asked is also an example, or several samples are asked for.
    """
    if config.sampling.samples != 1:
        raise UserError(f"an exam is sat once: set --sampling.samples to 1, not {config.sampling.samples}")
    check_apart(problems, shots)


def check_apart(problems: Sequence[Problem], shots: Sequence[Problem]) -> None:
    """Refuse an exam whose answers are shown.

    Raises:
        UserError: a problem id comes twice, or a problem that is asked is also an example.
    """
    check_ids(problems)
    shown = {(shot.text, shot.choices): shot.problem_id for shot in shots}
    for problem in problems:
        if (problem.text, problem.choices) in shown:
            raise UserError(
                f"problem {problem.problem_id} is asked and is also shown with its answer as example "
                f"{shown[problem.text, problem.choices]}; take the examples from other problems (--shots)"
            )


def evaluate(
    engine: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: EvaluateConfig,
    progress: Progress | None = None,
) -> list[Prediction]:
    """One prediction for each problem, in order; empty where the model gave no answer.

    Args:
        engine: The model.
        problems: The exam, which passed :func:`check_exam`; every problem is asked (``config.limit`` is the caller's to apply).
        shots: Examples shown before each question.
        config: Template, format, sampling. A base model (``completion``) is also stopped where it begins the next question.
        progress: Called with (problems done, problems in all).

    Raises:
        UserError: the engine refuses a prompt.
    """
    return [prediction for prediction, _, _ in sit(engine, problems, shots, config, progress)]


def prompt_of(problem: Problem, shots: Sequence[Problem], config: EvaluateConfig | CheckServingConfig) -> Prompt:
    """The prompt of a problem, as ``config`` has it asked."""
    return evaluation_prompt(
        problem,
        shots,
        template=config.template,
        explanation=config.explanation,
        format=config.format,
        answer_as=config.answer_as,
    )


def sit(
    engine: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: EvaluateConfig,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> list[tuple[Prediction, Ending, Reading]]:
    """:func:`evaluate`, how each text ended, and how its answer was read. What ``journal`` holds is not asked for again."""
    sampling = config.sampling
    if config.format == "completion":
        sampling = replace(sampling, stop=(*sampling.stop, *stop_strings(config.template, config.explanation)))
    asked = answered(
        engine,
        problems,
        partial(prompt_of, shots=shots, config=config),
        sampling,
        batch_size=config.batch_size,
        at_a_time=config.batch_size * _BATCHES_AT_A_TIME,
        journal=journal or Journal(),
        progress=progress,
    )
    sat: list[tuple[Prediction, Ending, Reading]] = []
    for problem, prompt, (generation,) in asked:
        reading = _read(generation, problem, config.explanation)
        ended = ending(
            generation.text,
            prompt=prompt if isinstance(prompt, str) else prompt[-1].content,
            stop=generation.stopped,
            cut_off=generation.finish == "length",
            unread=not reading.answer,
        )
        sat.append((Prediction(problem.problem_id, ",".join(reading.answer), generation.text), ended, reading))
    return sat


def _read(generation: Generation, problem: Problem, explanation: bool) -> Reading:
    if generation.finish == "filtered":  # what a server let through of it is not what the model says
        return Reading(reason="filtered")
    return extract_answer(generation.text, problem, explanation=explanation, cut_off=generation.finish == "length")
