"""Problems → prompts → a model's answers, each in a journal before the next is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from medllm.config import Sampling
from medllm.engine import AnswersSingly, Generates, Generation, Wanted
from medllm.errors import UserError
from medllm.exam.problem import Problem
from medllm.exam.prompts import naming_problems
from medllm.host.processes import is_primary_process
from medllm.host.progress import Progress, part_of
from medllm.journal import Journal, Kept, digest
from medllm.model.tokenizer import Prompt

AskedAs = TypeVar("AskedAs", bound=Prompt)
"""Texts alone, or conversations too."""


def answered(
    engine: Generates,
    problems: Sequence[Problem],
    prompt_of: Callable[[Problem], AskedAs],
    sampling: Sampling,
    *,
    batch_size: int,
    at_a_time: int,
    journal: Journal,
    progress: Progress | None = None,
) -> Iterator[tuple[Problem, AskedAs, list[Generation]]]:
    """Every problem with its prompt and its answers, in order; those in ``journal`` are not asked for again.

    Of a server's answers the missing ones are asked for. An engine here may round otherwise in another batch, so the problems
    that it gets together are answered together, or not at all: a run that went on has the texts of one that was never stopped.

    Args:
        engine: The model.
        problems: The problems, each under an id of its own.
        prompt_of: How a problem is asked.
        sampling: How the model answers.
        batch_size: Continuations generated at a time.
        at_a_time: Problems that an engine gets together.
        journal: Holds the answers so far, and gets the others.
        progress: Called with (problems done, problems in all).

    Raises:
        UserError: the engine refuses a prompt, or is gone; with the number of problems that are kept.
    """
    samples = sampling.samples
    done = sum(journal.count(problem.problem_id) >= samples for problem in problems)
    if done and is_primary_process():
        print(f"medllm: going on at {done} of {len(problems)} problems", file=sys.stderr)
    with _saying_what_is_kept(problems, journal, samples):
        if isinstance(engine, AnswersSingly):
            _complete(engine, problems, prompt_of, sampling, journal, progress)
        for start in range(0, len(problems), at_a_time):
            some = problems[start : start + at_a_time]
            prompts = [prompt_of(problem) for problem in some]
            if any(len(journal.answers(one.problem_id, prompt)) < samples for one, prompt in zip(some, prompts, strict=True)):
                with naming_problems(some):
                    within = part_of(progress, start, len(some), len(problems))
                    generated = engine.generate(prompts, sampling, batch_size, within)
                journal.add(
                    Kept(problem.problem_id, sample, asked, generation)
                    for problem, asked, generations in zip(some, map(digest, prompts), generated, strict=True)
                    for sample, generation in enumerate(generations)
                )
            for problem, prompt in zip(some, prompts, strict=True):
                answers = journal.take(problem.problem_id, prompt)
                yield problem, prompt, [answers[sample] for sample in sorted(answers)]


def _complete(
    engine: AnswersSingly,
    problems: Sequence[Problem],
    prompt_of: Callable[[Problem], Prompt],
    sampling: Sampling,
    journal: Journal,
    progress: Progress | None,
) -> None:
    """Ask for the answers that are missing; each goes into the journal as it comes."""
    digests: dict[int, str] = {}

    def missing() -> Iterator[Wanted]:
        for number, problem in enumerate(problems):
            prompt = prompt_of(problem)
            there = journal.answers(problem.problem_id, prompt)
            if samples := [sample for sample in range(sampling.samples) if sample not in there]:
                digests[number] = digest(prompt)
                yield Wanted(number, prompt, tuple(samples))

    done = sum(journal.count(problem.problem_id) >= sampling.samples for problem in problems)
    with naming_problems(problems):
        for some in engine.answers(missing(), sampling):
            journal.add(
                Kept(problems[one.number].problem_id, one.sample, digests[one.number], one.said, one.facts) for one in some
            )
            touched = {problems[one.number].problem_id for one in some}
            done += sum(journal.count(problem_id) >= sampling.samples for problem_id in touched)
            if progress:
                progress(done, len(problems))


@contextmanager
def _saying_what_is_kept(problems: Sequence[Problem], journal: Journal, samples: int) -> Iterator[None]:
    """Inside, an error also says how much was not lost."""
    try:
        yield
    except UserError as error:
        kept = sum(journal.count(problem.problem_id) >= samples for problem in problems)
        if not kept or journal.path is None:
            raise
        raise UserError(
            f"{error}; {kept} of {len(problems)} problems are kept, the same command goes on with the others"
        ) from error
