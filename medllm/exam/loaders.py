"""Problem files → :class:`Problem` rows, and back.

A file's rows (:mod:`medllm.exam.rows`) are laid out in one of the ways that :mod:`medllm.exam.field_map` knows, or in
IgakuQA's own: JSONL with ``problem_id problem_text choices answer``, optionally ``points text_only explanation year section
category kinki source context``; where such a file is called ``NNN-S.jsonl``, year, section and subject are filled in from its
name and from the metadata beside it.

A folder is read with everything below it; published predictions, metadata, results and few-shot examples in it are no problems.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from medllm.config import ProblemLayout, ProblemsFormat
from medllm.errors import UserError
from medllm.exam.field_map import FieldMap, known_layouts, read_field_map
from medllm.exam.problem import LETTERS, OR, Problem
from medllm.exam.rows import BAD, SUFFIXES, read_json_lines, read_rows
from medllm.run import atomic_path

_EXAM_FILE = re.compile(r"(?P<exam>\d{3})-(?P<section>[A-Z])\.jsonl")
_NO_PROBLEMS = re.compile(r"\d{3}-[A-Z]_.+\.jsonl|.+_(metadata|gpt4|chatgpt)\.jsonl")
_SHOTS = re.compile(r"(?:^|/)(?:prompts?|few[-_]?shots?|shots)(?:[-_.][^/]*)?(?:/|$)", re.IGNORECASE)
_YEAR = re.compile(r"\d{4}")
_FIRST_EXAM_YEAR = 1906  # exam 112 was sat in 2018, one exam a year

REPEATED = "the same question under another id"
TWICE = "bad row: its problem_id was there before"


@dataclass(frozen=True)
class LoadedProblems:
    """The problems of a file or folder.

    Attributes:
        problems: In the order of the files' names.
        skipped: How many rows were left out for each reason.
        layouts: How many files were laid out in each way.
        skipped_ids: Problems that were left out, under their ids.
        ignored: Files of a folder that hold no problems: metadata, predictions, results, examples.
    """

    problems: tuple[Problem, ...]
    skipped: Mapping[str, int]
    layouts: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    skipped_ids: frozenset[str] = frozenset()


def problems_at(path: str | Path, laid_out: ProblemLayout) -> LoadedProblems:
    """:func:`load_problems`, as settings have it.

    Raises:
        UserError: as there.
    """
    skips = laid_out.on_bad_row == "skip"
    return load_problems(path, problems_format=laid_out.problems_format, layout=laid_out.layout, skip_bad_rows=skips)


def load_problems(
    path: str | Path, *, problems_format: ProblemsFormat = "auto", layout: str | Path | None = None, skip_bad_rows: bool = False
) -> LoadedProblems:
    """Read a problem file, or every problem file below a folder, in the order of their names.

    Args:
        path: The file or folder.
        problems_format: What it is; ``auto`` goes by fields and content.
        layout: A YAML file that says how it is laid out, where it has the layout's fields (:mod:`medllm.exam.field_map`).
        skip_bad_rows: Leave out and count a row that cannot be used, instead of refusing its file.

    Raises:
        UserError: a missing path, a file without problems, a malformed line, a missing or wrong field, an answer that is not
            among the choices, or a problem_id that occurs twice. The message has file and line.
    """
    root, given = Path(path), read_field_map(Path(layout)) if layout else None
    skipped: Counter[str] = Counter()
    layouts: Counter[str] = Counter()
    ignored: list[str] = []
    left_out: set[str] = set()
    problems: dict[str, Problem] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for file in _problem_files(root):
        source = _source(file, problems_format, given, known=root.is_file(), skip_bad_rows=skip_bad_rows)
        if source is None:
            ignored.append(str(file))
            continue
        layouts[source.name] += 1
        before = len(problems) + skipped.total()
        for problem, line in source.read(skipped, left_out, skip_bad_rows):
            asked = (problem.text, problem.choices, problem.answer)
            if source.once and seen.setdefault(asked, problem.source) != problem.source:
                skipped[REPEATED] += 1
                left_out.add(problem.problem_id)
            elif problem.problem_id in problems and skip_bad_rows:
                skipped[TWICE] += 1
            elif problem.problem_id in problems:
                raise UserError(
                    f"{line}: problem_id {problem.problem_id} occurs twice, first at {problems[problem.problem_id].source}; "
                    "each problem needs its own id"
                )
            else:
                problems[problem.problem_id] = problem
        if len(problems) + skipped.total() == before:
            raise UserError(f"{file}: holds no problems; expected one JSON object (or CSV row) a line")
    if not problems and not skipped:
        raise UserError(
            f"{root}: none of its {len(ignored)} files holds problems; name one's layout (--layout, docs/data_sets.md)"
        )
    skipped_ids = frozenset(left_out - problems.keys())
    return LoadedProblems(tuple(problems.values()), dict(skipped), dict(layouts), tuple(ignored), skipped_ids)


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
        "context": problem.context,
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
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
        and not _NO_PROBLEMS.fullmatch(file.name)
        and not _SHOTS.search(file.relative_to(root).as_posix())
    )
    if not files:
        raise UserError(f"{root}: no problem files in this folder; expected .jsonl or .csv (IgakuQA has data/YYYY/)")
    return files


@dataclass(frozen=True)
class _Source:
    """A file, its rows, and how they are laid out."""

    name: str
    once: bool
    rows: Sequence[tuple[dict[str, Any], str]]
    fields: _Fields
    key: Callable[[dict[str, Any], int], str] = lambda row, _: str(row.get("problem_id", ""))

    def read(self, skipped: Counter[str], left_out: set[str], skip_bad_rows: bool) -> Iterator[tuple[Problem, str]]:
        for number, (row, where) in enumerate(self.rows, start=1):
            key = self.key(row, number)
            try:
                if BAD in row:
                    raise UserError(row[BAD])
                found = self.fields(row, where, number)
                if not isinstance(found, str):
                    yield _problem(found, where), where
                    continue
            except UserError as error:
                if not skip_bad_rows:
                    raise
                said = str(error).removeprefix(f"{where}: ")
                found = f"bad row: {said.replace(f'problem {key}', 'the problem') if key else said}"
            skipped[found] += 1
            left_out.add(key)


def _source(
    file: Path, problems_format: ProblemsFormat, layout: FieldMap | None, *, known: bool, skip_bad_rows: bool
) -> _Source | None:
    """How a file is to be read; None where it holds no problems, and was not named itself (``known``)."""
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{file}: problems are read from {', '.join(SUFFIXES)} files; convert it to JSONL with IgakuQA's fields"
        )
    if layout is None and (suffix == ".csv") != (problems_format == "jmmlu") and problems_format != "auto":
        raise UserError(f"{file}: not a file of the format '{problems_format}' (jmmlu is .csv, the others are .jsonl)")
    rows = read_rows(file, must=known or suffix == ".jsonl", skip_bad=skip_bad_rows)
    plain = [row for row, _ in rows]
    named = _MAPS.get(problems_format)
    own = [layout] if layout and layout.knows(plain) else []
    known_here = (
        one for one in known_layouts() if (one.name == named if named else problems_format == "auto" and one.knows(plain))
    )
    if field_map := next(chain(own, known_here), None):
        key = partial(field_map.key, file)
        return _Source(field_map.name, field_map.once, rows, partial(_mapped, field_map, file), key)
    asks = any("problem_text" in row for row in plain) or (known and suffix == ".jsonl")
    if not asks:
        if known and not plain:
            raise UserError(f"{file}: holds no problems; expected one JSON object (or CSV row) a line")
        if known:
            other = f", nor has it the fields of {layout.name} (known_by)" if layout else ""
            raise UserError(
                f"{file}: no layout that is known{other}; say how it is laid out (--layout FILE, docs/data_sets.md)"
            )
        return None
    if problems_format == "igakuqa" or (problems_format == "auto" and _EXAM_FILE.fullmatch(file.name)):
        exam, metadata = _igakuqa_fields(file), _metadata(file)
        return _Source("igakuqa", False, rows, lambda row, *_: exam | metadata.get(str(row.get("problem_id")), {}) | row)
    return _Source("jsonl", False, rows, lambda row, *_: row)


_Fields = Callable[[dict[str, Any], str, int], dict[str, Any] | str]
_MAPS = {"jmmlu": "jmmlu", "pharmacist": "yakugakuqa"}
"""Formats that are layouts, by the layout's name."""


def _mapped(field_map: FieldMap, file: Path, row: dict[str, Any], where: str, number: int) -> dict[str, Any] | str:
    return field_map.row(row, file, number, where)


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


# --- rows ------------------------------------------------------------------------------------------------------------------


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
        context=_optional(row, "context", str, where),
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
