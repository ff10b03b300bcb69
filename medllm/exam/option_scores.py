"""The zero-shot choice by likelihood: problems → prompts and options → their log-probabilities → the likeliest option."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from medllm.config import OptionPrompt
from medllm.engine import Continuation, Scores, ScoresSingly
from medllm.errors import UserError
from medllm.exam.option_journal import KeptOption, OptionJournal
from medllm.exam.option_prompts import option_prompt
from medllm.exam.problem import LETTERS, Problem, check_ids
from medllm.exam.prompts import naming_problems
from medllm.host.processes import is_primary_process
from medllm.host.progress import Progress
from medllm.journal import digest
from medllm.model.tokenizer import encode_continuation
from medllm.stage_config import EvaluateConfig

OptionMethod = Literal["options", "letters"]
"""What is compared: the options' own texts, or their letters, in upper case as the prompt lists them."""


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


@dataclass(frozen=True)
class _Asked:
    """An option as a model is asked for it; ``problem`` and ``option`` are numbers."""

    problem: int
    option: int
    digest: str
    continuation: Continuation


def score_options(
    engine: Scores,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    prompt: OptionPrompt = EvaluateConfig.option_prompt,
    method: OptionMethod = "options",
    batch_size: int = EvaluateConfig.batch_size,
    journal: OptionJournal | None = None,
    progress: Progress | None = None,
) -> OptionScores:
    """Choose by the likelihood of each option's text after a zero-shot prompt, as JMedBench (arXiv 2409.13317) does.

    Nothing is generated. Prompt and option are tokenized together (:func:`medllm.model.tokenizer.encode_continuation`).

    Args:
        engine: The model.
        tokenizer: The model's tokenizer.
        problems: Problems with one right option; numeric ones and those with several are left out and counted.
        prompt: One of :data:`medllm.exam.option_prompts.OPTION_PROMPTS`.
        method: What is compared.
        batch_size: Options at a time, and problems that are kept together by an engine here.
        journal: Holds the options so far, which are not scored again, and gets the others.
        progress: Called with (options done, options in all).

    Raises:
        UserError: an unknown prompt, no problem that can be scored this way, or a server that is gone.
    """
    scored, left_out = scorable(problems)
    journal = OptionJournal() if journal is None else journal
    asked = [one for number, problem in enumerate(scored) for one in _asked(tokenizer, number, problem, prompt, method)]
    _complete(engine, scored, asked, batch_size, journal, progress)
    of_problem: list[list[KeptOption]] = [[] for _ in scored]
    for one in asked:
        kept = journal.get(scored[one.problem].problem_id, one.option, one.digest)
        assert kept is not None, "every option is kept by now"
        of_problem[one.problem].append(kept)
    results = tuple(
        OptionResult(
            problem.problem_id,
            tuple(letter for (letter,) in problem.accepted),
            tuple(one.nll for one in options),
            tuple(one.tokens for one in options),
            problem.category,
        )
        for problem, options in zip(scored, of_problem, strict=True)
    )
    return OptionScores(
        accuracy=sum(result.correct for result in results) / len(results),
        normalized_accuracy=sum(result.chosen_per_token in result.accepted for result in results) / len(results),
        results=results,
        left_out=left_out,
    )


def scorable(problems: Sequence[Problem]) -> tuple[list[Problem], dict[str, int]]:
    """Those with exactly one right option, and how many others there are, by reason.

    Raises:
        UserError: there is none, an id comes twice, or an option is empty.
    """
    check_ids(problems)
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
    for problem in scored:
        if not all(choice.strip() for choice in problem.choices):
            raise UserError(f"{problem.source}: problem {problem.problem_id} has an empty option, which has no likelihood")
    return scored, dict(left_out)


def compared(problem: Problem, prompt: OptionPrompt, method: OptionMethod) -> tuple[str, tuple[str, ...]]:
    """The text before the options of a problem, and the texts whose likelihoods are compared.

    Raises:
        UserError: an unknown prompt.
    """
    answers = problem.choices if method == "options" else tuple(LETTERS[: len(problem.choices)].upper())
    return option_prompt(problem, prompt, lettered=method == "letters"), answers


def _asked(tokenizer: Any, number: int, problem: Problem, prompt: OptionPrompt, method: OptionMethod) -> Iterator[_Asked]:
    before, answers = compared(problem, prompt, method)
    for option, answer in enumerate(answers):
        tokens, completion = encode_continuation(tokenizer, before, answer, answers)
        yield _Asked(number, option, digest(f"{before}\0{answer}"), Continuation(tuple(tokens), tuple(completion)))


def _complete(
    engine: Scores,
    problems: Sequence[Problem],
    asked: Sequence[_Asked],
    batch_size: int,
    journal: OptionJournal,
    progress: Progress | None,
) -> None:
    """Have the options scored that are missing; they are kept as they come.

    Of a server the missing ones are asked. An engine here may round otherwise in another batch, so the problems that it gets
    together are scored together, or not at all: a run that went on has the numbers of one that was never stopped.
    """

    def is_missing(one: _Asked) -> bool:
        return journal.get(problems[one.problem].problem_id, one.option, one.digest) is None

    def keep(some: Sequence[_Asked], logprobs: Sequence[np.ndarray], facts: Sequence[Mapping[str, Any]] = ()) -> None:
        said = facts or [{}] * len(some)
        journal.add(
            KeptOption(problems[one.problem].problem_id, one.option, one.digest, -float(of_it.sum()), of_it.size, told)
            for one, of_it, told in zip(some, logprobs, said, strict=True)
        )
        if progress:
            progress(len(journal), len(asked))

    if len(journal) and is_primary_process():
        print(f"medllm: going on at {len(journal)} of {len(asked)} options", file=sys.stderr)
    if isinstance(engine, ScoresSingly):
        missing = [one for one in asked if is_missing(one)]
        with naming_problems([problems[one.problem] for one in missing]):
            for came in engine.scored([one.continuation for one in missing]):
                keep([missing[one.number] for one in came], [one.logprobs for one in came], [one.facts for one in came])
        return
    for _, group in groupby(asked, lambda one: one.problem // batch_size):
        together = list(group)
        if any(map(is_missing, together)):
            keep(together, engine.logprobs([one.continuation for one in together], batch_size))
