"""Files of rows: JSON lines, JSON arrays, CSV with or without a header, Parquet."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medllm.errors import UserError
from medllm.text_files import first_line, parse_json, read_text, text_lines

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
NO_HEADER = ("question", "A", "B", "C", "D", "answer")
"""What the columns of a CSV without a header are called: JMMLU's."""

BAD = "\0unreadable"
"""Field of a row that could not be read, where such rows are to be skipped: what is wrong with it."""

csv.field_size_limit(2**31 - 1)


def read_json_lines(file: Path, *, skip_bad: bool = False) -> Iterator[tuple[dict[str, Any], str]]:
    """(object, ``file:line``) of every line that is not blank.

    Args:
        file: The file.
        skip_bad: A line that is none gives a row that says so (:data:`BAD`).

    Raises:
        UserError: a line that is not a JSON object.
    """
    for number, line in enumerate(text_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = parse_json(line, where, "expected a JSON object a line")
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        except UserError as error:
            if not skip_bad:
                raise
            row = {BAD: str(error)}
        yield row, where


def read_json(file: Path) -> Any:
    """The value in a JSON file; of JSON lines, which some name so too, a list.

    Raises:
        UserError: it holds neither.
    """
    try:
        return parse_json(read_text(file), str(file), "expected JSON")
    except UserError as error:
        if getattr(error.__cause__, "msg", "") != "Extra data":
            raise
    return [row for row, _ in read_json_lines(file)]


def read_parquet(file: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, or some of their columns; a batch is in memory at a time.

    Raises:
        UserError: it cannot be read, or a small file unfolds to what is more than texts ever shrink by.
    """
    with _parquet(file) as opened:
        held, described = 0, opened.metadata
        most = max(_UNFOLDED, _TIMES_SMALLER * file.stat().st_size)
        groups = [described.row_group(index).total_byte_size for index in range(described.num_row_groups)]
        _check_unfolded(file, max(sum(groups), _ROW * described.num_rows), most)
        count = max(1, min(_BATCH, most // max([*groups, 1])))  # a cell may be all that its group holds
        for batch in opened.iter_batches(batch_size=count, columns=columns):
            _check_unfolded(file, held + batch.nbytes, most)
            rows = batch.to_pylist()
            held += _characters(rows)  # of a text that all rows share, Arrow holds one and Python as many as there are rows
            _check_unfolded(file, held, most)
            yield from rows


def _check_unfolded(file: Path, held: int, most: int) -> None:
    if held > most:
        raise UserError(
            f"{file}: unfolds to more than {most >> 20} MiB, {held // file.stat().st_size} times its size; no texts do"
        )


def _characters(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, inside))


_UNFOLDED = 1 << 26
_TIMES_SMALLER = 200  # text shrinks to a tenth, to a fiftieth where it repeats itself
_ROW = 100  # bytes of a row without anything in it, in Python
_BATCH = 4096


def parquet_columns(file: Path) -> list[str]:
    """The columns of a Parquet file.

    Raises:
        UserError: it cannot be read.
    """
    with _parquet(file) as opened:
        return opened.schema_arrow.names


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield pq.ParquetFile(file)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: not a readable Parquet file: {first_line(error)}") from error


Rows = list[tuple[dict[str, Any], str]]


def read_rows(file: Path, *, must: bool = True, skip_bad: bool = False) -> Rows:
    """(row, ``file:line``) of every row of a file.

    Args:
        file: With one of :data:`SUFFIXES`.
        must: It has to hold rows; else one that holds something else gives none.
        skip_bad: A line that cannot be read gives a row that says so (:data:`BAD`).

    Raises:
        UserError: it cannot be read, or holds something else than rows.
    """
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        return list(read_json_lines(file, skip_bad=skip_bad))
    if suffix == ".csv":
        return list(_csv_rows(file, must=must, skip_bad=skip_bad))
    if suffix == ".parquet":
        return [(row, f"{file}: row {number}") for number, row in enumerate(read_parquet(file), 1)]
    try:
        value = read_json(file)
    except UserError:
        if must:
            raise
        return []
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return [(row, f"{file}: row {number}") for number, row in enumerate(value, start=1)]
    if must:
        raise UserError(f"{file}: expected a list of JSON objects, found {type(value).__name__}")
    return []


def _csv_rows(file: Path, *, must: bool, skip_bad: bool) -> Iterator[tuple[dict[str, Any], str]]:
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    names: list[str] = []
    line = 1
    for number in itertools.count(1):
        where = f"{file}:{line}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if names and names != list(NO_HEADER):
                yield dict.fromkeys(names), where  # the file ends inside a row
                return
            raise UserError(f"{where}: not CSV ({error}); expected {','.join(NO_HEADER)}") from error
        if cells is None:
            return
        line = reader.line_num + 1
        if not cells:
            continue
        if number == 1 and len({cell.strip().lower() for cell in cells} & {"question", "answer", "problem_text", "tag"}) > 1:
            names = [cell.strip() for cell in cells]
            continue
        names = names or list(NO_HEADER)
        if len(cells) != len(names):
            if not must and number == 1:
                return
            expected = f"{len(names)} columns ({','.join(names)})"
            said = f"{where}: {len(cells)} columns, expected {expected}; quote a cell that holds a comma"
            if not skip_bad:
                raise UserError(said)
            yield {BAD: said}, where
            continue
        yield {name: cell.strip() for name, cell in zip(names, cells, strict=True)}, where
