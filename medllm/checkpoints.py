"""Which checkpoints of a run are whole: a file in each, written last, holds a checksum of every other.

A checkpoint without it was being written when its process ended. One whose files are not what the checksums were taken of was
damaged since. Either engine writes checkpoints in its own format, and both take and check the sums here.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from medllm.config import TrainingConfig
from medllm.errors import UserError
from medllm.host.processes import tell
from medllm.host.progress import Clock


class Saving:
    """When a checkpoint is due, but for the last one: by steps, or by minutes since the last.

    Args:
        training: The loop's settings.
        clock: Seconds that never go back.
    """

    def __init__(self, training: TrainingConfig, clock: Clock = time.monotonic):
        self._training = training
        self._clock = clock
        self._last = clock()

    @property
    def timed(self) -> bool:
        """Whether time plays a part."""
        return self._training.checkpoint_minutes > 0

    def by_steps(self, done: int) -> bool:
        """Whether one is due after so many steps."""
        every = self._training.checkpoint_every
        return bool(every) and done % every == 0

    def by_time(self) -> bool:
        """Whether one is due now."""
        return self.timed and self._clock() - self._last >= 60 * self._training.checkpoint_minutes

    def saved(self) -> None:
        """One was begun."""
        self._last = self._clock()


def surplus(steps: Iterable[int], keep: int, keep_every: int) -> list[int]:
    """Of checkpoints of these steps those that go: neither among the ``keep`` latest nor multiples of ``keep_every``."""
    older = sorted(steps)[:-keep]
    return [step for step in older if not keep_every or step % keep_every]


CHECKSUMS = "checksums.json"
"""Of a checkpoint's files, BLAKE2b, by path."""


def seal(checkpoint: Path, leave_out: Collection[str] = ()) -> None:
    """Declare a checkpoint whole: write the checksums of its files, but for those named in ``leave_out``."""
    sums = dict(_sums(checkpoint, [path for path in _files(checkpoint) if path not in leave_out]))
    scratch = checkpoint / f".{CHECKSUMS}.part"
    with scratch.open("w", encoding="utf-8") as stream:
        json.dump(sums, stream, indent=0)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, checkpoint / CHECKSUMS)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that was sealed: a file, and what became of it. None where nothing is."""
    try:
        expected = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        if not isinstance(expected, dict) or not expected:
            raise ValueError("no sums")
        missing = [path for path in expected if not (checkpoint / path).is_file()]
        if missing:
            return f"{missing[0]} is gone"
        changed = [path for path, found in _sums(checkpoint, expected) if found != expected[path]]
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} or a file it names cannot be read ({type(error).__name__})"
    return f"{changed[0]} is not what was written" if changed else None


@dataclass(frozen=True)
class Search:
    """What was found among the checkpoints of a run.

    Attributes:
        newest: The newest whole one; None where there was none to begin with.
        useless: Those after it, half-written or damaged, which are in the way of the steps that are taken anew.
    """

    newest: Path | None
    useless: Sequence[Path]


def newest_whole(checkpoints: Iterable[Path]) -> Search:
    """Look for the newest whole checkpoint, and say which damaged ones were passed over.

    Args:
        checkpoints: Their folders, the newest first.

    Raises:
        UserError: there are some, and all that were finished are damaged, or several have no checksums.
    """
    useless: list[Path] = []
    damaged = ""
    for checkpoint in checkpoints:
        if not (checkpoint / CHECKSUMS).exists():
            useless.append(checkpoint)
            continue
        flaw = damage(checkpoint)
        if flaw is None:
            return Search(checkpoint, useless)
        damaged = f"{checkpoint}: is damaged, {flaw}"
        tell(f"{damaged}; looking for the one before")
        useless.append(checkpoint)
    if damaged:
        raise UserError(f"{damaged}, and no checkpoint before it is whole; restore the folder, or start a new --run")
    if len(useless) > 1:  # a kill leaves one half-written at the most
        raise UserError(
            f"{useless[0]}: has no {CHECKSUMS}, and those before it neither: they are of a version that wrote none; "
            "start a new --run"
        )
    return Search(None, useless)


def _files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if path != CHECKSUMS)


def _sums(folder: Path, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    def digest(path: str) -> tuple[str, str]:
        with (folder / path).open("rb") as stream:
            return path, hashlib.file_digest(stream, "blake2b").hexdigest()

    with ThreadPoolExecutor() as threads:
        yield from threads.map(digest, paths)
