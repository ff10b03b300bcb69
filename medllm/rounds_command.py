"""``medllm rounds``: curation and preference training in turn, until it no longer pays."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from medllm.command import Command, say
from medllm.engines import TrainerName
from medllm.stage_config import RoundsConfig

_OF_SERVERS = {"server", "dry_run"}
"""Settings of curation that ask a server, which cannot train."""


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file")
    parser.add_argument("--engine", type=TrainerName, default="jax", help="which engine does the work")
    parser.add_class_arguments(RoundsConfig, as_group=True, skip=_OF_SERVERS)


def _rounds(values: Any) -> dict[str, Any]:
    from medllm.stages.rounds import run_rounds

    settings = {field.name: values[field.name] for field in fields(RoundsConfig) if field.name not in _OF_SERVERS}
    result = run_rounds(RoundsConfig(**settings), values.engine, say)
    best = result.best
    where = ", ".join([best.model.path, *best.model.adapters])
    say(f"rounds: {result.stopped}; best: model {best.trainings}, {best.share:.3f} right; {where}")
    return result.to_json()


ROUNDS = Command(
    "curate and train in turn, each round from the one before",
    _arguments,
    _rounds,
    tuple(
        f"--{option}"
        for option in "model.path model.adapter run problems shots shot_count held_out.problems rounds improvement "
        "sampling.samples sampling.max_new_tokens loss.name loss.alpha model.quantization lora.rank "
        "optimizer.learning_rate engine mesh".split()
    ),
)
