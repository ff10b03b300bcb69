"""The problem files of a stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from medllm.config import ProblemLayout
from medllm.errors import UserError
from medllm.exam.loaders import problems_at
from medllm.exam.problem import Problem
from medllm.model.tokenizer import control_tokens


def read_problems(paths: Sequence[str], laid_out: ProblemLayout) -> tuple[tuple[Problem, ...], dict[str, int]]:
    """The problems of all files, and how many rows were left out, by reason.

    Raises:
        UserError: no file is named, or one cannot be read.
    """
    if not paths:
        raise UserError("no problems given: name a file or folder (--problems)")
    problems: list[Problem] = []
    skipped: dict[str, int] = {}
    for path in paths:
        loaded = problems_at(path, laid_out)
        problems += loaded.problems
        for reason, count in loaded.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    return tuple(problems), skipped


def read_shots(path: str | None, count: int, laid_out: ProblemLayout) -> tuple[Problem, ...]:
    """The first ``count`` problems of a file: the worked examples before a question.

    Raises:
        UserError: no file is named although examples are asked for, it cannot be read, or it holds fewer.
    """
    if not count:
        return ()
    if path is None:
        raise UserError(f"{count} shots are asked for: name their problem file (--shots), or set --shot_count 0")
    shots = problems_at(path, laid_out).problems
    if len(shots) < count:
        raise UserError(f"{path}: holds {len(shots)} problems, {count} shots are asked for (--shot_count)")
    return shots[:count]


def of_subjects(problems: Sequence[Problem], subjects: Sequence[str]) -> tuple[Problem, ...]:
    """The problems of these subjects; all where none is named.

    Raises:
        UserError: a subject that no problem has.
    """
    known = {problem.category for problem in problems}
    for subject in subjects:
        if subject not in known:
            there = ", ".join(sorted(name for name in known if name)) or "no subjects"
            raise UserError(f"no problem is of the subject '{subject}' (--subjects); the files have {there}")
    return tuple(problem for problem in problems if not subjects or problem.category in subjects)


def control_tokens_in(model: Any, problems: Iterable[Problem]) -> dict[str, int]:
    """Special tokens that are written out in problems, where they end texts or turns; none for a model without a tokenizer."""
    texts = (text for problem in problems for text in (problem.text, *problem.choices, problem.explanation or ""))
    return control_tokens(model.tokenizer, texts) if hasattr(model, "tokenizer") else {}
