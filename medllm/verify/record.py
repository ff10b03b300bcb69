"""A run as it is verified: its settings, its log, its result, and what it says it was made from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from medllm.command import Command
from medllm.errors import UserError
from medllm.journal import JOURNAL
from medllm.metrics import METRICS, Metrics
from medllm.provenance import PROVENANCE, read_provenance
from medllm.run import RESULT
from medllm.stage_config import CptConfig, CurateConfig, EvaluateConfig, RpoConfig
from medllm.text_files import read_json_object, read_yaml

_STAGES: Mapping[str, tuple[str, type]] = {
    "corpus": ("cpt", CptConfig),
    "preferences": ("rpo", RpoConfig),
    "problems_until": ("curate", CurateConfig),
    "explanation": ("evaluate", EvaluateConfig),
}
"""The setting that a stage alone has → the stage, and its settings."""


@dataclass(frozen=True)
class Record:
    """A run folder.

    Attributes:
        path: The folder.
        stage: ``cpt``, ``curate``, ``rpo`` or ``evaluate``.
        engine: The engine that made it.
        config: The settings of its stage.
        plain: The same as they stand in ``config.yaml``.
        result: ``result.json``; None where the run has not finished.
        lines: Those of its log, with a step.
        sessions: What each start of the command recorded.
        outputs: Digests of what it left.
    """

    path: Path
    stage: str
    engine: str
    config: Any
    plain: Mapping[str, Any]
    result: Mapping[str, Any] | None
    lines: Sequence[Mapping[str, float]]
    sessions: Sequence[Mapping[str, Any]]
    outputs: Mapping[str, str]

    @property
    def trains(self) -> bool:
        """Whether it took optimizer steps."""
        return self.stage in ("cpt", "rpo")


def open_record(path: Path) -> Record:
    """Read a run folder; nothing in it is written.

    Raises:
        UserError: it is none, or a file in it cannot be read.
    """
    for name in ("config.yaml", PROVENANCE, RESULT, METRICS, "adapter", "checkpoints", JOURNAL):
        if (path / name).is_symlink():
            raise UserError(f"{path / name}: is a link, and what it leads to is no part of the run; copy it there")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: holds no config.yaml, so it is no run folder; name the folder that --run named")
    plain = read_yaml(path / "config.yaml")
    stages = [stage for setting, stage in _STAGES.items() if setting in plain]
    if not stages:
        raise UserError(f"{path / 'config.yaml'}: is of no stage that can be verified: cpt, curate, rpo or evaluate")
    stage, kind = stages[0]
    result = read_json_object(path / RESULT, "") if (path / RESULT).exists() else None
    sessions, outputs = read_provenance(path)
    return Record(
        path=path,
        stage=stage,
        engine=str(plain.get("engine", "jax")),
        config=_settings(kind, {name: value for name, value in plain.items() if name != "engine"}, path / "config.yaml"),
        plain=plain,
        result=result,
        lines=list(_lines(path)),
        sessions=sessions,
        outputs=outputs,
    )


def _lines(path: Path) -> Iterator[dict[str, float]]:
    """The numbers of the lines that tell of a step."""
    for line in Metrics(path).lines():
        numbers = {name: one for name, one in line.items() if type(one) in (int, float)} if isinstance(line, dict) else {}
        if numbers.get("step", 0) > 0:
            yield numbers


def _settings(kind: type, plain: dict[str, Any], where: Path) -> Any:
    def fill(parser: ArgumentParser) -> None:
        parser.add_class_arguments(kind, as_group=True)

    parser = Command("", fill, lambda _: None).parser()
    try:
        values = parser.instantiate(parser.parse_object(json.loads(json.dumps(plain))))
        return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
    except (ArgumentError, UserError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where}: these are not the settings of a stage ({' '.join(str(error).split())[:300]})") from error
