"""One exam problem, whatever file it came from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from medllm.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
OR = " or "
"""What separates two answers either of which is right."""


@dataclass(frozen=True)
class Problem:
    """A problem of a multiple-choice (or numeric) exam.

    Attributes:
        problem_id: Unique in its exam, e.g. ``112A1``.
        text: The question.
        choices: Option texts, lettered a, b, c … in order; empty for a numeric problem.
        answer: Gold letters, sorted; the number as text for a numeric problem; ``("a or d",)`` where either is accepted.
        points: Points it is worth.
        text_only: False where the question needs an image that is not in the text.
        explanation: A verified explanation, where there is one.
        year: Exam year, where known.
        section: Section of the exam (IgakuQA: A–F), where known.
        category: Subject, where known.
        context: A text that the question is about (PubMedQA's abstract), where there is one.
        kinki: Prohibited choices (letters): choosing one counts against the candidate.
        source: Where it came from, ``file:line``.
    """

    problem_id: str
    text: str
    choices: tuple[str, ...]
    answer: tuple[str, ...]
    points: int = 1
    text_only: bool = True
    explanation: str | None = None
    year: int | None = None
    section: str | None = None
    category: str | None = None
    kinki: tuple[str, ...] = ()
    source: str = ""
    context: str | None = None

    @property
    def question(self) -> str:
        """The question behind its context, as a prompt without a place for contexts asks it."""
        return f"{self.context}\n{self.text}" if self.context else self.text

    @property
    def is_numeric(self) -> bool:
        """True where the answer is a number, not a choice."""
        return not self.choices

    @property
    def accepted(self) -> tuple[tuple[str, ...], ...]:
        """Every answer that is right: one, or several where the gold answer reads ``a or d``."""
        if len(self.answer) == 1 and OR in self.answer[0]:
            return tuple((alternative,) for alternative in self.answer[0].split(OR))
        return (self.answer,)

    @property
    def answer_count(self) -> int:
        """How many options are to be chosen."""
        return len(self.accepted[0])


def check_ids(problems: Iterable[Problem]) -> None:
    """Refuse problems of which two have one id: answers and preferences are found by it.

    Raises:
        UserError: a problem id comes twice.
    """
    seen: dict[str, Problem] = {}
    for problem in problems:
        if problem.problem_id in seen:
            first = seen[problem.problem_id].source
            raise UserError(f"{problem.source}: problem {problem.problem_id} was already in {first}; give each problem once")
        seen[problem.problem_id] = problem
