"""What a plan is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from medllm.config import RematPolicy
from medllm.errors import UserError
from medllm.quantization import Packed, Quantization

Stage = Literal["cpt", "rpo", "generate"]
Held = Literal[Packed, "bf16", "fp32"]
"""How the base weights are held, in a word: the linear ones packed and the others bf16, or all of them in a type."""


def held_as(word: str) -> tuple[Quantization, Literal["float32", "bfloat16"]]:
    """The setting of the linear layers' quantization, and the type of the other weights and of the computation."""
    packings: tuple[Packed, ...] = get_args(Packed)
    return next((name for name in packings if name == word), "none"), "float32" if word == "fp32" else "bfloat16"


def held_word(quantization: Quantization, dtype: str) -> Held:
    """What :func:`held_as` reads."""
    return quantization if quantization != "none" else ("fp32" if dtype == "float32" else "bf16")


def row_length(settings: Mapping[str, Any]) -> int:
    """Tokens in a row of a micro-batch, by the numbers of a stage (:meth:`Request.settings`)."""
    return settings.get("length") or settings["prompt"] + settings["responses"] * settings["response"]


@dataclass(frozen=True)
class Request:
    """A stage's work, and how it is laid out. Training keeps to :class:`medllm.config.TrainingConfig`'s words.

    Args:
        model: A name (qwen2.5-72b), or a model folder, of which only config.json is read.
        stage: Packed rows (cpt), problems, each a prompt with all its responses in one row (rpo), or slots of text (generate).
        target: A kind of device, and how many or which slice: ``a100-80g:4`` (unset), ``v5e:4x4``, ``cpu:8``. With
            --calibrate: the device that is here, which needs no name.
        mesh: Devices along each mesh axis (fsdp=8,tensor=2); unset: fsdp over all to train, tensor first to generate.
        rules: Which mesh axes an axis of the arrays is spread over, where not as usual.
        rows: Rows in a micro-batch of each group of devices that hold rows (cpt, rpo: 1); slots in all (generate: 64).
        length: Tokens in a row (cpt: 2048), or that a slot has room for (generate: 4096).
        prompt: Tokens of a prompt (rpo: 1536, generate: three quarters of the length).
        responses: Responses of a problem (rpo).
        response: Tokens of a response (rpo).
        quantization: How the base weights are held.
        remat: What is kept for the backward pass.
        rank: Of the adapter.
        accumulation: Micro-batches in an optimizer step.
    """

    model: str
    stage: Stage = "cpt"
    target: str | None = None
    mesh: str = ""
    rules: str = ""
    rows: int | None = None
    length: int | None = None
    prompt: int | None = None
    responses: int = 3
    response: int = 512
    quantization: Held = "nf4"
    remat: RematPolicy = "layer"
    rank: int = 16
    accumulation: int = 1

    def __post_init__(self) -> None:
        least = {"responses": 2, "length": 16}
        for name in ("rows", "length", "prompt", "responses", "response", "rank", "accumulation"):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                raise UserError(f"--{name} is {value}; at least {least.get(name, 1)} is needed")
        if self.stage == "rpo" and self.length is not None:
            raise UserError("--length is for cpt and generate; a row of rpo is --prompt and --responses times --response")
        if self.stage == "cpt" and self.prompt is not None:
            raise UserError("--prompt is for rpo and generate; a row of cpt is --length")
        settings = self.settings()
        if self.stage == "generate" and settings["prompt"] >= settings["length"]:
            raise UserError(
                f"--prompt is {settings['prompt']} and --length {settings['length']}: a slot holds a prompt and what follows it"
            )

    @property
    def planned_for(self) -> str:
        """The target, where it was left open too."""
        return self.target or "a100-80g:4"

    def settings(self) -> dict[str, Any]:
        """The numbers of the stage, those that were left open filled in."""
        generate = self.stage == "generate"
        length = self.length or (4096 if generate else 2048)
        common = {"quantization": self.quantization, "rank": self.rank, "rows": self.rows or (64 if generate else 1)}
        if generate:
            return {**common, "length": length, "prompt": self.prompt or length * 3 // 4}
        training = {**common, "remat": self.remat, "accumulation": self.accumulation}
        if self.stage == "cpt":
            return {**training, "length": length}
        return {**training, "prompt": self.prompt or 1536, "responses": self.responses, "response": self.response}

    def text_length(self) -> int:
        """Tokens of the longest text, which the model needs positions for."""
        settings = self.settings()
        return settings.get("length") or settings["prompt"] + settings["response"]

    @classmethod
    def of(cls, values: Any) -> Request:
        """From the command line's values."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})
