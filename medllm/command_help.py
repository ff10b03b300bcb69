"""What ``--help`` prints: on one screen what a user sets first, in words; the rest behind ``--help all``."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from medllm.command import Command, Group
from medllm.command_words import elements, kind_of, options_of, parts
from medllm.presets import preset_titles, table_rows

_ABOUT = (
    "Teach a language model a medical domain so that it stays right when it has to explain itself. "
    "Research software, not medical advice."
)
_MOST_COLUMNS = 100
_OPTION_COLUMNS = 34


@dataclass(frozen=True)
class Setting:
    """An option, in words.

    Attributes:
        option: ``--optimizer.learning_rate``; the bare name of what is given without an option.
        values: What may follow it: ``N``, ``none|nf4``.
        choices: The words that may follow it; empty where it is open.
        text: What it does.
        default: Its value when it is not given; empty where that is nothing.
        required: Whether it has to be given.
    """

    option: str
    values: str
    choices: tuple[str, ...]
    text: str
    default: str = ""
    required: bool = False

    def line(self, text: str) -> tuple[str, str]:
        """How it is given, and ``text`` about it with its default."""
        known = "required" if self.required else f"default {self.default}" if self.default else ""
        return f"{self.option} {self.values}".rstrip(), f"{text.rstrip('.')} ({known})" if known else text

    def first_sentence(self) -> str:
        """What it does, in short."""
        return re.split(r"(?<=[\w)])[.;](?= |$)", self.text, maxsplit=1)[0]


SHARED = {
    option: Setting(option, values, choices, text)
    for option, values, choices, text in (
        ("--config", "FILE|PRESET", (), "A YAML file of these settings, or the name of a preset; options given beside it win"),
        ("--print_config", "", (), "Print all settings as they would be used, as such a file, and stop"),
        ("--json", "FILE", (), "Also write the result as JSON"),
        ("--debug", "", (), "Show the traceback of an error"),
        ("--help", "[all]", ("all",), "This page; with 'all', every setting"),
    )
}
"""Options that are no settings of a command's own."""


def settings_of(parser: ArgumentParser) -> list[Setting]:
    """What a parser's own options are, in their order; not those that every command has."""
    defaults = parser.get_defaults()
    found = {action.dest: action for action in parser._actions if not action.option_strings}
    found |= {option: action for option, action in options_of(parser).items() if option not in SHARED}
    return [
        Setting(
            option=option,
            values=_values(action),
            choices=_choices(*(elements(kind_of(action)) or parts(kind_of(action)))),
            text=_plain(action.help or ""),
            default=_default(defaults.get(action.dest)) if option.startswith("-") else "",
            required=action.required,
        )
        for option, action in found.items()
    ]


def shared_settings(parser: ArgumentParser) -> list[Setting]:
    """Those of :data:`SHARED` that go with a command; ``--debug`` and ``--help`` go with all."""
    known = {"--debug", "--help", *parser._option_string_actions}
    return [setting for option, setting in SHARED.items() if option in known]


def command_page(name: str, command: Command, *, everything: bool = False) -> str:
    """The help of a command: what is set first, or ``everything``."""
    parser = command.parser()
    settings = settings_of(parser)
    first = settings
    if command.first and not everything:
        by_option = {setting.option: setting for setting in settings}
        first = [by_option[option] for option in command.first]
    given = [f"{one.option} {one.values}".rstrip() for one in settings if one.required]
    lines = [" ".join(["medllm", name, *given, "[--OPTION VALUE ...]"]), "", command.help, ""]
    if everything:
        lines += _by_config(settings)
    else:
        lines += _table(one.line(one.first_sentence()) for one in first)
    presets = preset_titles(command.presets)
    if presets:
        rows = {name: f"{row['label']}, a row of the paper's" for name, row in table_rows(command.presets).items()}
        if rows and not everything:
            rows = {f"{next(iter(rows))}, ...": "a row of the paper's tables; --help all has their names"}
        lines += ["", "Presets:", *_table([*presets.items(), *rows.items()])]
    lines += ["", *_table(one.line(one.text) for one in shared_settings(parser))]
    if len(first) < len(settings) and not everything:
        lines += ["", f"The other {len(settings) - len(first)} settings: medllm {name} --help all"]
    return "\n".join(lines)


def group_page(name: str, group: Group) -> str:
    """The help of a command that is several."""
    lines = _table((action, command.help) for action, command in group.actions().items())
    explains = f"Each explains itself: medllm {name} ACTION --help"
    return "\n".join([f"medllm {name} ACTION [--OPTION VALUE ...]", "", group.help, "", *lines, "", explains])


def overview(commands: Mapping[str, Command | Group]) -> str:
    """The help of ``medllm`` itself."""
    shared = {
        "--version": "the version",
        "--completion bash|zsh": "a script for the shell, which then completes commands and options on Tab",
        "--debug": "show the traceback of an error",
    }
    return "\n".join(
        [
            "medllm COMMAND [--OPTION VALUE ...]",
            "",
            *textwrap.wrap(_ABOUT, _columns()),
            "",
            *_table((name, command.help) for name, command in commands.items()),
            "",
            *_table(shared.items()),
            "",
            "Each command explains itself: medllm COMMAND --help",
        ]
    )


def _by_config(settings: Sequence[Setting]) -> Iterator[str]:
    """All settings in full, those of one config under its name."""
    sections: dict[str, list[Setting]] = {}
    for one in settings:
        sections.setdefault(one.option.lstrip("-").rpartition(".")[0], []).append(one)
    for number, (name, members) in enumerate(sections.items()):
        if number:
            yield ""
        if name:
            yield f"{name}:"
        yield from _table(one.line(one.text) for one in members)


def _table(rows: Any) -> list[str]:
    """Two columns; what is too long for the first has a line of its own."""
    rows = list(rows)
    fitting = [len(left) for left, _ in rows if len(left) <= _OPTION_COLUMNS]
    width = max(fitting, default=_OPTION_COLUMNS) + 4
    lines = []
    for left, right in rows:
        told = textwrap.wrap(right, _columns() - width) or [""]
        if len(left) + 4 > width:
            lines.append(f"  {left}")
            left = ""
        for text in told:
            lines.append(f"  {left:<{width - 2}}{text}".rstrip())
            left = ""
    return lines


def _columns() -> int:
    return min(_MOST_COLUMNS, shutil.get_terminal_size((_MOST_COLUMNS, 40)).columns)


# --- words for types ---------------------------------------------------------------------------------------------------------


def _values(action: Any) -> str:
    kind = kind_of(action)
    if action.nargs == 0 or kind is None:
        return ""
    if not action.option_strings:
        return "..."
    if of := elements(kind):
        words = [_word(part, "A") for part in of if part is not Ellipsis]
        return f"{words[0]} [{words[0].replace('A', 'B')} ...]" if len(words) == 1 else " ".join(words)
    name = action.metavar or action.dest.rsplit(".", 1)[-1].upper()
    return "|".join(_choices(*parts(kind))) or _word(next(part for part in parts(kind) if part is not NoneType), name)


def _word(kind: Any, name: str) -> str:
    """What stands for one value of a type; ``name`` for a text."""
    if get_origin(kind) is dict:
        return "{NAME: VALUE}"
    return "|".join(_choices(kind)) or {int: "N", float: "X"}.get(kind, name)


def _choices(*kinds: Any) -> tuple[str, ...]:
    """The words that types allow together, if they can be counted."""
    words: list[str] = []
    for kind in kinds:
        if kind is bool:
            words += ["true", "false"]
        elif get_origin(kind) is Literal:
            words += map(str, get_args(kind))
        elif kind not in (NoneType, Ellipsis):
            return ()
    return tuple(words)


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None or value == {} else str(value)


def _plain(text: str) -> str:
    """A docstring's words without its markup."""
    words = " ".join(re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "").split())
    return words if text.startswith("`") else words[:1].upper() + words[1:]
