"""The options by which a command is told how problem files are laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser

from medllm.config import ProblemsFormat

if TYPE_CHECKING:
    from medllm.exam.loaders import LoadedProblems


def layout_arguments(parser: ArgumentParser) -> None:
    """The options that :func:`problems_at` reads."""
    parser.add_argument("--problems_format", type=ProblemsFormat, default="auto", help="auto: by fields and content")
    parser.add_argument("--layout", type=str | None, default=None, help="YAML file that says how the problems are laid out")
    parser.add_argument("--on_bad_row", type=Literal["stop", "skip"], default="stop", help="skip: leave it out and count it")


def problems_at(path: str, values: Any) -> LoadedProblems:
    """The problems of a file or folder, by these options.

    Raises:
        UserError: they cannot be read.
    """
    from medllm.exam.loaders import load_problems

    skips = values.on_bad_row == "skip"
    return load_problems(path, problems_format=values.problems_format, layout=values.layout, skip_bad_rows=skips)
