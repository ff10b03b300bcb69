"""Where a score with explanation and one without part: problem by problem, and why.

A *flip* is a problem that a model gets right in one of two settings and wrong in the other. Its cause is read from the answer
that is wrong: the explained one where the problem was lost by explaining, the plain one where it was won. The first that holds:

1. No answer was found in the text, and it *ran on*: before it had answered it began another question or turn, by itself or at
   the stop string that ended it.
2. No answer was found, and it was *cut off*: ``max_new_tokens`` ended it, or, where that is not known, it ends amid its words.
3. No answer was found in it at all: *unread*.
4. There is an answer, and it *contradicts* the text's own explanation, which names another option
   (:mod:`medllm.exam.conclusions`).
5. There is an answer, and nothing of this: the *reasoning* is wrong.

A text that answers and then runs on, or is cut off, is none of the first three: its answer was read, and was its own. How many
texts ran on or were cut off, with or without an answer, is :class:`medllm.exam.endings.EndingCounts`'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medllm.errors import UserError
from medllm.exam.answers import extract_answer
from medllm.exam.conclusions import concluded
from medllm.exam.endings import ending
from medllm.exam.predictions import read_predictions
from medllm.exam.problem import Problem
from medllm.exam.rows import read_json_lines
from medllm.journal import JOURNAL
from medllm.run import RESULT
from medllm.text_files import read_json_object

Cause = Literal["ran_on", "cut_off", "unread", "contradicts", "reasoning"]

CAUSES: Mapping[Cause, str] = {
    "ran_on": "ran on into another question before it had answered",
    "cut_off": "was cut off before it had answered",
    "unread": "gave no answer that could be read",
    "contradicts": "answered against its own explanation, which names another option",
    "reasoning": "reasoned its way to the wrong answer",
}
"""Every cause in words, with the text as their subject, in the order in which they are asked for."""


@dataclass(frozen=True)
class Answered:
    """A model's answer to one problem, as a run folder holds it.

    Attributes:
        text: All that it wrote.
        prediction: The answer as it was counted; empty where none was found.
        correct: It earned the points.
        cut_off: ``max_new_tokens`` ended it; None where that is not known.
        stop: The stop string that ended it, which is no part of the text.
    """

    text: str
    prediction: str
    correct: bool
    cut_off: bool | None = None
    stop: str = ""


@dataclass(frozen=True)
class Flip:
    """A problem on which two settings part.

    Attributes:
        problem_id: The problem.
        lost: Right without an explanation and wrong with it; False: the reverse.
        cause: What was wrong with the answer that was wrong.
    """

    problem_id: str
    lost: bool
    cause: Cause


def read_answered(run: str | Path) -> dict[str, Answered]:
    """The answers of a finished ``medllm evaluate``, by problem, in the order in which they were scored.

    How a text ended is in the folder's journal; without that file, what the text itself shows has to do.

    Raises:
        UserError: the folder is no finished evaluation, or a file of it is not as it was written.
    """
    folder = Path(run)
    result = read_json_object(folder / RESULT, "the run has not finished; finish it, or leave it out")
    sheet = result.get("score")
    rows = sheet.get("results") if isinstance(sheet, dict) else None
    if result.get("stage") != "evaluate" or not isinstance(rows, list):
        raise UserError(f"{folder / RESULT}: holds no answers of a 'medllm evaluate'; give the folder of one that generates")
    texts = {one.problem_id: one for one in read_predictions(folder / "predictions.jsonl")}
    ends = _ends(folder / JOURNAL)
    answered: dict[str, Answered] = {}
    for row in rows:
        key, correct = (row.get("problem_id"), row.get("correct")) if isinstance(row, dict) else (None, None)
        if key not in texts or not isinstance(correct, bool):
            raise UserError(
                f"{folder}: problem {key!r} of {RESULT} has no line in predictions.jsonl, or no verdict; run it again"
            )
        answered[key] = Answered(texts[key].explanation, texts[key].prediction, correct, *ends.get(key, (None, "")))
    return answered


def _ends(journal: Path) -> dict[str, tuple[bool, str]]:
    """Whether each text was cut off, and the stop string that ended it; of two lines for one problem the later counts."""
    if not journal.is_file():
        return {}
    return {
        str(row.get("problem_id")): (row.get("finish") == "length", str(row.get("stopped") or ""))
        for row, _ in read_json_lines(journal)
    }


def cause_of(problem: Problem, answer: Answered, *, explanation: bool) -> Cause:
    """Why an answer is wrong, by the order at the top.

    Args:
        problem: What was asked.
        answer: An answer that is wrong.
        explanation: It was asked to explain before it answers.
    """
    if not answer.prediction.strip():
        if ending(answer.text, stop=answer.stop).run_on:
            return "ran_on"
        reading = extract_answer(answer.text, problem, explanation=explanation, cut_off=answer.cut_off)
        return "cut_off" if answer.cut_off or reading.reason == "cut_off" else "unread"
    named = concluded(answer.text, problem)
    return "contradicts" if named and set(named) != set(answer.prediction.split(",")) else "reasoning"


def find_flips(
    problems: Mapping[str, Problem], plain: Mapping[str, Answered], explained: Mapping[str, Answered]
) -> tuple[Flip, ...]:
    """The problems on which one model's answers without and with explanation part, in the order of ``plain``.

    Args:
        problems: At least those on which they part.
        plain: The answers without an explanation (:func:`read_answered`).
        explained: Those with one, to the same problems.

    Raises:
        UserError: the two are not of the same problems, or one on which they part is missing.
    """
    if plain.keys() != explained.keys():
        odd = sorted(plain.keys() ^ explained.keys())
        raise UserError(
            f"the answers with and without explanation are not to the same problems: {len(odd)} differ, e.g. {odd[0]}; "
            "evaluate both on the same problem files with the same limit"
        )
    flips: list[Flip] = []
    for key, before in plain.items():
        after = explained[key]
        if before.correct == after.correct:
            continue
        if key not in problems:
            raise UserError(f"problem {key} was answered but is not among the problems; give the files it was evaluated on")
        wrong = after if before.correct else before
        flips.append(Flip(key, before.correct, cause_of(problems[key], wrong, explanation=before.correct)))
    return tuple(flips)
