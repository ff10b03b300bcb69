"""Tab completion: a script for the shell, made of what ``--help`` knows of the commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

import shtab

from medllm.command import Command, Group
from medllm.command_help import Setting, settings_of, shared_settings
from medllm.errors import UserError
from medllm.presets import preset_titles, table_rows

SHELLS = ("bash", "zsh")
_NO_FILE = ("N", "X", "{NAME: VALUE}")

# Presets and files together, in each shell's own words.
_PRESETS = {
    "bash": '{name}() {{ compgen -W "{presets}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "{name}() {{ compadd -- {presets}; _files }}",
}


def completion_script(shell: str, commands: Mapping[str, Command | Group]) -> str:
    """A script that completes commands, options, their choices, presets and files.

    Raises:
        UserError: for another shell than bash and zsh.
    """
    if shell not in SHELLS:
        raise UserError(f"--completion {shell or '(nothing)'}: there are scripts for {' and '.join(SHELLS)}")
    root = argparse.ArgumentParser("medllm", add_help=False)
    for option in ("--help", "--version", "--debug"):
        root.add_argument(option, action="store_true")
    root.add_argument("--completion", choices=SHELLS)
    functions = list(_add_commands(root, commands, shell))
    return shtab.complete(root, shell, preamble="\n".join(functions))


def _add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, Command | Group], shell: str) -> Iterator[str]:
    """Add the commands to a parser that is only looked at; the functions of the script that they need."""
    added = parser.add_subparsers()
    for name, command in commands.items():
        one = added.add_parser(name, help=command.help, description=command.help, add_help=False)
        if isinstance(command, Group):
            yield from _add_commands(one, command.actions(), shell)
            continue
        own = command.parser()
        presets = [*preset_titles(command.presets), *table_rows(command.presets)]
        function = f"_medllm_{name}_presets"
        if presets:
            yield _PRESETS[shell].format(name=function, presets=" ".join(presets))
        for setting in (*settings_of(own), *shared_settings(own)):
            action = _add(one, setting)
            if presets and setting.option in ("--config", "--preset"):
                action.complete = {shell: function}  # type: ignore[attr-defined]
            elif setting.values and not setting.choices and setting.values not in _NO_FILE:
                action.complete = shtab.FILE  # type: ignore[attr-defined]


def _add(parser: argparse.ArgumentParser, setting: Setting) -> argparse.Action:
    told = setting.first_sentence()
    if setting.option.startswith("-") and not setting.values:
        return parser.add_argument(setting.option, action="store_true", help=told)
    several = "*" if setting.values.endswith(("...", "...]")) else None
    return parser.add_argument(setting.option, nargs=several, choices=setting.choices or None, help=told)
