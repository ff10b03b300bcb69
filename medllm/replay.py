"""A batch whose numbers were not finite: kept by the run that met it, and computed alone.

A run keeps the arrays of all micro-batches of such a step, as its engine had them, in ``RUN/not_finite``: one safetensors file
whose header says in JSON which step it was, of what data, and what was not finite. ``medllm replay`` computes it again, tensor
by tensor in the order of the computation, with the adapter of the newest checkpoint before that step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medllm.errors import UserError
from medllm.host.processes import is_primary_process
from medllm.run import NOT_FINITE, atomic_path

_KEPT = 8
"""Batches that a run keeps: the first, which the others mostly come from."""
_ABOUT = "medllm"

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """A micro-batch: its number in the step, from 1, the documents or problems it is of, and whether it was finite."""

    number: int
    named: str
    finite: bool


@dataclass(frozen=True)
class Batch:
    """The micro-batches of a step.

    Attributes:
        stage: ``cpt`` or ``rpo``.
        engine: Whose arrays they are.
        step: Which optimizer step, from 1.
        said: What the run said of it.
        parts: Its micro-batches.
        arrays: Theirs, as that engine's loss takes them, by name.
    """

    stage: str
    engine: str
    step: int
    said: str
    parts: Sequence[Part]
    arrays: Sequence[Arrays]

    def keep(self, run: Path) -> Path | None:
        """Write it into a run's folder, by the primary process; where it is, or None where enough are kept."""
        folder = run / NOT_FINITE
        file = folder / f"step-{self.step}.safetensors"
        if not file.exists() and len([*folder.glob("step-*.safetensors")]) >= _KEPT:
            return None
        if is_primary_process():
            about = {name: value for name, value in asdict(self).items() if name != "arrays"}
            named = zip(self.parts, self.arrays, strict=True)
            tensors = {
                f"{part.number}.{name}": np.asarray(array, order="C") for part, of in named for name, array in of.items()
            }
            with atomic_path(file) as scratch:
                save_file(tensors, scratch, metadata={_ABOUT: json.dumps(about, ensure_ascii=False)})
        return file


def read_batch(file: Path) -> Batch:
    """Read a batch that a run kept.

    Raises:
        UserError: there is no such file, or it holds none.
    """
    try:
        with safe_open(str(file), framework="numpy") as stream:
            about = json.loads((stream.metadata() or {})[_ABOUT])
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - it is no mapping
        parts = [Part(int(part["number"]), str(part["named"]), bool(part["finite"])) for part in about["parts"]]
        arrays = [
            {name.removeprefix(f"{part.number}."): one for name, one in tensors.items() if name.startswith(f"{part.number}.")}
            for part in parts
        ]
        step = int(about["step"])
        return Batch(str(about["stage"]), str(about["engine"]), step, str(about["said"]), parts, arrays)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{file}: is no batch that a run kept ({reason}); one lies in RUN/{NOT_FINITE}") from error


def first_batch(run: Path) -> Path:
    """The file of the first such step of a run.

    Raises:
        UserError: it has kept none.
    """
    found = {
        int(number): file
        for file in (run / NOT_FINITE).glob("step-*.safetensors")
        if (number := file.stem.removeprefix("step-")).isdecimal()
    }
    if not found:
        raise UserError(f"{run}: has kept no batch whose numbers were not finite; name the file of one (--batch)")
    return found[min(found)]


def adapter_words(done: int, step: int) -> str:
    """With which adapter a step is computed again: that after ``done`` steps."""
    source = f"the checkpoint of step {done:,}" if done else "fresh, as no checkpoint before it is there"
    late = step - 1 - done
    apart = f"; {late:,} steps were taken after it, whose adapter is not kept" if late else ""
    return f"adapter: {source}{apart}"


@dataclass(frozen=True)
class Reading:
    """A tensor of a computation.

    Attributes:
        what: Which: ``attention output``, or ``gradient of mlp.up_proj.lora_B``.
        layer: Of which layer, from 0; None outside of them.
        largest: The largest magnitude among its finite numbers.
        wrong: How many of its numbers are not finite.
    """

    what: str
    layer: int | None
    largest: float
    wrong: int = 0

    @property
    def words(self) -> str:
        """Where it is."""
        return self.what if self.layer is None else f"layer {self.layer}: {self.what}"


@dataclass(frozen=True)
class Replay:
    """A micro-batch, computed alone.

    Attributes:
        part: Which.
        loss: Its loss.
        gradient_norm: Of its gradient.
        readings: Its tensors in the order in which they were computed, forwards and then backwards.
    """

    part: Part
    loss: float
    gradient_norm: float
    readings: Sequence[Reading]

    @property
    def first(self) -> Reading | None:
        """The first tensor with a number that is not finite."""
        return next((reading for reading in self.readings if reading.wrong), None)

    @property
    def finite(self) -> bool:
        """Whether all of it is."""
        return self.first is None and math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    def verdict(self) -> str:
        """What was found, in words."""
        if self.first is not None:
            return f"first not finite: {self.first.words}, {self.first.wrong:,} numbers of it"
        if not math.isfinite(self.loss):
            return "every tensor is finite, and the loss is not"
        if not math.isfinite(self.gradient_norm):
            return "every tensor is finite, and the gradient too large for its norm to be"
        return "all of it is finite"

    def to_json(self) -> dict[str, Any]:
        """All of it, in JSON's types: NaN and infinities as words."""
        numbers = {"loss": _number(self.loss), "gradient_norm": _number(self.gradient_norm)}
        first = asdict(self.first) if self.first else None
        return {**asdict(self.part), "first": first, **numbers, "readings": [asdict(reading) for reading in self.readings]}


_COLUMNS = {
    "attention": "attention output",
    "o_proj": "o_proj output",
    "MLP": "activation product",
    "down_proj": "down",
    "hidden state": "layer output",
    "its gradient": "gradient of layer output",
}
"""Column of the table → the tensor of a layer that it shows."""
_ADAPTER = "adapter's gradient"


def table(replay: Replay) -> Iterator[str]:
    """Lines of the largest finite magnitudes, a row a layer, then what is outside of them; ``!`` where one is not finite."""
    layers: dict[int, dict[str, Reading]] = {}
    for reading in replay.readings:
        if reading.layer is not None:
            layers.setdefault(reading.layer, {})[reading.what] = reading
    names = [*_COLUMNS, _ADAPTER]
    yield "layer " + "".join(f"{name:>20}" for name in names)
    for layer, found in sorted(layers.items()):
        shown = [found.get(what) for what in _COLUMNS.values()]
        of_adapter = [one for what, one in found.items() if what.startswith("gradient of ") and one not in shown]
        shown.append(max(of_adapter, key=lambda one: (one.wrong, one.largest), default=None))
        yield f"{layer:<6}" + "".join(f"{_magnitude(one):>20}" for one in shown)
    for reading in replay.readings:
        if reading.layer is None:
            yield f"{reading.what}: {_magnitude(reading)}"


def _magnitude(reading: Reading | None) -> str:
    if reading is None:
        return "–"
    largest = f"{reading.largest:.3g}" if reading.largest or not reading.wrong else ""
    return f"{'!' if reading.wrong else ''}{largest}"


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
