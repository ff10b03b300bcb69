"""What a command is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings
from yaml import YAMLError

from medllm.host.processes import is_primary_process
from medllm.text_files import parse_yaml

set_parsing_settings(import_path_denylist=["*"])  # a setting names no class: to look at one would be to run its module
set_loader("yaml", partial(parse_yaml, load=get_loader("yaml")), exceptions=(YAMLError,))


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        help: One line.
        arguments: Adds its options to a parser.
        run: Does it, with the parsed values. What it returns is what ``--json`` writes; ``ok`` false in it is exit code 1.
        first: The options a user sets first, in the order in which ``--help`` shows them; empty where it shows all.
        presets: Which presets are for it: a pattern of their names, or several.
    """

    help: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Any], dict[str, Any] | list[Any] | None]
    first: tuple[str, ...] = ()
    presets: str = ""

    def parser(self) -> ArgumentParser:
        """Its parser, which knows all of its options but ``--help`` and ``--debug``."""
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
        self.arguments(parser)
        parser.add_argument("--json", type=str | None, default=None, metavar="FILE", help="also write the result as JSON")
        return parser


@dataclass(frozen=True)
class Group:
    """A command that is several: ``medllm data leaks``.

    Attributes:
        help: One line.
        actions: Gives them by name; called once the command is known.
    """

    help: str
    actions: Callable[[], Mapping[str, Command]]


def say(line: str) -> None:
    """Print a line, in one process of several."""
    if is_primary_process():
        print(line, flush=True)
