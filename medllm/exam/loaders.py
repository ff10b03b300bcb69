"""Problem files → :class:`Problem` rows, and back.

Four formats, told apart by their content when ``problems_format`` is ``auto``:

- ``igakuqa``: ``data/YYYY/NNN-S.jsonl`` with ``NNN-S_metadata.jsonl`` beside it; year, section and subject are filled in.
- ``jsonl``: IgakuQA's own fields ``problem_id problem_text choices answer``, optionally ``points text_only explanation year
  section category kinki source``.
- ``jmmlu``: CSV without a header, ``question,A,B,C,D,answer``.
- ``pharmacist``: JSONL whose answers are 1-based digits, with the explanation in ``comment``; the year is the file's name.

A folder is read with everything below it; published predictions, metadata and few-shot examples in it are not exam problems.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medllm.config import ProblemsFormat
from medllm.errors import UserError
from medllm.exam.problem import LETTERS, OR, Problem
from medllm.run import atomic_path

_EXAM_FILE = re.compile(r"(?P<exam>\d{3})-(?P<section>[A-Z])\.jsonl")
_NO_PROBLEMS = re.compile(r"\d{3}-[A-Z]_.+\.jsonl|.+_(metadata|gpt4|chatgpt)\.jsonl")
_SHOTS_FILE = ("prompts", "prompt.jsonl")
_YEAR = re.compile(r"\d{4}")
_FIRST_EXAM_YEAR = 1906  # exam 112 was sat in 2018, one exam a year
_JMMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")

IMAGE_CHOICES = "choices are images"
UNMAPPED_ANSWER = "answer is no option"


@dataclass(frozen=True)
class LoadedProblems:
    """The problems of a file or folder, and how many rows were left out for each reason."""

    problems: tuple[Problem, ...]
    skipped: Mapping[str, int]


def load_problems(path: str | Path, *, problems_format: ProblemsFormat = "auto") -> LoadedProblems:
    """Read a problem file, or every problem file below a folder, in the order of their names.

    Raises:
        UserError: a missing path, a file without problems, a malformed line, a missing or wrong field, an answer that is not
            among the choices, or a problem_id that occurs twice. The message has file and line.
    """
    root = Path(path)
    skipped: Counter[str] = Counter()
    problems: dict[str, Problem] = {}
    lines: dict[str, str] = {}
    for file in _problem_files(root):
        before = len(problems) + skipped.total()
        for problem, line in _read_file(file, problems_format, skipped):
            if problem.problem_id in problems:
                raise UserError(
                    f"{line}: problem_id {problem.problem_id} occurs twice, first at {lines[problem.problem_id]}; "
                    "each problem needs its own id"
                )
            problems[problem.problem_id], lines[problem.problem_id] = problem, line
        if len(problems) + skipped.total() == before:
            raise UserError(f"{file}: holds no problems; expected one JSON object (or CSV row) a line")
    return LoadedProblems(tuple(problems.values()), dict(skipped))


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems as JSONL that :func:`load_problems` reads back unchanged; all of the file or nothing."""
    with atomic_path(Path(path)) as scratch, scratch.open("w", encoding="utf-8") as stream:
        for problem in problems:
            stream.write(json.dumps(_row(problem), ensure_ascii=False) + "\n")


def _row(problem: Problem) -> dict[str, Any]:
    row: dict[str, Any] = {
        "problem_id": problem.problem_id,
        "problem_text": problem.text,
        "choices": list(problem.choices),
        "text_only": problem.text_only,
        "answer": list(problem.answer),
        "points": str(problem.points),
    }
    optional = {
        "explanation": problem.explanation,
        "year": problem.year,
        "section": problem.section,
        "category": problem.category,
        "kinki": list(problem.kinki) or None,
        "source": problem.source or None,
    }
    return row | {name: value for name, value in optional.items() if value is not None}


# --- files -----------------------------------------------------------------------------------------------------------------


def _problem_files(root: Path) -> list[Path]:
    if not root.exists():
        raise UserError(f"{root}: no such problem file or folder (--problems)")
    if root.is_file():
        return [root]
    files = sorted(
        file
        for file in root.rglob("*")
        if file.suffix.lower() in _READERS
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
        and not _NO_PROBLEMS.fullmatch(file.name)
        and file.parts[-2:] != _SHOTS_FILE
    )
    if not files:
        raise UserError(f"{root}: no problem files in this folder; expected .jsonl or .csv (IgakuQA has data/YYYY/)")
    return files


def _read_file(file: Path, problems_format: ProblemsFormat, skipped: Counter[str]) -> Iterator[tuple[Problem, str]]:
    suffix = file.suffix.lower()
    if suffix not in _READERS:
        raise UserError(f"{file}: problems are read from .jsonl and .csv files; convert it to JSONL with IgakuQA's fields")
    if (suffix == ".csv") != (problems_format == "jmmlu") and problems_format != "auto":
        raise UserError(f"{file}: not a file of the format '{problems_format}' (jmmlu is .csv, the others are .jsonl)")
    yield from _READERS[suffix](file, problems_format, skipped)


def read_text(file: Path) -> str:
    """The UTF-8 text of a file, without byte-order mark.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); convert it, for example with iconv") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def read_json_lines(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(object, ``file:line``) of every line that is not blank.

    Raises:
        UserError: a line that is not a JSON object.
    """
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); expected a JSON object a line") from error
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: holds half a character (a lone surrogate); write the text anew as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON that can be read ({str(error).splitlines()[0]})") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield row, where


def _read_jsonl(file: Path, problems_format: ProblemsFormat, skipped: Counter[str]) -> Iterator[tuple[Problem, str]]:
    rows = list(read_json_lines(file))
    layout = _LAYOUTS.get(problems_format) or next(
        one for one in _LAYOUTS.values() if one.known_by(file, [row for row, _ in rows])
    )
    fields = layout.of(file)
    for row, where in rows:
        found = fields(row, where)
        if isinstance(found, str):
            skipped[found] += 1
        else:
            yield _problem(found, where), where


def _igakuqa_fields(file: Path) -> dict[str, Any]:
    name = _EXAM_FILE.fullmatch(file.name)
    if name is None:
        raise UserError(f"{file}: an IgakuQA file is called NNN-S.jsonl (112-A.jsonl); set --problems_format jsonl")
    folder = file.resolve().parent.name
    year = int(folder) if _YEAR.fullmatch(folder) else int(name["exam"]) + _FIRST_EXAM_YEAR
    return {"year": year, "section": name["section"]}


def _metadata(file: Path) -> dict[str, dict[str, Any]]:
    beside = file.with_name(f"{file.stem}_metadata.jsonl")
    if not beside.exists():
        return {}
    fields: dict[str, dict[str, Any]] = {}
    for row, where in read_json_lines(beside):
        key = _field(row, "problem_id", str, where)
        if key in fields:
            raise UserError(f"{where}: metadata of problem {key} occurs twice; each problem may have one line")
        fields[key] = {name: row[name] for name in ("category", "kinki") if name in row}
    return fields


def _read_csv(file: Path, problems_format: ProblemsFormat, skipped: Counter[str]) -> Iterator[tuple[Problem, str]]:
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    line = 1
    for number in itertools.count(1):
        where = f"{file}:{line}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{where}: not CSV ({error}); expected {','.join(_JMMLU_COLUMNS)}") from error
        if cells is None:
            return
        line = reader.line_num + 1
        if not cells:
            continue
        if len(cells) != len(_JMMLU_COLUMNS):
            expected = f"{len(_JMMLU_COLUMNS)} columns ({','.join(_JMMLU_COLUMNS)})"
            raise UserError(f"{where}: {len(cells)} columns, expected {expected}; quote a cell that holds a comma")
        question, *choices, answer = (cell.strip() for cell in cells)
        row = {
            "problem_id": f"{file.stem}-{number}",
            "problem_text": question,
            "choices": choices,
            "answer": [answer.lower()],
            "category": file.stem,
        }
        yield _problem(row, where), where


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv}


# --- rows ------------------------------------------------------------------------------------------------------------------

_Row = dict[str, Any]
_Fields = Callable[[_Row, str], _Row | str]


@dataclass(frozen=True)
class _Layout:
    """What rows of JSON can be laid out as.

    Attributes:
        of: From a file to a function ``(row, where) -> row``: the row in IgakuQA's fields, or the reason why it is left out.
        known_by: Whether a file, with these rows, is laid out so.
    """

    of: Callable[[Path], _Fields]
    known_by: Callable[[Path, Sequence[_Row]], bool]


def _igakuqa(file: Path) -> _Fields:
    known, metadata = _igakuqa_fields(file), _metadata(file)
    return lambda row, _: known | metadata.get(str(row.get("problem_id")), {}) | row


def _pharmacist(file: Path) -> _Fields:
    year = int(file.stem) if _YEAR.fullmatch(file.stem) else None
    return lambda row, where: _from_pharmacist(row, year, where)


_LAYOUTS: Mapping[str, _Layout] = {
    "igakuqa": _Layout(_igakuqa, lambda file, _: bool(_EXAM_FILE.fullmatch(file.name))),
    "pharmacist": _Layout(_pharmacist, lambda _, rows: any("comment" in row or row.get("choices") == "IMAGES" for row in rows)),
    "jsonl": _Layout(lambda _: lambda row, _: row, lambda *_: True),
}
"""By the names of :data:`medllm.config.ProblemsFormat`. ``auto`` takes the first that a file is known by."""


def _from_pharmacist(row: dict[str, Any], year: int | None, where: str) -> dict[str, Any] | str:
    """The row in IgakuQA's fields, or the reason why it cannot be asked as text."""
    choices = _field(row, "choices", (list, str), where)
    if choices == "IMAGES":
        return IMAGE_CHOICES
    letters = []
    for digit in _field(row, "answer", list, where):
        if not re.fullmatch(r"[0-9]+", str(digit)):
            return f"{UNMAPPED_ANSWER}: {digit}"
        if not 1 <= int(digit) <= min(len(choices), len(LETTERS)):
            raise UserError(f"{where}: answer '{digit}' is not among the choices, numbered 1 to {len(choices)}")
        letters.append(LETTERS[int(digit) - 1])
    fields = {name: value for name, value in row.items() if name != "comment"}
    return fields | {"answer": letters, "explanation": row.get("comment") or None} | ({"year": year} if year else {})


def _problem(row: dict[str, Any], where: str) -> Problem:
    choices = _texts(row, "choices", where)
    problem_id = _field(row, "problem_id", str, where)
    text = _field(row, "problem_text", str, where)
    if not problem_id or not text.strip():
        raise UserError(f"{where}: '{'problem_text' if problem_id else 'problem_id'}' is empty; expected text")
    if len(choices) > len(LETTERS):
        raise UserError(f"{where}: problem {problem_id} has {len(choices)} choices; at most {len(LETTERS)} can be lettered")
    return Problem(
        problem_id=problem_id,
        text=text,
        choices=choices,
        answer=_gold(_texts(row, "answer", where), choices, problem_id, where),
        points=_whole(row, "points", where, default=1),
        text_only=_optional(row, "text_only", bool, where, default=True),
        explanation=_optional(row, "explanation", str, where),
        year=_whole(row, "year", where) if row.get("year") is not None else None,
        section=_optional(row, "section", str, where),
        category=_optional(row, "category", str, where),
        kinki=_kinki(row, where),
        source=_optional(row, "source", str, where, default=where),
    )


def _gold(answer: tuple[str, ...], choices: tuple[str, ...], problem_id: str, where: str) -> tuple[str, ...]:
    """Gold letters sorted; ``a or d`` as it is; a number as its text."""
    if not answer:
        raise UserError(f'{where}: problem {problem_id} has no answer; expected a list such as ["a"]')
    if not choices:
        if len(answer) != 1 or not answer[0].strip():
            raise UserError(f"{where}: problem {problem_id} has no choices: expected one number, found {list(answer)}")
        return answer
    letters = LETTERS[: len(choices)]
    alternatives = answer[0].split(OR) if len(answer) == 1 else list(answer)
    for letter in alternatives:
        if len(letter) != 1 or letter not in letters:
            raise UserError(
                f"{where}: problem {problem_id}: answer '{letter}' is not among the choices {letters[0]} to {letters[-1]}"
            )
    if len(set(alternatives)) < len(alternatives):
        raise UserError(f"{where}: problem {problem_id} names an answer twice: {list(answer)}")
    return tuple(sorted(answer))


def _kinki(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """Prohibited letters, whichever way they are spelt: ``["c","e"]``, ``["ce"]``, or full-width."""
    if row.get("kinki") is None:
        return ()
    return tuple(sorted(set(unicodedata.normalize("NFKC", "".join(_texts(row, "kinki", where))).lower())))


def _field(row: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: the field '{name}' is missing; a problem needs problem_id, problem_text, choices and answer")
    if not isinstance(row[name], kind):
        wanted = " or ".join(_KINDS[one] for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{where}: '{name}' holds {row[name]!r}; expected {wanted}")
    return row[name]


_KINDS = {str: "text", list: "a list of texts", bool: "true or false"}


def _optional(row: dict[str, Any], name: str, kind: type, where: str, default: Any = None) -> Any:
    return default if row.get(name) is None else _field(row, name, kind, where)


def _texts(row: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = _field(row, name, list, where)
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: '{name}' holds {values!r}; expected a list of texts")
    return tuple(values)


def _whole(row: dict[str, Any], name: str, where: str, default: int = 0) -> int:
    """A whole number that may be written as text, as IgakuQA writes its points."""
    value = row.get(name, default)
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]+", str(value)):
        raise UserError(f"{where}: '{name}' holds {value!r}; expected a whole number, not negative")
    return int(value)
