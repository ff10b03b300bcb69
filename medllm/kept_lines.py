"""Lines of JSON that are kept as they come: on the disk before the next ones are asked for, and read again after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from medllm.errors import UserError
from medllm.host.processes import is_primary_process


def read_lines(path: Path, take: Callable[[Any], None]) -> None:
    """Give each line's value to ``take``, which may refuse it. A last line that is torn, as a kill leaves it, is taken off.

    Raises:
        UserError: a line that is none, and is not the last.
    """
    whole = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                if lines.read(1):
                    raise UserError(
                        f"{path}:{number}: is no line of a journal ({error}); take it out, its answer is asked for again"
                    ) from error
                break
            whole += len(line)
    if is_primary_process() and whole < path.stat().st_size:
        os.truncate(path, whole)


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows that came together, by the first of several processes, and wait until they are on the disk.

    Raises:
        UserError: the file cannot be written.
    """
    data = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    if not data or not is_primary_process():
        return
    try:
        _append(path, data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room, then go on") from error


def _append(path: Path, data: bytes) -> None:
    is_new = not path.exists()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    finally:
        os.close(file)
    if is_new:  # its name is on the disk only with its folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
