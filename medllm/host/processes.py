"""This process among those of one launch: one of them writes files and prints, and an error in one of them ends all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType


@dataclass(frozen=True)
class Place:
    """The number of a process, and how many there are."""

    index: int
    count: int


_place: Place | None = None
_announces = ContextVar("announces", default=True)


def take_place(place: Place) -> None:
    """Say where this process stands. The JAX engine does, which finds out by itself; torch's launchers use the environment."""
    global _place
    if place.count > 1 and _place is None:
        shown = sys.excepthook

        def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            shown(kind, error, trace)
            ended(1)

        sys.excepthook = leave
    _place = place


def is_primary_process() -> bool:
    """True in the one process of a launch (torchrun, accelerate, several processes of JAX) that writes files and prints."""
    return process_index() == 0


def process_index() -> int:
    """The number of this process in its launch, from 0."""
    return int(os.environ.get("RANK", "0")) if _place is None else _place.index


def process_count() -> int:
    """How many processes this launch has."""
    return int(os.environ.get("WORLD_SIZE", "1")) if _place is None else _place.count


def tell(line: str) -> None:
    """A line on standard error, of one process of several."""
    if is_primary_process():
        print(f"medllm: {line}", file=sys.stderr, flush=True)


def preface(line: str) -> None:
    """:func:`tell`, of what a stage is about to do; not within :func:`unannounced`."""
    if _announces.get():
        tell(line)


@contextmanager
def unannounced() -> Iterator[None]:
    """Inside, stages do not say what they are about to do: whoever runs several of them does."""
    before = _announces.set(False)
    try:
        yield
    finally:
        _announces.reset(before)


def ended(code: int) -> int:
    """The exit code of a program that failed: ``code``. One of several processes of JAX does not return from here.

    At a usual exit it would wait for the others, and these wait for it in the middle of their work. Gone at once, it is missed
    within a heartbeat.
    """
    if _place is not None and _place.count > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
