"""Texts with the problem they answer, one a line → what is read in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medllm.errors import UserError
from medllm.exam.answers import Reading, extract_answer
from medllm.exam.problem import LETTERS, Problem
from medllm.exam.rows import read_json_lines


def read_texts(path: str | Path) -> list[Reading]:
    """One reading a row, in order.

    A row is a JSON object with ``text`` and ``choices`` (empty for a number), and where they matter ``answer_count`` (1),
    ``explanation`` (false: none was asked for), ``question`` and ``gold`` (the right number, as which an equal one is written).

    Raises:
        UserError: a missing or malformed file or row, by file and line.
    """
    return [_reading(row, where) for row, where in read_json_lines(Path(path))]


def _reading(row: dict[str, Any], where: str) -> Reading:
    text, choices, count = row.get("text"), row.get("choices"), row.get("answer_count", 1)
    explanation, question = row.get("explanation", False), row.get("question", "")
    if not isinstance(text, str) or not isinstance(question, str):
        raise UserError(f"{where}: 'text' is missing or no text; a row to read has text and choices")
    if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices) or len(choices) > len(LETTERS):
        raise UserError(f"{where}: 'choices' holds {choices!r}; expected a list of texts, empty where the answer is a number")
    if not isinstance(explanation, bool) or isinstance(count, bool) or not isinstance(count, int):
        raise UserError(f"{where}: expected 'explanation' true or false and 'answer_count' a whole number")
    if choices and not 1 <= count <= len(choices):
        raise UserError(f"{where}: 'answer_count' is {count} of {len(choices)} choices")
    gold = row.get("gold")
    answer = tuple(LETTERS[:count]) if choices else (str(gold[0] if isinstance(gold, list) and gold else gold or ""),)
    return extract_answer(text, Problem(where, question, tuple(choices), answer, source=where), explanation=explanation)
