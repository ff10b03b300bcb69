"""How far a work has come, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from medllm.host.processes import is_primary_process

T = TypeVar("T")


class Progress(Protocol):
    """Is told of a work how much is done."""

    def __call__(self, done: int, total: int, doing: str = "") -> None:
        """So many of so many are ``done``; ``doing`` says what comes next."""


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A progress bar on standard error, of one process; silent where nobody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(bar_width=14), TaskProgressColumn(), TimeRemainingColumn(), TimeElapsedColumn())
    to_screen = sys.stdout.isatty()  # else what is printed meanwhile would go where the bar is
    with Bar(*columns, console=console, transient=True, redirect_stdout=to_screen, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)

        def report(done: int, total: int, doing: str = "") -> None:
            if is_primary_process():  # which is known once the engine is open
                bar.update(task, completed=done, total=total, description=f"{label}: {doing}" if doing else label)
            else:
                bar.stop()

        yield report


def tracked(items: Sequence[T], label: str, before: int = 0) -> Iterator[T]:
    """``items`` one after the other under a progress bar; of the work so many were done ``before``."""
    with progress_bar(label) as progress:
        for done, item in enumerate(items, before):
            progress(done, before + len(items))
            yield item


def part_of(
    progress: Callable[[int, int], None] | None, before: int, count: int, total: int
) -> Callable[[int, int], None] | None:
    """Progress within a part of a work: of ``total`` units ``before`` are done, and ``count`` are worked on."""
    if progress is None:
        return None
    return lambda done, of: progress(before + done * count // of, total)
