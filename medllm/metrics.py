"""``metrics.jsonl`` of a run, a line for each logged step, and the TensorBoard events of the same values."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medllm.errors import UserError
from medllm.host.processes import is_primary_process, tell

METRICS = "metrics.jsonl"
_EVENTS = "events"
_COMPARED = 20


class Metrics:
    """The log of a run; each step is in it once, however often the run was ended and went on.

    A last line that is torn, as a kill leaves it, does not count.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path):
        self._file = folder / METRICS
        self._events_folder = folder / _EVENTS
        self._events: Any = None
        self._watch = Watch()

    def lines(self) -> list[dict[str, float]]:
        """Those logged so far.

        Raises:
            UserError: one that is none.
        """
        found = []
        for number, text in enumerate(self._whole_lines(), 1):
            try:
                found.append(json.loads(text))
            except ValueError as error:
                raise UserError(f"{self._file}:{number}: is no line of metrics ({error}); take it out") from error
        return found

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line, and tell of what is odd in it."""
        line = {"step": step, **values}
        if self._events is None and self._file.exists():
            os.truncate(self._file, sum(map(len, self._whole_lines())))
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._events is None:
            self._events = _summary_writer(self._events_folder)
        self._to_events(line)
        self._watch(step, values)

    def forget_after(self, step: int) -> None:
        """Drop the lines beyond ``step``: those steps are taken anew. The events are written anew from the lines that stay."""
        kept = [line for line in self.lines() if line["step"] <= step]
        if not is_primary_process() or not self._file.exists():
            return
        scratch = self._file.with_name(f".{METRICS}.{os.getpid()}.part")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(scratch, self._file)
        self.close()
        shutil.rmtree(self._events_folder, ignore_errors=True)
        self._events = _summary_writer(self._events_folder)
        for line in kept:
            self._to_events(line)

    def close(self) -> None:
        """Close the file of events."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _whole_lines(self) -> list[bytes]:
        texts = self._file.read_bytes().splitlines(keepends=True) if self._file.exists() else []
        return texts if not texts or texts[-1].endswith(b"\n") else texts[:-1]

    def _to_events(self, line: Mapping[str, float]) -> None:
        for name, value in line.items():
            if name != "step":
                self._events.add_scalar(name, value, line["step"])


class Watch:
    """Looks at each line of a training, and tells once of each thing that often means it goes wrong."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_COMPARED)
        self._told: set[str] = set()

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """A line."""
        if values.get("grad_norm") == 0:
            self._tell(
                "gradient", f"step {step}: the gradient's norm is exactly 0, so nothing is learned; see the learning rate"
            )
        loss = values.get("loss")
        if loss is None:
            return
        if len(self._losses) == _COMPARED:
            low, high = min(self._losses), max(self._losses)
            if loss > high + 3 * (high - low):
                said = f"between {low:.4g} and {high:.4g}"
                self._tell("loss", f"step {step}: the loss is {loss:.4g}, and was {said} in the {_COMPARED} lines before")
        self._losses.append(loss)

    def _tell(self, what: str, line: str) -> None:
        if what not in self._told:
            self._told.add(what)
            tell(line)


def _summary_writer(folder: Path) -> Any:
    """tensorboardX's writer. Where torch is installed it imports it for a type's name alone, 190 MB."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails, and tensorboardX does without
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(folder))
