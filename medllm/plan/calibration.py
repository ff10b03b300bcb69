r"""From the least time of a step to the time it takes: a plan's roofline, corrected by what a device was seen to need.

A probe runs two models of a few layers each. A step's work is linear in the number of layers, so the two say what a layer
takes, and what the rest takes (the head, the embedding, the update). Each of the two is held against its own roofline at the
rates that the device was measured to have,

.. math:: r = \max(\text{operations} / \text{matrix rate}, \text{bytes} / \text{copy rate}), \qquad k = \text{measured} / r,

and a plan is predicted to need :math:`k_\text{layers} r_\text{layers} + k_\text{rest} r_\text{rest}`, and what it sends between
devices at their peak rate. With the layers that were probed that is the straight line through the two measurements, whatever
the rates; with others it supposes that they fall short of their roofline by the same factor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medllm.errors import UserError

FORMAT = "medllm calibration 1"


@dataclass(frozen=True)
class Work:
    """What a device does in a step of a model of ``layers``: ``flops`` of matrix products, ``bytes`` of memory traffic."""

    layers: int
    flops: float
    bytes: float


@dataclass(frozen=True)
class Probe:
    """A step that was run: its work, and the seconds it took (``step_s``)."""

    work: Work
    step_s: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step: all layers, the rest, and what devices send each other (at peak rate; not calibrated)."""

    layers_s: float
    rest_s: float
    interconnect_s: float

    @property
    def step_s(self) -> float:
        """Of the whole step, nothing hidden behind anything."""
        return self.layers_s + self.rest_s + self.interconnect_s


@dataclass(frozen=True)
class Calibration:
    """What was measured of a device.

    Attributes:
        device: As ``--target`` names it.
        hardware: As it names itself.
        stage: ``cpt`` or ``rpo``.
        quantization: Of the base weights.
        model: Whose layers were run.
        settings: Of the stage.
        matrix_flops: Operations a second, of the products of a layer in the layouts of a step.
        copy_bytes: Bytes a second of a copy, read and written.
        shallow: The step of the model with fewer layers.
        deep: With more.
        versions: Of what compiled and ran it.
        measured: When.
    """

    device: str
    hardware: str
    stage: str
    quantization: str
    model: str
    settings: dict[str, Any]
    matrix_flops: float
    copy_bytes: float
    shallow: Probe
    deep: Probe
    versions: dict[str, str]
    measured: str

    def __post_init__(self) -> None:
        if self.deep.work.layers <= self.shallow.work.layers or self.deep.step_s <= self.shallow.step_s:
            took = " and ".join(f"{probe.step_s:.3g} s for {probe.work.layers} layers" for probe in (self.shallow, self.deep))
            raise UserError(f"the probe took {took}, which says nothing of a layer; is the device busy? calibrate again")

    def least(self, flops: float, moved: float) -> float:
        """Seconds of so many operations and bytes at the measured rates: whichever takes longer."""
        return max(flops / self.matrix_flops, moved / self.copy_bytes)

    @property
    def layer_s(self) -> float:
        """Measured seconds of one layer."""
        return (self.deep.step_s - self.rest_s) / self.deep.work.layers

    @property
    def rest_s(self) -> float:
        """Measured seconds of everything but the layers; not below nothing, as noise would have it."""
        shallow, deep = self.shallow, self.deep
        slope = (deep.step_s - shallow.step_s) / (deep.work.layers - shallow.work.layers)
        return max(0.0, deep.step_s - slope * deep.work.layers)

    @property
    def layer_factor(self) -> float:
        """By how much a layer's measured time is its roofline."""
        return self.layer_s / self.least(*_parts(self.shallow.work, self.deep.work)[0])

    @property
    def rest_factor(self) -> float:
        """By how much the measured time of the rest is its roofline."""
        least = self.least(*_parts(self.shallow.work, self.deep.work)[1])
        return self.rest_s / least if least else 0.0

    def predict(self, one: Work, other: Work, interconnect_s: float = 0.0) -> Prediction:
        """The time of the step that does the work ``one``; ``other`` is its work with another number of layers."""
        layer, rest = _parts(*sorted((one, other), key=lambda work: work.layers))
        return Prediction(
            one.layers * self.layer_factor * self.least(*layer), self.rest_factor * self.least(*rest), interconnect_s
        )

    def check(self, device: str, count: int, stage: str, quantization: str, hardware: str | None) -> None:
        """Refuse a plan that this says nothing of.

        Args:
            device: Planned for, as ``--target`` names it.
            count: How many of them.
            stage: Planned.
            quantization: Of its base weights.
            hardware: What the device calls itself where it is this machine; None where it is not.

        Raises:
            UserError: it is of another kind of device, of another stage, or of weights held otherwise.
        """
        if device != self.device:
            raise UserError(
                f"the calibration is of {self.device} ({self.hardware}) and the plan for {device}; "
                f"calibrate on {device}, or plan for {self.device}"
            )
        if hardware is not None and hardware != self.hardware:
            raise UserError(f"the calibration is of {self.hardware} and this machine is {hardware}; calibrate here")
        if hardware is not None and count > 1:
            raise UserError(
                f"the calibration is of this machine whole and the plan for {count} parts of it, which share its cores; "
                f"plan for {device}:1"
            )
        for name, planned, probed in (("stage", stage, self.stage), ("quantization", quantization, self.quantization)):
            if planned != probed:
                raise UserError(f"the calibration is of --{name} {probed} and the plan of {planned}; calibrate with {planned}")

    @classmethod
    def read(cls, file: Path) -> Calibration:
        """As :meth:`write` wrote it.

        Raises:
            UserError: there is no such file, or it is no calibration.
        """
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--calibration {file}: {error.strerror}; write one with --calibrate {file}") from None
        except (ValueError, RecursionError):
            found = None
        try:
            if found["format"] != FORMAT:
                raise KeyError("format")
            probes = [Probe(Work(**probe["work"]), float(probe["step_s"])) for probe in (found["shallow"], found["deep"])]
            values = {name: found[name] for name in cls.__annotations__ if name not in ("shallow", "deep")}
            return cls(**values, shallow=probes[0], deep=probes[1])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"--calibration {file}: is not what medllm plan --calibrate writes ({FORMAT}); write it anew"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Everything measured, and what follows from it."""
        derived = {name: getattr(self, name) for name in ("layer_s", "layer_factor", "rest_s", "rest_factor")}
        return {"format": FORMAT, **asdict(self), "derived": derived}

    @classmethod
    def of_probe(
        cls, found: Mapping[str, Any], *, device: str, hardware: str, stage: str, model: str, settings: Mapping[str, Any]
    ) -> Calibration:
        """Of what :func:`jax_medllm.plan.probe.probe` found.

        Raises:
            UserError: the compiled program could not be read, or the deeper model was no slower.
        """
        if any(probe["bytes"] is None for probe in found["probes"]):
            raise UserError(
                f"this JAX cannot read the programs that it compiles for {hardware}; calibrate with another version"
            )
        shallow, deep = (
            Probe(Work(probe["layers"], probe["flops"], probe["bytes"]), probe["step_s"]) for probe in found["probes"]
        )
        return cls(
            device=device,
            hardware=hardware,
            stage=stage,
            quantization=settings["quantization"],
            model=model,
            settings=dict(settings),
            matrix_flops=found["matrix_flops"],
            copy_bytes=found["copy_bytes"],
            shallow=shallow,
            deep=deep,
            versions=dict(found["versions"]),
            measured=time.strftime("%Y-%m-%d"),
        )


def _parts(shallow: Work, deep: Work) -> tuple[tuple[float, float], tuple[float, float]]:
    """Operations and bytes of one layer, and of everything but the layers."""
    layers = deep.layers - shallow.layers
    flops, moved = (deep.flops - shallow.flops) / layers, (deep.bytes - shallow.bytes) / layers
    return (flops, moved), (max(0.0, deep.flops - deep.layers * flops), max(0.0, deep.bytes - deep.layers * moved))
