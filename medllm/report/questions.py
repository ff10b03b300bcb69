"""Every question of the exam with everybody's answer to it, as the page's browser of questions reads them.

A page of thousands of questions by tens of models opens at once only if a browser neither draws nor reads them all: what is
filtered by travels as one compressed JSON, the texts in blocks of questions, each opened when one of them is looked at (or all,
for a search). What is the same for all questions (the examples before them) is there once. ``templates/questions.js`` reads it.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medllm.exam.flips import CAUSES, Flip
from medllm.exam.problem import Problem
from medllm.report.results import Cell
from medllm.report.sittings import Sitting
from medllm.report.wording import READ_BY, UNREAD

BLOCK = 50
"""Questions whose texts are opened together."""
_BEGIN = 60  # characters of a question in the list


@dataclass(frozen=True)
class Answer:
    """What one model answered to a question in one setting.

    Attributes:
        prediction: The answer as it was counted.
        correct: Whether it earned the points.
        text: All of what the model wrote; empty where it is not at hand.
        read: The rule that read the answer, or the reason why none was read; empty where that cannot be told any more.
    """

    prediction: str
    correct: bool
    text: str = ""
    read: str = ""


@dataclass(frozen=True)
class Question:
    """A question and everybody's answers.

    Attributes:
        problem_id: Its id.
        problem: The question itself; None where its file is not at hand.
        answers: One a cell, in the order of the cells.
        asked: What was asked behind the examples, one a form of prompt.
    """

    problem_id: str
    problem: Problem | None
    answers: tuple[Answer, ...]
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Questions:
    """All questions that every cell answered.

    Attributes:
        cells: Model and setting of each cell.
        forms: The forms of prompt: what stands before every question, the examples above all.
        form_of: Which form each cell was asked in; -1 where that is not known.
        every: The questions, in the exam's order.
        flips: For a model, the questions that explaining lost or gained, and why.
    """

    cells: tuple[tuple[str, str], ...]
    forms: tuple[str, ...]
    form_of: tuple[int, ...]
    every: tuple[Question, ...]
    flips: Mapping[str, tuple[Flip, ...]] = field(default_factory=dict)

    def packed(self) -> Packed:
        """The questions for the page. The same questions give the same text."""
        models = list(dict.fromkeys(model for model, _ in self.cells))
        flipped: dict[str, dict[int, tuple[int, str]]] = {}
        for model, flips in self.flips.items():
            for flip in flips:
                flipped.setdefault(flip.problem_id, {})[models.index(model)] = (int(flip.lost), flip.cause)
        index = {
            "models": models,
            "cells": [
                [models.index(model), setting, form] for (model, setting), form in zip(self.cells, self.form_of, strict=True)
            ],
            "forms": self.forms,
            "words": {"read": READ_BY, "unread": UNREAD, "causes": dict(CAUSES)},
            "block": BLOCK,
            "questions": [_facts(one, flipped.get(one.problem_id, {})) for one in self.every],
        }
        blocks = [self.every[start : start + BLOCK] for start in range(0, len(self.every), BLOCK)]
        return Packed(_compressed(index), tuple(_compressed([_texts(one) for one in block]) for block in blocks))


@dataclass(frozen=True)
class Packed:
    """Questions as they travel: JSON, compressed with gzip, in base64; what is filtered by, and blocks of texts."""

    index: str
    blocks: tuple[str, ...]


def gather(
    cells: Sequence[Cell],
    problems: Mapping[str, Problem],
    sittings: Sequence[Sitting | None],
    flips: Mapping[str, tuple[Flip, ...]] | None = None,
) -> Questions:
    """The questions that all cells share, in the order of the first.

    Args:
        cells: The evaluated models.
        problems: Problems by id; an id that is missing is shown without its question.
        sittings: Of each cell, what was asked and said; None where only its predictions are known.
        flips: For a model, the questions that explaining lost or gained.
    """
    right = [{result.problem_id: result for result in cell.results} for cell in cells]
    shared = [problem_id for problem_id in right[0] if all(problem_id in side for side in right)] if right else []
    forms = list(dict.fromkeys(sitting.form for sitting in sittings if sitting and sitting.form))
    every = []
    for problem_id in shared:
        answers = []
        for side, sitting in zip(right, sittings, strict=True):
            result, said = side[problem_id], sitting.said.get(problem_id) if sitting else None
            text, read = (said.text, said.read) if said else ("", "")
            answers.append(Answer(result.prediction or "", bool(result.correct), text, read))
        problem = problems.get(problem_id)
        asked = tuple(form.asks(problem) for form in forms) if problem else ()
        every.append(Question(problem_id, problem, tuple(answers), asked))
    return Questions(
        tuple((cell.model, cell.setting) for cell in cells),
        tuple(form.before for form in forms),
        tuple(forms.index(sitting.form) if sitting and sitting.form else -1 for sitting in sittings),
        tuple(every),
        flips or {},
    )


def _facts(question: Question, flips: Mapping[int, tuple[int, str]]) -> dict[str, Any]:
    """What the list shows and filters by; ``right`` has a digit a cell."""
    facts = {"id": question.problem_id, "right": "".join(str(int(one.correct)) for one in question.answers), "flips": flips}
    problem = question.problem
    if problem is None:
        return facts
    return facts | {
        "begin": problem.text[:_BEGIN],
        "points": problem.points,
        "year": problem.year,
        "section": problem.section,
        "category": problem.category,
        "image": not problem.text_only,
    }


def _texts(question: Question) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "answers": [[one.prediction, one.read, one.text] for one in question.answers],
        "asked": question.asked,
    }
    problem = question.problem
    if problem is None:
        return plain
    return plain | {
        "text": problem.text,
        "context": problem.context or "",
        "choices": problem.choices,
        "gold": problem.accepted,
    }


def _compressed(plain: Any) -> str:
    raw = json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode("ascii")
