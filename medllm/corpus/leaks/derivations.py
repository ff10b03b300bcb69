"""Sets made from exams, which must not train what is tested on those: ``derivations.yaml``, and what it says of a file."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from medllm.exam.problem import Problem

_HEAD = 1 << 14
"""Characters of a file in which its fields are looked for."""


@dataclass(frozen=True)
class Exam:
    """An exam that is sat once a year.

    Attributes:
        key: Its name in the table.
        name: What a reader calls it.
        ids: Pattern of its problems' ids, with the exam's ``number``.
        first: Year of exam 0.
    """

    key: str
    name: str
    ids: re.Pattern[str]
    first: int

    def year(self, problem: Problem) -> int | None:
        """The year in which a problem was asked in this exam; None where it was not, by its id."""
        found = self.ids.fullmatch(problem.problem_id)
        return int(found["number"]) + self.first if found else None


@dataclass(frozen=True)
class MadeFrom:
    """A set, what it was made from, and how a file of it is known.

    Attributes:
        name: What it is called, and by whom it is published.
        years: Years of each exam, by the exam's key.
        reason: Why it must not train what is tested on those.
        paths: A file of it has one of these in its path.
        fields: Rows of it have all of these.
        digests: BLAKE2b digests (128 bits) of its files.
    """

    name: str
    years: Mapping[str, frozenset[int]]
    reason: str
    paths: tuple[re.Pattern[str], ...]
    fields: frozenset[str]
    digests: frozenset[str]

    def known_by(self, file: Path) -> str:
        """What tells that a file is of this set; empty where nothing does."""
        if any(path.search(file.as_posix()) for path in self.paths):
            return "by its name"
        if self.fields and self.fields <= _fields(file):
            return "by its fields"
        return "by its digest" if self.digests and _digest(file) in self.digests else ""


@dataclass(frozen=True)
class Derived:
    """A training file that was made from what is held out."""

    file: str
    name: str
    known_by: str
    exam: str
    years: tuple[int, ...]
    reason: str

    def words(self) -> str:
        """For a line: what it is and why it matters."""
        years = ", ".join(map(str, self.years))
        return f"{self.file}: is {self.name} ({self.known_by}): {self.reason}; {self.exam} of {years} is held out"


def derived(paths: Iterable[str], problems: Sequence[Problem]) -> list[Derived]:
    """The files at ``paths`` that were made from the exams that ``problems`` are of.

    Args:
        paths: Training files, or folders with everything below them.
        problems: What is held out; of which exam and year each is says its id.
    """
    exams, sets = _table()
    held_out = {exam.key: {exam.year(problem) for problem in problems} for exam in exams}
    names = {exam.key: exam.name for exam in exams}
    found = []
    for file in itertools.chain.from_iterable(map(files_at, paths)):
        if (file.parent / "config.yaml").exists():  # a stage's own output, whatever the study is called
            continue
        for one in sets:
            years = [(key, sorted(of & held_out[key])) for key, of in one.years.items() if of & held_out[key]]
            if years and (known_by := one.known_by(file)):
                found += [Derived(str(file), one.name, known_by, names[key], tuple(of), one.reason) for key, of in years]
                break
    return found


@functools.cache
def _table() -> tuple[tuple[Exam, ...], tuple[MadeFrom, ...]]:
    text = resources.files("medllm.corpus.leaks").joinpath("derivations.yaml").read_text(encoding="utf-8")
    table: Any = yaml.safe_load(text)
    exams = tuple(Exam(key, one["name"], re.compile(one["ids"]), one["first"]) for key, one in table["exams"].items())
    sets = tuple(
        MadeFrom(
            f"{one['name']} ({one['publisher']})",
            {key: frozenset(years) for key, years in one["made_from"].items()},
            one["reason"],
            tuple(re.compile(path, re.IGNORECASE) for path in one.get("paths", ())),
            frozenset(one.get("fields", ())),
            frozenset(one.get("digests", ())),
        )
        for one in table["sets"]
    )
    return exams, sets


def files_at(path: str) -> list[Path]:
    """The file at ``path``, or all below it where that is a folder."""
    root = Path(path)
    return sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]


def _fields(file: Path) -> frozenset[str]:
    """Names that the first rows of a JSON file give their values."""
    if file.suffix.lower() not in (".jsonl", ".json"):
        return frozenset()
    try:
        with file.open(encoding="utf-8-sig") as stream:
            return frozenset(re.findall(r'"(\w+)"\s*:', stream.read(_HEAD)))
    except (OSError, UnicodeDecodeError):
        return frozenset()  # what cannot be read is refused by those who read it


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""
