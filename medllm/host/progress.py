"""How far a work has come: a bar on a terminal, and elsewhere, as under ``sbatch`` or ``nohup``, a line every minute."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from medllm.host.memory import memory_words
from medllm.host.processes import is_primary_process, tell

T = TypeVar("T")

Clock = Callable[[], float]
"""Seconds from an arbitrary beginning, which never go back: no rate by it is negative, whatever the machine's date does."""

LINE_SECONDS = 60.0
"""Between two lines where there is no terminal."""
_REDRAWN = 0.5
"""Seconds between two looks at how much memory there is in use."""


Say = Callable[[str], None]
"""Told a line of text."""


class Progress(Protocol):
    """Is told of a work how much is done."""

    def __call__(self, done: int, total: int, doing: str = "") -> None:
        """So many of so many are ``done``; ``doing`` says what comes next, or how it goes."""


class Pace:
    """Units a second over the last ``seconds`` of work, and over two marks at the least: never over a single moment."""

    def __init__(self, seconds: float = LINE_SECONDS):
        self._span = seconds
        self._marks: deque[tuple[float, float]] = deque()

    def mark(self, seconds: float, units: float) -> None:
        """By this time so many units were done, by a clock that never goes back."""
        self._marks.append((seconds, units))
        while len(self._marks) > 2 and seconds - self._marks[1][0] >= self._span:
            self._marks.popleft()

    @property
    def rate(self) -> float:
        """Units a second; 0 where nothing is known yet."""
        if len(self._marks) < 2:
            return 0.0
        (began, before), (ended, after) = self._marks[0], self._marks[-1]
        return (after - before) / max(ended - began, 1e-9)


def on_terminal() -> bool:
    """Whether somebody watches standard error: the one place where that is decided. As rich sees it, by ``FORCE_COLOR`` too."""
    from rich.console import Console

    return Console(stderr=True).is_terminal


@contextmanager
def progress_bar(label: str, unit: str = "", clock: Clock = time.monotonic) -> Iterator[Progress]:
    """A progress bar on standard error, of one process; where nobody watches, a line every :data:`LINE_SECONDS`.

    Args:
        label: What the work is.
        unit: What it is counted in.
        clock: By which lines come.
    """
    if not on_terminal():
        yield _Lines(label, unit, clock)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    text, count = TextColumn("{task.description}"), MofNCompleteColumn()
    columns = (text, BarColumn(bar_width=14), count, TaskProgressColumn(), TimeRemainingColumn(), TimeElapsedColumn())
    to_screen = sys.stdout.isatty()  # else what is printed meanwhile would go where the bar is
    # A step may take minutes: rich's own 30 seconds would hold one mark, and no rate.
    bar = Bar(*columns, console=Console(stderr=True), transient=True, redirect_stdout=to_screen, speed_estimate_period=3600)
    with bar:
        task, looked, memory, pace = bar.add_task(label, total=None), -math.inf, "", Pace()

        def report(done: int, total: int, doing: str = "") -> None:
            nonlocal looked, memory
            pace.mark(clock(), done)
            if not is_primary_process():  # which is known once the engine is open
                bar.stop()
                return
            if clock() - looked > _REDRAWN:
                looked, memory = clock(), memory_words()
            said = ", ".join(filter(None, (doing or rate_words(pace.rate, unit), memory)))
            bar.update(task, completed=done, total=total, description=f"{label}: {said}")

        yield report


class _Lines:
    """A line every minute: what is done of what, how it goes, memory, and the time that is left by the last ten minutes."""

    def __init__(self, label: str, unit: str, clock: Clock):
        self._label, self._unit, self._clock = label, unit, clock
        self._told = clock()
        self._pace = Pace(10 * LINE_SECONDS)

    def __call__(self, done: int, total: int, doing: str = "") -> None:
        now = self._clock()
        self._pace.mark(now, done)
        if now - self._told < LINE_SECONDS:
            return
        self._told = now
        rate = self._pace.rate
        left = f"{duration((total - done) / rate)} left" if rate else ""
        count = f"{done:,} of {total:,} {self._unit}".rstrip()
        how = doing or rate_words(rate, self._unit)
        tell(f"{self._label}: {', '.join(filter(None, (count, how, memory_words(), left)))}")


def rate_words(rate: float, unit: str) -> str:
    """So many units a second: ``3,120 tokens/s``; nothing of a rate that is not known."""
    return f"{rate:{',.0f' if rate >= 100 else '.3g'}} {unit}/s" if rate and unit else ""


def duration(seconds: float) -> str:
    """Seconds in words of two parts at the most: ``45 s``, ``12 min``, ``2 h 10 min``, ``3 d 4 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if minutes < 100:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{days} d {hours % 24} h"


def tracked(items: Sequence[T], label: str, before: int = 0) -> Iterator[T]:
    """``items`` one after the other under a progress bar; of the work so many were done ``before``."""
    with progress_bar(label) as progress:
        for done, item in enumerate(items, before):
            progress(done, before + len(items))
            yield item


def part_of(progress: Progress | None, before: int, count: int, whole: int) -> Progress | None:
    """Progress within a part of a work: of the ``whole``'s units ``before`` are done, and ``count`` are worked on."""
    if progress is None:
        return None

    def within(done: int, total: int, doing: str = "") -> None:
        progress(before + done * count // total, whole, doing)

    return within
