"""What a plan found, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from medllm.architecture import Architecture
from medllm.plan.calibration import Calibration, Prediction
from medllm.plan.request import Request
from medllm.plan.targets import Target


@dataclass(frozen=True)
class Predicted:
    """The time of a step, and the calibration that says so."""

    step: Prediction
    calibration: Calibration

    def to_json(self, tokens_per_step: int) -> dict[str, Any]:
        """As ``medllm plan --json`` writes it."""
        by = self.calibration
        return {
            **asdict(self.step),
            "step_s": self.step.step_s,
            "tokens_per_s": tokens_per_step / self.step.step_s,
            **{
                name: getattr(by, name)
                for name in ("layer_factor", "rest_factor", "matrix_flops", "copy_bytes", "hardware", "measured")
            },
            "probed": f"{by.shallow.work.layers} and {by.deep.work.layers} layers of {by.model}",
        }


@dataclass(frozen=True)
class Plan:
    """What a stage takes on a target.

    Attributes:
        request: What was planned.
        target: The devices.
        model: The model's sizes.
        compiled: What the compiling process found (``jax_medllm.plan.compiled.measure``).
        predicted: The time of a step, where a calibration was given and the programs fit the compiler.
    """

    request: Request
    target: Target
    model: Architecture
    compiled: Mapping[str, Any]
    predicted: Predicted | None = None

    @property
    def refused(self) -> bool:
        """The compiler refused a program for its memory, and nothing more is known."""
        return not self.compiled["by_kind"]

    @property
    def gib_per_device(self) -> float:
        """What the programs need where they need most, or what a refused one would."""
        return self.compiled["refused_gib"] if self.refused else sum(self.compiled["by_kind"].values())

    @property
    def fits(self) -> bool:
        """Whether a device has that much."""
        return not self.refused and self.gib_per_device <= self.target.memory_gib

    @property
    def collectives(self) -> list[dict[str, Any]] | None:
        """What devices send each other, with the seconds it takes at peak rate; None where it is not known."""
        link = self.target.device.link_bytes
        sent = self.compiled.get("collectives")
        return None if sent is None else [{**one, "seconds": one["bytes"] / link} for one in sent]

    @property
    def seconds(self) -> dict[str, float]:
        """The least time of a step by what is known of it, each part with everything else beside it."""
        device = self.target.device
        seconds = {"compute": self.compiled["flops"] / device.flops}
        if (collectives := self.collectives) is not None:
            seconds["memory"] = self.compiled["bytes"] / device.memory_bytes
            seconds["interconnect"] = sum(one["seconds"] for one in collectives)
        return seconds

    def roofline(self) -> dict[str, Any]:
        """What takes longest, and what follows; nothing of a refused program."""
        if self.refused:
            return {}
        seconds = self.seconds
        bound = max(seconds, key=lambda what: seconds[what])
        rate = self.compiled["tokens_per_step"] / seconds[bound] if seconds[bound] else 0.0
        return {"seconds": seconds, "bound": bound, "step_s": seconds[bound], "tokens_per_s": rate}

    def to_json(self) -> dict[str, Any]:
        """As ``medllm plan --json`` writes it."""
        rates, found = self.target.device, {name: one for name, one in self.compiled.items() if name != "refused_gib"}
        return {
            "ok": self.fits,
            "fits": self.fits,
            **asked(self.request, self.target, self.model),
            "rules": self.request.rules,
            "settings": self.request.settings(),
            "gib_per_device": self.gib_per_device,
            "headroom_gib": self.target.memory_gib - self.gib_per_device,
            "rates": {name: getattr(rates, name) for name in ("flops", "memory_bytes", "link_bytes", "source")},
            **found,
            **({} if self.collectives is None else {"collectives": self.collectives}),
            **self.roofline(),
            **({"predicted": self.predicted.to_json(found["tokens_per_step"])} if self.predicted else {}),
        }


def asked(request: Request, target: Target, model: Architecture) -> dict[str, Any]:
    """What a plan and a search say of what they were asked; the model's parameters in all and in its linear layers."""
    return {
        "model": {
            "name": request.model,
            "parameters": model.parameters,
            "linear_parameters": model.linear_parameters,
            "layers": model.num_layers,
            "width": model.hidden_size,
            "heads": model.num_heads,
            "kv_heads": model.num_kv_heads,
            "mlp": model.intermediate_size,
            "vocabulary": model.vocab_size,
        },
        "stage": request.stage,
        "target": target.name,
        "device": target.device.name,
        "devices": target.count,
        "topology": target.topology.split(":")[-1],
        "memory_gib": target.memory_gib,
    }
