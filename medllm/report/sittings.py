"""What was asked and said when a model sat the exam: prompts, texts, and how each text was read, from its run folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medllm.config import ProblemLayout
from medllm.errors import UserError
from medllm.exam.answers import extract_answer
from medllm.exam.flips import Answered
from medllm.exam.loaders import problems_at
from medllm.exam.problem import Problem
from medllm.exam.prompts import evaluation_prompt
from medllm.exam.rows import read_json_lines
from medllm.journal import JOURNAL, digest
from medllm.model.tokenizer import Prompt

_WORDING = ("template", "explanation", "format", "answer_as")
"""The settings that a prompt is worded by."""


@dataclass(frozen=True)
class Form:
    """How questions were asked.

    Attributes:
        wording: The settings of :func:`medllm.exam.prompts.evaluation_prompt`, but for the examples.
        before: All that stands before a question; in a chat, each turn under its role.
    """

    wording: tuple[tuple[str, Any], ...]
    before: str

    def asks(self, problem: Problem) -> str:
        """What stands behind :attr:`before`."""
        return _last_turn(evaluation_prompt(problem, (), **dict(self.wording)))


@dataclass(frozen=True)
class Said:
    """A text, and the rule that read its answer or the reason why none was read; ``""`` where it reads otherwise today."""

    text: str
    read: str


@dataclass(frozen=True)
class Sitting:
    """One model in one setting: in which form it was asked (None where that is not known any more), and what it said."""

    form: Form | None
    said: Mapping[str, Said]


@dataclass(frozen=True)
class _Asked:
    """A form with the examples themselves, so that a whole prompt can be held against the one that was answered."""

    form: Form
    shots: tuple[Problem, ...]

    def answered_in(self, journal: Path, problems: Mapping[str, Problem]) -> bool:
        """Whether a run's first answer is to this prompt; True where there is no journal to ask."""
        line = next(read_json_lines(journal), None) if journal.is_file() else None
        problem = problems.get(line[0].get("problem_id", "")) if line else None
        if line is None or problem is None:
            return True
        return line[0].get("prompt") == digest(evaluation_prompt(problem, self.shots, **dict(self.form.wording)))


def read_sitting(
    folder: Path, config: Mapping[str, Any], answers: Mapping[str, Answered], problems: Mapping[str, Problem]
) -> Sitting:
    """What a run of ``medllm evaluate`` asked, and how its answers are read.

    Where the journal's digest says that problems or examples changed since, no prompt is shown.

    Args:
        folder: The run folder.
        config: Its settings.
        answers: Its answers.
        problems: The problems by id, those that are at hand.
    """
    said = {
        problem_id: Said(one.text, _read(one, problems.get(problem_id), bool(config.get("explanation"))))
        for problem_id, one in answers.items()
    }
    asked = _asked(config, problems)
    return Sitting(asked.form if asked and asked.answered_in(folder / JOURNAL, problems) else None, said)


def laid_out(config: Mapping[str, Any]) -> ProblemLayout:
    """The layout of a run's problem files."""
    return ProblemLayout(**{one.name: config[one.name] for one in dataclasses.fields(ProblemLayout) if one.name in config})


def _asked(config: Mapping[str, Any], problems: Mapping[str, Problem]) -> _Asked | None:
    """The form of a run's prompts; None where it cannot be had: settings that are not there, examples that are gone."""
    count, path = config.get("shot_count") or 0, config.get("shots")
    if not problems or any(name not in config for name in _WORDING):
        return None
    if count and (not isinstance(path, str) or not os.path.exists(path)):
        return None
    wording = tuple((name, config[name]) for name in _WORDING)
    first = next(iter(problems.values()))
    try:
        shots = problems_at(path, laid_out(config)).problems[:count] if count and path else ()
        before = _before_last(evaluation_prompt(first, shots, **dict(wording)))
    except (UserError, KeyError):
        return None
    return _Asked(Form(wording, before.removesuffix(_last_turn(evaluation_prompt(first, (), **dict(wording))))), shots)


def _last_turn(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1].content


def _before_last(prompt: Prompt) -> str:
    """A text whole; of a conversation all turns but the last."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt[:-1])


def _read(one: Answered, problem: Problem | None, explanation: bool) -> str:
    if problem is None:
        return ""
    reading = extract_answer(one.text, problem, explanation=explanation, cut_off=one.cut_off)
    return (reading.rule or reading.reason) if ",".join(reading.answer) == one.prediction else ""
