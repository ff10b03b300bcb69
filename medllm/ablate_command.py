"""``medllm ablate``: the rows of a table, each trained as often as asked for, and what can be said of their differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader

from medllm.command import Command, say
from medllm.engines import TrainerName
from medllm.errors import UserError
from medllm.text_files import first_line, parse_yaml, read_yaml

PRESETS = "mini* paper_ablate_*"


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", type=str | None, default=None, help="YAML file of a design: rows, exams, what they share")
    parser.add_argument("--preset", type=str | None, default=None, help="a preset in its place: the paper's five rows")
    parser.add_argument("--engine", type=TrainerName, default="jax", help="which engine does the work")
    parser.add_argument("--seeds", type=int | None, default=None, help="trainings of each row; a study can be given more later")
    parser.add_argument("--out", type=str, default="runs/ablate", help="folder of the study")
    settings = "settings of the design in place of its own: cpt.corpus.length=4096"
    parser.add_argument("--set", type=str, nargs="+", action="extend", default=[], help=settings)
    parser._print_config = None  # the design is printed by this command, not by the parser, which knows its file's name alone
    parser.add_argument("--print_config", action="store_true", help="print the settings of the study and stop")
    parser.add_argument("--join", action="store_true", help="work along with a study that was begun with the same command")


def _ablate(values: Any) -> dict[str, Any] | None:
    from medllm.ablation.design import combined, configured, design_of
    from medllm.ablation.evidence import gather
    from medllm.ablation.report import conclude
    from medllm.ablation.study import run_design
    from medllm.mini.report import NOTES
    from medllm.mini.study import StudyConfig, study_of
    from medllm.presets import preset_file

    if (values.config is None) == (values.preset is None):
        raise UserError("say what to compare: a design of your own (--config FILE), or one of the presets (--preset mini)")
    option, name = ("--config", values.config) if values.config else ("--preset", values.preset)
    file = preset_file(option, name, PRESETS)
    settings = combined(read_yaml(file), _given(values.set))
    settings = settings | ({} if values.seeds is None else {"seeds": values.seeds})
    where = " with --set ".join([str(file), *values.set])
    out = Path(values.out)
    notes: tuple[str, ...] = ()
    if values.print_config:
        say(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip())
        return None
    if "rows" in settings:
        design = design_of(settings, where)
        plan = run_design(design, values.engine, out, say, join=values.join)
    else:
        study = configured(StudyConfig, settings, where)
        design, plan = study_of(study, values.engine, out, say, join=values.join)
        notes = NOTES
    if values.join:
        say(f"ablate: nothing is left to do in {out}; the table is written by the process that began the study")
        return None
    return conclude(design, plan, gather(design, plan), values.engine, out, say, notes)


def _given(words: list[str]) -> dict[str, Any]:
    """``a.b=c`` as settings."""
    given: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not all(name.split(".")):
            raise UserError(f"--set {word}: expected a setting and its value: cpt.corpus.length=4096")
        group = given
        *groups, last = name.split(".")
        for part in groups:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                raise UserError(f"--set {word}: {part} has a value already, and cannot hold settings too")
        try:
            group[last] = parse_yaml(value, get_loader("yaml"))
        except yaml.YAMLError as error:
            raise UserError(f"--set {word}: the value is no YAML ({first_line(error)})") from error
    return given


ABLATE = Command(
    "train the rows of a table, several times each, and say what their differences are worth",
    _arguments,
    _ablate,
    presets=PRESETS,
)
