"""How a public set lays out its problems: a map from its fields to IgakuQA's, declared in YAML.

``medllm/exam/layouts/`` holds the maps of known sets, and ``--layout FILE`` takes another; docs/data_sets.md says how one is
written.
A layout is recognised by its fields, never by a file's name.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from medllm.errors import UserError
from medllm.exam.problem import LETTERS
from medllm.text_files import read_yaml

_FIRST_EXAM_YEAR = 1906  # exam 112 was sat in 2018, one exam a year
_OPTION_LINE = re.compile(
    r"^[ \t\u3000]*\|?[ \t\u3000]*([a-j])(?:[ \t\u3000]*\|[ \t\u3000]*|[ \t\u3000.．)）:：]+)(\S.*)$", re.MULTILINE
)
_LETTERED = re.compile(r"^([a-j])[.．:：)）][ \u3000]*")
_THREE_POINTS = (frozenset("BE"), range(26, 51))

Skip = Literal["images", "no_gold", "no_question", "no_option"]
SAID: Mapping[Skip, str] = {
    "images": "choices are images",
    "no_gold": "no gold answer",
    "no_question": "no question",
    "no_option": "answer is no option",
}


@dataclass(frozen=True)
class FieldMap:
    """A layout.

    Attributes:
        name: What it is called.
        known_by: Fields that a row of it has.
        not_by: Fields that none of its rows has: with them it is a result.
        integer: A field that holds whole numbers, where that tells it from another layout.
        id: The field that names the problem; file and number where there is none.
        id_with_file: Ids count from zero in every file.
        question: The question's field.
        unasked: What stands for a question that is missing, where the problem counts all the same.
        before: A text in front of the question (``a.b``: the field b of the object a).
        context: A text that the question is about, likewise; prompts show it apart from the question.
        options: A field with a list or an object by letter, or a column for each.
        options_inside: The options are lines of the question.
        options_by_sign: Each option is the field ``a``, ``b`` … or ``1``, ``2`` … Where a row has neither these nor a question,
            it is one of an answer sheet: its options are what the gold answer's letters may be.
        numeric: A field, and its value where the answer is a number.
        answer: The gold answer's field.
        answer_as: What is in it: ``letters`` (any case, joined, or a list), ``digits`` from 1, an ``index`` from 0, an
            option's ``text``.
        answers_beside: A CSV in a folder above that holds the gold answers: file, id, answer.
        explanation, points, text_only, image, section, category, kinki, year: Fields; ``image`` is true where one is needed.
        category_is_file: The subject is the file's name.
        in_name: A regular expression over the file's name, whose groups are the ``year``, the ``section``, the ``category``.
        year_in_path: The year is the name of the file or its folder.
        exam_in_id: The id begins with the number of the national exam for physicians, which gives the year.
        section_in_id: A letter behind that number is the section.
        points_by_number: The field with the problem's number: 26 to 50 of the required sections count three points.
        void: A field that only a row without a gold answer that counts has.
        skips: Kinds of rows that the set is known to have, and that are left out and counted.
        once: A question that is there twice counts once.
    """

    name: str
    known_by: tuple[str, ...]
    question: str
    answer: str = ""
    integer: str = ""
    id: str = ""
    id_with_file: bool = False
    before: str = ""
    context: str = ""
    unasked: str = ""
    options: str | tuple[str, ...] = ""
    options_inside: bool = False
    options_by_sign: bool = False
    numeric: Mapping[str, str] | None = None
    answer_as: Literal["letters", "digits", "index", "text"] = "letters"
    answers_beside: Mapping[str, str] | None = None
    explanation: str = ""
    points: str = ""
    text_only: str = ""
    image: str = ""
    section: str = ""
    category: str = ""
    kinki: str = ""
    year: str = ""
    category_is_file: bool = False
    in_name: str = ""
    void: str = ""
    not_by: tuple[str, ...] = ()
    year_in_path: bool = False
    exam_in_id: bool = False
    section_in_id: bool = False
    points_by_number: str = ""
    skips: tuple[Skip, ...] = ()
    once: bool = False

    def knows(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether rows are laid out so."""
        return any(
            all(name in row for name in self.known_by)
            and not any(name in row for name in self.not_by)
            and (not self.integer or type(row[self.integer]) is int)
            for row in rows[:20]
        )

    def row(self, row: Mapping[str, Any], file: Path, number: int, where: str) -> dict[str, Any] | str:
        """A row in IgakuQA's fields, or the reason why it is left out.

        Raises:
            UserError: it cannot be used, and the set is not known to have such rows.
        """
        question, inside = self._question(row, where)
        unasked = not question.strip() and bool(self.unasked)
        question = self.unasked if unasked else question
        if not question.strip():
            return self._skip("no_question", f"{where}: '{self.question}' is empty; expected a question")
        choices = self._choices(row, inside, where)
        if isinstance(choices, str):
            return choices
        key = self._own_key(row, file, number)
        gold = _answers(file, self.answers_beside).get(key) if self.answers_beside else row.get(self.answer)
        if gold is None or gold in ("", [], "NA", ["NA"]) or (self.void and self.void in row):
            return self._skip("no_gold", f"{where}: problem {key} has no gold answer ('{self.answer or 'answer'}')")
        if unasked and self.options_by_sign and not choices:
            choices = _sheet(str(gold))
        answer = self._letters(gold, choices, where)
        if isinstance(answer, str):
            return answer
        found: dict[str, Any] = {
            "problem_id": self.key(file, row, number),
            "problem_text": question,
            "choices": choices,
            "answer": answer,
        }
        details = {name: value for name, value in self._details(row, key, file).items() if value is not None}
        return found | details | ({"text_only": False} if unasked else {})

    def key(self, file: Path, row: Mapping[str, Any], number: int) -> str:
        """The id of a row's problem, whether or not the row can be used."""
        own = self._own_key(row, file, number)
        return f"{file.stem}-{own}" if self.id_with_file else own

    def _own_key(self, row: Mapping[str, Any], file: Path, number: int) -> str:
        return plain(row[self.id]) if self.id and row.get(self.id) is not None else f"{file.stem}-{number}"

    def _skip(self, kind: Skip, error: str, detail: str = "") -> str:
        if kind not in self.skips:
            raise UserError(error)
        return SAID[kind] + (f": {detail}" if detail else "")

    def _question(self, row: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
        value = row.get(self.question)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: '{self.question}' holds {value!r}; expected text")
        text = value or ""
        inside: list[str] = []
        if self.options_inside and not self._is_number(row):
            text, inside = _split_options(text)
        before = _inside(row, self.before)
        return (f"{before}\n{text}" if before else text), inside

    def _is_number(self, row: Mapping[str, Any]) -> bool:
        return bool(self.numeric) and row.get(self.numeric["field"]) == self.numeric["value"] if self.numeric else False

    def _choices(self, row: Mapping[str, Any], inside: list[str], where: str) -> list[str] | str:
        if self.options_inside:
            return inside
        if not isinstance(self.options, str):
            values = [row.get(name) for name in self.options]
            if any(value is None for value in values):
                return self._skip("no_gold", f"{where}: expected the columns {', '.join(self.options)}")
            return [str(value).strip() for value in values]
        choices = row.get(self.options, [])
        if self.options_by_sign and self.options not in row:
            signs = next((signs for signs in (LETTERS, LETTERS.upper(), "123456789") if row.get(signs[0])), "")
            choices = [row[sign] for sign in signs if row.get(sign)]
        if choices == "IMAGES":
            return self._skip("images", f"{where}: the choices are images")
        if isinstance(choices, Mapping):
            choices = [choices[letter] for letter in sorted(choices) if choices[letter] is not None]
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise UserError(f"{where}: '{self.options}' holds {choices!r}; expected a list of texts")
        lettered = [_LETTERED.match(choice) for choice in choices]
        if choices and [one.group(1) if one else "" for one in lettered] == list(LETTERS[: len(choices)]):
            choices = [_LETTERED.sub("", choice) for choice in choices]
        return choices

    def _letters(self, gold: Any, choices: list[str], where: str) -> list[str] | str:
        values = [plain(one) for one in (gold if isinstance(gold, list) else [gold])]
        if not choices:
            return values
        letters: list[str] = []
        for value in values:
            if self.answer_as == "text" and value in choices:
                letters.append(LETTERS[choices.index(value)])
            elif self.answer_as in ("digits", "index"):
                first = 1 if self.answer_as == "digits" else 0
                if not re.fullmatch(r"[0-9]+", value):
                    return self._skip("no_option", f"{where}: answer '{value}' is no number of an option", value)
                if not first <= int(value) < len(choices) + first:
                    last = len(choices) + first - 1
                    raise UserError(f"{where}: answer '{value}' is not among the choices, numbered {first} to {last}")
                letters.append(LETTERS[int(value) - first])
            else:
                parts = [value.lower()] if " or " in value.lower() else list(re.sub(r"[\s,、・]", "", value.lower()))
                numbered = self.options_by_sign and all(part in "123456789" for part in parts)
                letters += [LETTERS[int(part) - 1] for part in parts] if numbered else parts
        return letters

    def _details(self, row: Mapping[str, Any], key: str, file: Path) -> dict[str, Any]:
        exam = re.match(r"(\d{3})([A-Z])?", key)
        section = row.get(self.section) if self.section else exam.group(2) if exam and self.section_in_id else None
        year = row.get(self.year) if self.year else None
        if self.exam_in_id and exam:
            year = int(exam.group(1)) + _FIRST_EXAM_YEAR
        if self.year_in_path:
            named = next(
                (name for name in (file.stem, file.resolve().parent.name) if re.fullmatch(r"(?:19|20)\d\d", name)), None
            )
            year = int(named) if named else None
        points = row.get(self.points) if self.points else None
        if isinstance(points, float) and points.is_integer():
            points = int(points)
        said = re.match(self.in_name, unicodedata.normalize("NFC", file.stem)) if self.in_name else None
        of_name = said.groupdict() if said else {}
        if isinstance(points, str) and points.strip().isdigit():
            points = int(points)
        if self.points_by_number:
            number = re.search(r"(\d+)$", str(row.get(self.points_by_number, "")))
            points = 3 if section in _THREE_POINTS[0] and number and int(number.group(1)) in _THREE_POINTS[1] else 1
        needs_image = bool(row.get(self.image)) if self.image else None
        text_only = row.get(self.text_only) if self.text_only else None
        return {
            "explanation": (row.get(self.explanation) or None) if self.explanation else None,
            "points": points,
            "text_only": text_only if needs_image is None else not needs_image,
            "year": int(of_name["year"]) if of_name.get("year") else year,
            "section": of_name["section"].upper() if of_name.get("section") else section,
            "category": file.stem if self.category_is_file else _inside(row, self.category) or of_name.get("category"),
            "kinki": list(row.get(self.kinki) or ()) if self.kinki else None,
            "context": _inside(row, self.context),
        }


def _inside(row: Any, path: str) -> str | None:
    """The text at ``a.b``, the field b of the object a; none where there is none."""
    value = row if path else None
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) and value else None


def plain(value: Any) -> str:
    """A value as text. Tables with a gap in a column of whole numbers hold them as 3.0."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).strip()


def read_field_map(path: Path) -> FieldMap:
    """A layout from its YAML file.

    Raises:
        UserError: it cannot be read, or has other fields than :class:`FieldMap`.
    """
    value = read_yaml(path)
    known = {one.name for one in fields(FieldMap)} - {"name"}
    if not {"known_by", "question"} <= set(value) <= known:
        raise UserError(
            f"{path}: a layout has known_by and question, and of {', '.join(sorted(known))} what it needs (--layout)"
        )
    for name, hint in get_type_hints(FieldMap).items():
        if name in value and not _fits(value[name], hint):
            raise UserError(f"{path}: {name} is {str(value[name])[:100]!r}, which is not what a layout has there (--layout)")
    for name, needed in (("numeric", {"field", "value"}), ("answers_beside", {"file", "id", "answer"})):
        if value.get(name) is not None and set(value[name]) != needed:
            raise UserError(f"{path}: {name} has {', '.join(value[name])}; it needs {', '.join(sorted(needed))} (--layout)")
    if not value["known_by"] or "" in (*value["known_by"], value["question"]):
        raise UserError(f"{path}: known_by and question name fields that a row has; no field has no name (--layout)")
    settings: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in value.items()}
    return FieldMap(name=path.stem, **settings)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML is of a field's type, with lists for tuples."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (UnionType, Union):
        return any(_fits(value, one) for one in inner)
    if kind is Literal:
        return value in inner
    if kind is tuple:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if kind is Mapping:
        return isinstance(value, dict) and all(_fits(one, str) for pair in value.items() for one in pair)
    return isinstance(value, hint)


@cache
def known_layouts() -> tuple[FieldMap, ...]:
    """The layouts of the sets that are known here; those with more fields first, for they tell more."""
    maps = [read_field_map(file) for file in sorted((Path(__file__).parent / "layouts").glob("*.yaml"))]
    return tuple(sorted(maps, key=lambda one: -len(one.known_by) - bool(one.integer)))


def _split_options(text: str) -> tuple[str, list[str]]:
    """A question without the lines of its options, and the options: the last run of lines lettered a, b, c …"""
    lines = list(_OPTION_LINE.finditer(text))
    starts = [index for index, line in enumerate(lines) if line.group(1) == "a"]
    if not starts:
        return text, []
    run = lines[starts[-1] :]
    run = [line for index, line in enumerate(run) if index < len(LETTERS) and line.group(1) == LETTERS[index]]
    options = [line.group(2).strip(" \t\u3000|") for line in run]
    return text[: run[0].start()].rstrip(), options


def _sheet(gold: str) -> list[str]:
    """The options of a problem of which the answer alone is known: none where that is a number."""
    letters = re.sub(r"[^a-j]", "", gold.lower())
    return list(LETTERS[: max(5, LETTERS.index(max(letters)) + 1)]) if letters else []


@cache
def _beside(path: Path, key: str, answer: str) -> dict[str, str]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return {row[key]: row[answer] for row in csv.DictReader(stream) if row.get(key)}


def _answers(file: Path, beside: Mapping[str, str]) -> dict[str, str]:
    """The gold answers of a CSV that stands in a folder above; none where there is no such file."""
    for folder in file.resolve().parents[:3]:
        if (folder / beside["file"]).is_file():
            return _beside(folder / beside["file"], beside["id"], beside["answer"])
    return {}
