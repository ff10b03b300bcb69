"""``metrics.jsonl`` of a run, a line for each logged step, and the same values in a tracker."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from medllm.config import TrackerName
from medllm.errors import UserError
from medllm.host.processes import is_primary_process, tell
from medllm.host.scratch import scratch_path
from medllm.trackers import Tracker, open_tracker

METRICS = "metrics.jsonl"
_COMPARED = 20
_NO_MARGIN = 1e-3
"""Of rewards, below which chosen and rejected count as told apart by nothing: DPO's loss is then within 5e-4 of ln 2."""
_COLLAPSED = -1.0
"""Of the chosen reward: at beta 0.1 a response e^10 times less likely than under the reference."""


class Metrics:
    """The log of a run; each step is in it once, however often the run was ended and went on.

    A last line that is torn, as a kill leaves it, does not count.

    Args:
        folder: The run's.
        tracker: What shows them beside.
        settings: The run's, by dotted names, which it shows too.
    """

    def __init__(self, folder: Path, tracker: TrackerName = "tensorboard", settings: Mapping[str, Any] | None = None):
        self._file = folder / METRICS
        self._opened = partial(open_tracker, tracker, folder, settings or {})
        self._tracker: Tracker | None = None
        self._watch = Watch()

    def lines(self) -> list[dict[str, float]]:
        """Those logged so far.

        Raises:
            UserError: one that is none.
        """
        found = []
        for number, text in enumerate(self._whole_lines(), 1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self._file}:{number}: is no line of metrics ({error}); take it out") from error
            if not isinstance(line, dict) or type(line.get("step")) is not int or not all(map(_is_number, line.values())):
                raise UserError(f"{self._file}:{number}: is no line of metrics (numbers by name, and a step); take it out")
            found.append(line)
        return found

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line, and tell of what is odd in it."""
        line = {"step": step, **values}
        if self._tracker is None and self._file.exists():
            os.truncate(self._file, sum(map(len, self._whole_lines())))
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._tracker is None:
            self._tracker = self._opened()
        self._tracker.log(step, values)
        self._watch(step, values)

    def forget_after(self, step: int) -> None:
        """Drop the lines beyond ``step``: those steps are taken anew. The tracker is told anew of the lines that stay."""
        kept = [line for line in self.lines() if line["step"] <= step]
        if not is_primary_process() or not self._file.exists():
            return
        scratch = scratch_path(self._file)
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(scratch, self._file)
        self.close()
        self._tracker = self._opened(anew=True)
        for line in kept:
            self._tracker.log(int(line["step"]), {name: value for name, value in line.items() if name != "step"})

    def close(self) -> None:
        """Close the tracker."""
        tracker, self._tracker = self._tracker, None  # it is not closed again where this fails
        if tracker is not None:
            tracker.close()

    def _whole_lines(self) -> list[bytes]:
        texts = self._file.read_bytes().splitlines(keepends=True) if self._file.exists() else []
        return texts if not texts or texts[-1].endswith(b"\n") else texts[:-1]


class Watch:
    """Looks at each line of a training, and tells once of each thing that often means it goes wrong, with what to try."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_COMPARED)
        self._margins: deque[float] = deque(maxlen=_COMPARED)
        self._chosen: deque[float] = deque(maxlen=_COMPARED)
        self._learning_rate = 0.0
        self._told: set[str] = set()

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """A line."""
        if values.get("grad_norm") == 0:
            self._tell(
                "gradient", f"step {step}: the gradient's norm is exactly 0, so nothing is learned; see the learning rate"
            )
        if "loss" in values:
            self._spike(step, values["loss"])
        if "rewards/margins" in values:
            self._preferences(step, values)

    def _spike(self, step: int, loss: float) -> None:
        if len(self._losses) == _COMPARED:
            low, high = min(self._losses), max(self._losses)
            if loss > high + 3 * (high - low):
                said = f"between {low:.4g} and {high:.4g} in the {_COMPARED} lines before"
                self._tell(
                    "loss",
                    f"step {step}: the loss is {loss:.4g}, and was {said}; if it stays there, go back to a checkpoint before, "
                    "with a lower --optimizer.learning_rate or --optimizer.clip_norm",
                )
        self._losses.append(loss)

    def _preferences(self, step: int, values: Mapping[str, float]) -> None:
        """A margin of nothing is a DPO loss of ln 2. While the learning rate rises, that is as it should be."""
        rising = values.get("learning_rate", 0.0) > self._learning_rate
        self._learning_rate = values.get("learning_rate", 0.0)
        if not rising:
            self._margins.append(abs(values["rewards/margins"]))
        if len(self._margins) == _COMPARED and max(self._margins) < _NO_MARGIN:
            self._tell(
                "margins",
                f"step {step}: DPO's loss has been ln 2 for {_COMPARED} lines: chosen and rejected are as likely as before "
                "training; raise --optimizer.learning_rate, and see that they differ and that --lora.targets is what you meant",
            )
        self._chosen.append(values.get("rewards/chosen", 0.0))
        mean = sum(self._chosen) / len(self._chosen)
        if len(self._chosen) == _COMPARED and mean < _COLLAPSED:
            self._tell(
                "chosen",
                f"step {step}: chosen responses have become less likely: rewards/chosen is {mean:.3g} on average of "
                f"{_COMPARED} lines (times 1/--loss.beta: nats); raise --loss.alpha, or lower --optimizer.learning_rate",
            )

    def _tell(self, what: str, line: str) -> None:
        if what not in self._told:
            self._told.add(what)
            tell(line)


def _is_number(value: Any) -> bool:
    """Of a size that trackers take."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)
