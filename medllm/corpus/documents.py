"""Files and folders → the documents that continued pretraining reads."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medllm.errors import UserError
from medllm.exam.loaders import problems_at
from medllm.exam.problem import Problem
from medllm.exam.prompts import curation_prompt, curation_response
from medllm.exam.rows import parquet_columns, read_json, read_json_lines, read_parquet
from medllm.stage_config import CorpusConfig
from medllm.text_files import first_line, read_text


@dataclass(frozen=True)
class Document:
    """One text of the corpus and where it came from, ``file:line`` (``file:row`` in a table)."""

    text: str
    source: str


@dataclass(frozen=True)
class LoadedCorpus:
    """The documents, and how many rows or files were passed over for each reason."""

    documents: tuple[Document, ...]
    skipped: dict[str, int] = field(default_factory=dict)


def load_documents(config: CorpusConfig) -> LoadedCorpus:
    """Read all of ``config.documents`` and turn the explained problems of ``config.problems`` into documents.

    Raises:
        UserError: a path that does not exist or cannot be read, a malformed line, a table without the text column, a problem
            of a year after ``config.problems_until``, or a corpus without a single document.
    """
    skipped: Counter[str] = Counter()
    documents = list(read_documents(config, skipped))
    for path in config.problems:
        loaded = problems_at(path, config)
        skipped.update(loaded.skipped)
        for problem in loaded.problems:
            refuse_held_out(problem, config.problems_until, "--corpus.problems_until")
            if problem.explanation:
                documents.append(problem_document(problem))
            else:
                skipped["problem without a verified explanation"] += 1
    if not documents:
        read = ", ".join([*config.documents, *config.problems]) or "nothing was given"
        reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.items())
        raise UserError(
            f"the corpus is empty ({read}{'; skipped ' + reasons if reasons else ''}); "
            "give texts with --corpus.documents or explained problems with --corpus.problems"
        )
    return LoadedCorpus(tuple(documents), dict(skipped))


def read_documents(config: CorpusConfig, skipped: Counter[str]) -> Iterator[Document]:
    """The documents of ``config.documents``, one after the other; what is passed over is counted in ``skipped``.

    Raises:
        UserError: as :func:`load_documents`.
    """
    for path in config.documents:
        for text, source in _read(Path(path), config.text_column, skipped):
            if text is None or (isinstance(text, str) and not text.strip()):
                skipped["empty text"] += 1
            elif not isinstance(text, str):
                raise UserError(
                    f"{source}: column '{config.text_column}' holds {type(text).__name__}, not text; "
                    "name the column that holds the documents with --corpus.text_column"
                )
            else:
                yield Document(text, source)


def problem_document(problem: Problem) -> Document:
    """Question, options, verified explanation and answer in the template the preference data is curated with."""
    return Document(curation_prompt(problem, ()) + curation_response(problem, answer_as="letters"), problem.source)


def refuse_held_out(problem: Problem, until: int, setting: str) -> None:
    """Keep exams held out for evaluation out of training. A problem without a year passes.

    Raises:
        UserError: the problem's year is after ``until``; the message names the ``setting`` that says so.
    """
    if problem.year is not None and problem.year > until:
        raise UserError(
            f"{problem.source or 'training problems'}: problem {problem.problem_id} is of {problem.year}, but only exams up to "
            f"{until} may enter training ({setting}); later ones are held out for evaluation: take it out"
        )


Row = tuple[Any, str]


def _read(path: Path, column: str, skipped: Counter[str]) -> Iterator[Row]:
    """(text, source) of every row below ``path``."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (--corpus.documents)")
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            yield from _saved_dataset(path, column)
            return
        for child in sorted(path.iterdir()):
            if child.name.startswith("."):
                continue
            if child.is_dir() or child.suffix.lower() in _READERS:
                yield from _read(child, column, skipped)
            else:
                skipped["file of another kind"] += 1
        return
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(sorted(_READERS))
        raise UserError(f"{path}: documents cannot be read from '{path.suffix}' files; give {known} or a `datasets` folder")
    yield from reader(path, column)


def _text_file(path: Path, column: str) -> Iterator[Row]:
    yield read_text(path), f"{path}:1"


def _json_lines(path: Path, column: str) -> Iterator[Row]:
    for row, where in read_json_lines(path):
        _check_column(where, column, list(row))
        yield row[column], where


def _json(path: Path, column: str) -> Iterator[Row]:
    value = read_json(path)
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"{path}:{number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        _check_column(where, column, list(row))
        yield row[column], where


def _parquet(path: Path, column: str) -> Iterator[Row]:
    _check_column(str(path), column, parquet_columns(path))
    for number, row in enumerate(read_parquet(path, [column]), start=1):
        yield row[column], f"{path}:{number}"


def _comma_separated(path: Path, column: str) -> Iterator[Row]:
    """A header, then rows as wide as it: a cell that holds a comma unquoted would shift the text into another column."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        _check_column(str(path), column, header)
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if len(cells) != len(header) and cells:
                raise UserError(f"{where}: {len(cells)} columns, the header has {len(header)}; quote a cell that holds a comma")
            if cells:
                yield cells[header.index(column)], where
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _arrow(path: Path, column: str) -> Iterator[Row]:
    from datasets import Dataset

    try:
        dataset = Dataset.from_file(str(path))
    except Exception as error:  # pyarrow's errors, and datasets' own
        raise UserError(f"{path}: `datasets` cannot read this file: {first_line(error)}") from error
    yield from _dataset_rows(dataset, column, str(path))


def _saved_dataset(path: Path, column: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # a damaged folder fails in json, pyarrow or datasets itself
        raise UserError(f"{path}: `datasets` cannot read this folder: {first_line(error)}") from error
    splits = loaded.items() if isinstance(loaded, DatasetDict) else [("", loaded)]
    for split, dataset in splits:
        yield from _dataset_rows(dataset, column, str(path / split) if split else str(path))


def _dataset_rows(dataset: Any, column: str, where: str) -> Iterator[Row]:
    _check_column(where, column, dataset.column_names)
    try:
        dataset.data.table.validate(full=True)  # offsets that lead out of the file end the process when they are followed
    except Exception as error:  # pyarrow's, and Python's where a text is no UTF-8
        raise UserError(f"{where}: `datasets` cannot read this: {first_line(error)}") from error
    plain = dataset.with_format(None)  # a saved folder may say that rows have other columns, or are of other types
    for number, row in enumerate(plain.select_columns([column]), start=1):
        yield row[column], f"{where}:{number}"


def _check_column(where: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        there = ", ".join(columns) or "none"
        remedy = "choose one with --text_column (cpt: --corpus.text_column)"
        raise UserError(f"{where}: no column '{column}'; the columns are: {there}; {remedy}")


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".txt": _text_file,
    ".csv": _comma_separated,
    ".json": _json,
    ".arrow": _arrow,
}
