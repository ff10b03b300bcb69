"""One damaged file at a time: what reads it must read it, or refuse it in a line."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import ArgumentError

from medllm.errors import UserError
from tests.fuzz.formats import FORMATS
from tests.fuzz.mutations import damaged_bytes

SECONDS = 10
READ, REFUSED = "read", "refused"


class TooSlow(BaseException):
    """A file took longer than anybody waits for one line."""


@dataclass
class Outcome:
    """What became of the damaged files of a format.

    Attributes:
        read: How many were read all the same.
        refused: How many were refused in a line.
        uncaught: Number of the input and the error, of those that ended otherwise.
        slowest: Processor seconds of the slowest.
    """

    read: int = 0
    refused: int = 0
    uncaught: list[tuple[int, str]] = field(default_factory=list)
    slowest: float = 0.0

    @property
    def kinds(self) -> Counter[str]:
        """How often each error was."""
        return Counter(error for _, error in self.uncaught)


def damage(name: str, number: int, good: bytes) -> bytes:
    """The damaged file of that number, always the same."""
    rng = random.Random(f"{name}:{number}")
    return rng.choice((damaged_bytes, *FORMATS[name].damages * 2))(good, rng)


def outcome(name: str, numbers: range, *, whole: bool = False) -> Outcome:
    """Damage a format's file once for each number, and read it; ``whole`` does all that its command does with it."""
    kind, found = FORMATS[name], Outcome()
    read = (kind.whole if whole else None) or kind.read
    with tempfile.TemporaryDirectory() as folder:
        kind.example(Path(folder))
        file = Path(folder) / kind.file
        good = file.read_bytes()
        assert read_one(read, Path(folder)) == (REFUSED if kind.refused else READ), f"a good file of {name}"
        for number in numbers:
            file.unlink()  # what an earlier reader has mapped into memory stays as it was
            file.write_bytes(damage(name, number, good))
            began = time.process_time()
            became = read_one(read, Path(folder))
            found.slowest = max(found.slowest, time.process_time() - began)
            found.read += became == READ
            found.refused += became == REFUSED
            if became not in (READ, REFUSED):
                found.uncaught.append((number, became))
    return found


def read_one(read: Callable[[Path], object], folder: Path) -> str:
    """What becomes of the file in ``folder``: :data:`READ`, :data:`REFUSED` in a line, or the error it ended in."""
    try:
        with _limit(SECONDS):
            read(folder)
        return READ
    except (UserError, ArgumentError) as error:
        return REFUSED if str(error).strip() else "an empty line"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what is looked for is whatever else there is
        return _words(error)


def _words(error: BaseException) -> str:
    frame = error.__traceback__
    where = ""
    while frame:
        file = frame.tb_frame.f_code.co_filename
        if "/tests/" not in file and "site-packages" not in file and "/lib/python" not in file:
            where = f"{Path(file).name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return f"{type(error).__name__} in {where}: {str(error)[:60]}"


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)  # by the processor's seconds: what else the machine does is not the reader's
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
