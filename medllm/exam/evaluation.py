"""An exam sat by a model: problems → prompts → generated text → predictions; and the zero-shot choice by likelihood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from medllm.config import OptionPrompt
from medllm.engine import Continuation, Generates, Generation, Scores
from medllm.errors import UserError
from medllm.exam.answering import answered
from medllm.exam.answers import Reading, extract_answer
from medllm.exam.endings import Ending, ending
from medllm.exam.option_prompts import option_prompt
from medllm.exam.predictions import Prediction, write_predictions
from medllm.exam.problem import LETTERS, Problem, check_ids
from medllm.exam.prompts import evaluation_prompt, stop_strings
from medllm.journal import Journal
from medllm.model.tokenizer import Prompt, encode_continuation
from medllm.stage_config import CheckServingConfig, EvaluateConfig

__all__ = ["OptionResult", "OptionScores", "Prediction", "evaluate", "score_options", "write_predictions"]

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
    progress: Callable[[int, int], None] | None = None,
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
    progress: Callable[[int, int], None] | None = None,
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


@dataclass(frozen=True)
class OptionResult:
    """The likelihood of each option of one problem.

    Attributes:
        problem_id: The problem.
        accepted: Letters that are right.
        nll: Summed negative log-likelihood (nats) of each option's text, or letter.
        tokens: Number of tokens of each.
        category: The problem's subject, where known.
    """

    problem_id: str
    accepted: tuple[str, ...]
    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    category: str | None = None

    @property
    def correct(self) -> bool:
        """Whether the likeliest option is right."""
        return self.chosen in self.accepted

    @property
    def chosen(self) -> str:
        """The letter of the least summed negative log-likelihood; the first of equals."""
        return LETTERS[min(range(len(self.nll)), key=self.nll.__getitem__)]

    @property
    def chosen_per_token(self) -> str:
        """The letter of the least negative log-likelihood per token; the first of equals."""
        return LETTERS[min(range(len(self.nll)), key=lambda option: self.nll[option] / self.tokens[option])]


@dataclass(frozen=True)
class OptionScores:
    """Zero-shot accuracy by likelihood.

    Attributes:
        accuracy: Share of problems whose likeliest option is right.
        normalized_accuracy: The same with likelihoods per token.
        results: Problem by problem.
        left_out: Problems that cannot be scored this way, counted by reason.
    """

    accuracy: float
    normalized_accuracy: float
    results: tuple[OptionResult, ...]
    left_out: Mapping[str, int]


def score_options(
    engine: Scores,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    prompt: OptionPrompt = EvaluateConfig.option_prompt,
    method: Literal["options", "letters"] = "options",
    batch_size: int = EvaluateConfig.batch_size,
) -> OptionScores:
    """Choose by the likelihood of each option's text after a zero-shot prompt, as JMedBench (arXiv 2409.13317) does.

    Nothing is generated. Prompt and option are tokenized together (:func:`medllm.model.tokenizer.encode_continuation`).

    Args:
        engine: The model.
        tokenizer: The model's tokenizer.
        problems: Problems with one right option; numeric ones and those with several are left out and counted.
        prompt: One of :data:`medllm.exam.option_prompts.OPTION_PROMPTS`.
        method: What is compared: the ``options``' own texts, or their ``letters``, in upper case as the prompt lists them.
        batch_size: Options at a time.

    Raises:
        UserError: an unknown prompt, or no problem that can be scored this way.
    """
    left_out: Counter[str] = Counter()
    scored: list[Problem] = []
    for problem in problems:
        if problem.is_numeric:
            left_out["numeric problem"] += 1
        elif problem.answer_count > 1:
            left_out["several right options"] += 1
        else:
            scored.append(problem)
    if not scored:
        raise UserError("no problem has exactly one right option; likelihood scoring needs such problems")
    options = [option for problem in scored for option in _options(tokenizer, problem, prompt, method)]
    logprobs = iter(engine.logprobs(options, batch_size))
    lengths = iter(options)
    results = tuple(
        OptionResult(
            problem.problem_id,
            tuple(letter for (letter,) in problem.accepted),
            tuple(-float(next(logprobs).sum()) for _ in problem.choices),
            tuple(len(next(lengths).completion) for _ in problem.choices),
            problem.category,
        )
        for problem in scored
    )
    return OptionScores(
        accuracy=sum(result.correct for result in results) / len(results),
        normalized_accuracy=sum(result.chosen_per_token in result.accepted for result in results) / len(results),
        results=results,
        left_out=dict(left_out),
    )


def _options(
    tokenizer: Any, problem: Problem, prompt: OptionPrompt, method: Literal["options", "letters"]
) -> list[Continuation]:
    if not all(choice.strip() for choice in problem.choices):
        raise UserError(f"{problem.source}: problem {problem.problem_id} has an empty option, which has no likelihood")
    answers = problem.choices if method == "options" else tuple(LETTERS[: len(problem.choices)].upper())
    asked = option_prompt(problem, prompt, lettered=method == "letters")
    pieces = (encode_continuation(tokenizer, asked, answer, answers) for answer in answers)
    return [Continuation(tuple(before), tuple(completion)) for before, completion in pieces]
