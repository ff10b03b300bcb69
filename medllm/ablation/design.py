"""What a study is to compare, as one file says it: the rows of its table, how each came about, and what exams they sit.

.. code-block:: yaml

    model: {path: Qwen2.5-7B}              # the base
    seeds: 3                               # trainings of each row
    presets: {rpo: paper_rpo_72b}          # settings of a stage, but for model and files
    cpt: {corpus: {documents: [texts]}}    # what the rows share: settings of each stage, as its own command has them
    curate: {problems: [until-2017.jsonl]}
    rpo: {}
    evaluate: {shots: shots.jsonl}
    exams:
      exam: {problems: [2018-2022.jsonl]}
    rows:
      base: {}
      CPT: {start: base, cpt: {}}
      CPT+DPO: {start: CPT, rpo: {loss: {name: dpo}}}
      CPT+RPO: {start: CPT, rpo: {}}
      sixteen answers: {start: CPT, rpo: {}, curate: {sampling: {samples: 16}}}

A row names the row that it starts from, the stage that trains it, and what it has otherwise than the design's own settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from medllm.command_words import check_sections, refuse_unusable
from medllm.config import ModelConfig, expect
from medllm.errors import UserError
from medllm.presets import preset_file
from medllm.text_files import read_yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

Settings = dict[str, Any]
"""Settings of a stage as a file has them, those that are not at their default."""

ExamSetting = Literal["plain", "explained"]
Stage = Literal["cpt", "curate", "rpo", "evaluate"]

FOLLOWS: Mapping[Stage, tuple[str, ...]] = {
    "cpt": ("model", "run", "resume"),
    "curate": ("model", "run"),
    "rpo": ("model", "run", "resume", "preferences"),
    "evaluate": ("model", "run", "explanation", "label"),
}
"""The settings of each stage that follow from the rows."""


@dataclass(frozen=True)
class RowDesign:
    """A row of the table: a model, and how it came about.

    Args:
        start: The row that it is trained from; none for a model as it is.
        cpt: It is trained by continued pretraining: what it has otherwise than the design.
        rpo: It is trained on preferences: what it has otherwise than the design.
        curate: How its preference data are made, where otherwise than the design has it.
        answers_of: The row whose answers they are made of; the one it starts from when unset.
        model: A model as it is: what it has otherwise than the design's.
        against: Further rows that it is compared with, beside the one it starts from.
        folder: Name of its run folder; its own, in small letters, when unset.
    """

    start: str | None = None
    cpt: Settings | None = None
    rpo: Settings | None = None
    curate: Settings | None = None
    answers_of: str | None = None
    model: Settings | None = None
    against: tuple[str, ...] = ()
    folder: str | None = None


@dataclass(frozen=True)
class Design:
    """A study.

    Args:
        model: The base model.
        rows: The rows of the table, in its order.
        exams: The exams by name: the settings of ``medllm evaluate`` that are the exam's own.
        settings: How each exam is sat: ``plain``, ``explained`` (an explanation before the answer), or both.
        seeds: Trainings of each row that is trained; each adds its number to every seed of its stages.
        presets: A preset for a stage, whose settings it has where the design does not say otherwise.
        cpt: Settings of ``medllm cpt`` that the rows share.
        curate: The same of ``medllm curate``.
        rpo: The same of ``medllm rpo``.
        evaluate: The same of ``medllm evaluate``.
        opened: A trained row sits its exams as weights that its adapter is ``merged`` into, or as ``adapter`` on its base.
        margin: In which the score with explanation must stay of the one without, to count as kept: points earned over points
            possible.
    """

    model: ModelConfig
    rows: dict[str, RowDesign] = field(hash=False)
    exams: dict[str, Settings] = field(hash=False)
    settings: tuple[ExamSetting, ...] = ("plain", "explained")
    seeds: int = 1
    presets: dict[Stage, str] = field(default_factory=dict, hash=False)
    cpt: Settings = field(default_factory=dict, hash=False)
    curate: Settings = field(default_factory=dict, hash=False)
    rpo: Settings = field(default_factory=dict, hash=False)
    evaluate: Settings = field(default_factory=dict, hash=False)
    opened: Literal["merged", "adapter"] = "merged"
    margin: float = 0.02

    def __post_init__(self) -> None:
        expect(self.seeds >= 1, "seeds", self.seeds, "at least 1")
        expect(0 < self.margin < 1, "margin", self.margin, "a share of the points, above 0")
        expect(bool(self.settings), "settings", list(self.settings), "plain, explained, or both")
        expect(len(set(self.settings)) == len(self.settings), "settings", list(self.settings), "each once")
        for kind, names in (("rows", self.rows), ("exams", self.exams)):
            expect(bool(names), kind, dict(names), "at least one")
        for name, row in self.rows.items():
            self._check_row(name, row)
        self._check_folders()
        for name in self.rows:
            self._check_origin(name)

    @property
    def previous(self) -> dict[str, str]:
        """The row that each one starts from, of those that do."""
        return {name: row.start for name, row in self.rows.items() if row.start is not None}

    def stage(self, stage: Stage, own: Mapping[str, Any] | None, where: str) -> Settings:
        """A stage's settings: its preset's, the design's, and ``own`` ones in their place.

        Raises:
            UserError: there is no such preset, or they say what follows from the rows.
        """
        asked = combined(getattr(self, stage), own)
        for name in FOLLOWS[stage]:
            if name in asked:
                raise UserError(f"{where}: {name} follows from the rows, and is not set here; remove it")
        if stage not in self.presets:
            return asked
        preset = read_yaml(preset_file(f"presets.{stage}", self.presets[stage], f"paper_{stage}_*"))
        return combined({name: value for name, value in preset.items() if name not in (*FOLLOWS[stage], "engine")}, asked)

    def compared_with(self, row: str) -> tuple[str, ...]:
        """The rows that a row is compared with: the one it starts from, and those it names."""
        start = self.rows[row].start
        return tuple(dict.fromkeys((*([start] if start else []), *self.rows[row].against)))

    def folder_of(self, row: str) -> str:
        """Name of a row's run folder, that of its first training."""
        return self.rows[row].folder or slug(row)

    def _check_folders(self) -> None:
        """Each row's run folders are its own, and none is the study's."""
        for folder_of in (self.folder_of, slug):
            taken: dict[str, str] = {}
            for name in self.rows:
                folder = folder_of(name)
                if not _FOLDER.fullmatch(folder) or folder in _STUDYS_OWN or folder.startswith("report"):
                    raise UserError(f"row '{name}' cannot be kept in '{folder}': name a folder of letters, digits and hyphens")
                other = taken.setdefault(folder, name)
                if other != name:
                    raise UserError(f"rows '{other}' and '{name}' would both be kept in '{folder}'; call one otherwise")

    def _check_origin(self, row: str, *behind: str) -> None:
        """A row comes of rows that do not come of it, neither by training nor by the answers it learns from."""
        if row in behind:
            raise UserError(f"row '{row}' comes of itself: {' from '.join([*behind, row])}; begin with a model as it is")
        for other in (self.rows[row].start, self.rows[row].answers_of):
            if other is not None:
                self._check_origin(other, *behind, row)

    def _check_row(self, name: str, row: RowDesign) -> None:
        trained = [stage for stage in ("cpt", "rpo") if getattr(row, stage) is not None]
        if row.start is None and (trained or row.curate is not None or row.answers_of is not None):
            raise UserError(f"row '{name}' is trained and says not from which row: add start")
        if row.start is not None and (len(trained) != 1 or row.model is not None):
            raise UserError(f"row '{name}' starts from '{row.start}': say which stage trains it (cpt or rpo), and no model")
        if row.rpo is None and (row.curate is not None or row.answers_of is not None):
            raise UserError(f"row '{name}' has preference data and is not trained on them: add rpo")
        for other in (row.start, row.answers_of, *row.against):
            if other is not None and (other not in self.rows or other == name):
                raise UserError(f"row '{name}' names '{other}', which is no other row; there are {', '.join(self.rows)}")


def design_of(settings: Mapping[str, Any], where: str) -> Design:
    """The design that a file's settings are.

    Raises:
        UserError: they are none; with ``where`` they stand.
    """
    written = settings.get("rows")
    if not isinstance(written, Mapping):
        raise UserError(f"{where}: rows: expected the rows of the table by name, found {written!r}")
    rows = {}
    for name, row in written.items():
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: rows.{name}: expected how the row comes about ({{}} of a model as it is), found {row!r}")
        rows[str(name)] = configured(RowDesign, row, f"{where}: rows.{name}")
    return configured(Design, {name: value for name, value in settings.items() if name != "rows"}, where, rows=rows)


def configured(kind: type[Config], settings: Mapping[str, Any], where: str, **made: Any) -> Config:
    """Settings as a file has them, as their class; those that are ``made`` already are taken as they are.

    Raises:
        UserError: a setting that there is not, or one that does not fit; with ``where`` it stands.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip=set(made))
    try:
        check_sections(where, settings, parser)
        parsed = parser.parse_object(dict(settings))
        refuse_unusable(parsed, parser)
        values = parser.instantiate(parsed)
        return kind(**{one.name: values[one.name] for one in fields(kind) if one.name not in made}, **made)
    except UserError as error:
        raise error if where in str(error) else UserError(f"{where}: {error}") from error
    except ArgumentError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def combined(shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> Settings:
    """``shared`` settings with ``own`` ones in their place, group by group."""
    both = dict(shared)
    for name, value in (own or {}).items():
        inner = both.get(name)
        both[name] = combined(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return both


_FOLDER = re.compile(r"\w[\w.+-]*")
_STUDYS_OWN = ("config.yaml", "environment.json", "provenance.json", "result.json", "world")


def slug(name: str) -> str:
    """A name as a folder has it: ``CPT+RPO`` is ``cpt-rpo``."""
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.") or "row"
