"""Text, JSON and YAML as users' files hold them: one reader of each, so that what is no such file is refused alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from medllm.errors import UserError

_LARGEST_YAML = 1 << 18
"""Bytes of a YAML file that are read, some seconds of parsing; a file of settings or a layout has a few thousand."""


_MOST_BRACKETS = 2000


def read_text(file: Path) -> str:
    """The UTF-8 text of a file, without byte-order mark, every line ended by LF.

    Lines end at LF, CR and CR LF alone: what ``str.splitlines`` takes for ends besides (U+2028, U+0085, form feed …) is text.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        # In one piece: a stream takes the first byte or two of a byte-order mark, and nothing else, for an empty file.
        return file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); convert it, for example with iconv") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # NUL, or half a character
        raise UserError(f"{str(file)!r}: is no name of a file") from error


def text_lines(file: Path) -> Iterator[str]:
    """The lines of :func:`read_text`, without their ends, of which one is in memory at a time.

    Raises:
        UserError: as there, when the line is reached.
    """
    empty = True
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for line in stream:
                empty = False
                yield line.removesuffix("\n")
    except (ValueError, OSError):
        read_text(file)  # says where it is wrong
        raise
    if empty:
        read_text(file)  # that it is


def parse_json(text: str, where: str, expected: str) -> Any:
    """The value that a text is, written so that it can be written again.

    Args:
        text: JSON.
        where: What an error calls the place.
        expected: What it says was expected there.

    Raises:
        UserError: the text is no JSON, is nested deeper or holds a longer number than Python reads, or holds half a character.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{where}: not JSON ({error.msg}{line}, column {error.colno}); {expected}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a character (a lone surrogate); write the text anew as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read ({first_line(error)})") from error
    return value


def read_json_object(file: Path, missing: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: there is no such file (``missing`` says what it is for), or it is no JSON object.
    """
    if not file.exists():
        raise UserError(f"{file.parent}: no {file.name} here; {missing}")
    value = parse_json(read_text(file), str(file), "expected a JSON object")
    if not isinstance(value, dict):
        raise UserError(f"{file}: a JSON object was expected, found {type(value).__name__}")
    return value


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings by name in a YAML file.

    Raises:
        UserError: it cannot be read, is no mapping, or is refused by :func:`parse_yaml`.
    """
    try:
        value = parse_yaml(read_text(file), yaml.safe_load)
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML that can be read ({first_line(error)})") from error
    if not isinstance(value, dict | None):
        raise UserError(f"{file}: expected settings by name, found {type(value).__name__}")
    return value or {}


def parse_yaml(text: str, load: Callable[[str], Any]) -> Any:
    """What ``load`` makes of YAML.

    Nothing in it may refer to another part: aliases that hold aliases unfold to more than any memory holds.

    Raises:
        yaml.YAMLError: it is no YAML, holds an alias, or is larger or deeper than any file of settings.
    """
    if len(text) > _LARGEST_YAML:
        raise yaml.YAMLError(f"{len(text)} characters; a file of settings has at most {_LARGEST_YAML}")
    if text.count("[") + text.count("{") > _MOST_BRACKETS:  # libyaml follows them until the stack ends, and the process with it
        raise yaml.YAMLError(f"more than {_MOST_BRACKETS} opening brackets")
    try:
        for token in yaml.scan(text) if "*" in text else ():
            if isinstance(token, yaml.AliasToken):
                raise yaml.YAMLError(f"line {token.start_mark.line + 1} refers to *{token.value}; write out what is meant")
        return load(text)
    except yaml.YAMLError:
        raise
    except Exception as error:  # its readers of dates, numbers and tags raise whatever Python does; deep nesting ends the stack
        raise yaml.YAMLError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, on one line; its name where it says nothing."""
    said = str(error).split()
    return " ".join(said)[:300] or type(error).__name__
