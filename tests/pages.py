"""README and docs as the tests read them: blocks of code, commands, tables, headings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DATA = ROOT / "docs" / "data.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PROGRAMS = ("medllm", "bash", "python", "pip", "git")

_BLOCK = re.compile(r"^```(?P<language>\w*)(?: (?P<name>\S+))?\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A block of code: its language, the file it is the contents of (or None), its text."""

    language: str
    name: str | None
    text: str


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str | None = None) -> list[Block]:
    found = [Block(match["language"], match["name"], match["text"]) for match in _BLOCK.finditer(read(page))]
    return [block for block in found if language in (None, block.language)]


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return _BLOCK.sub("", read(page))


def commands(page: Path) -> list[str]:
    """Every command of a page: the lines of its shell blocks, and what stands in backticks with an option or a script."""
    whole = [command for command in inline_commands(page) if " --" in command or not command.startswith("medllm")]
    return [*_command_lines(page), *whole]


def _command_lines(page: Path) -> list[str]:
    """What stands before a command (variables, ``for``) and comments are left out."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            start = next((index for index, word in enumerate(words) if word in PROGRAMS), None)
            if start is not None:
                found.append(shlex.join(words[start:]))
    return found


def inline_commands(page: Path) -> list[str]:
    """Every ``medllm …``, ``bash …`` and ``python …`` in backticks."""
    return re.findall(r"`((?:medllm|bash|python) [^`]+)`", prose(page))


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), re.M)


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in headings(page):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def tables(page: Path, heading: str) -> list[list[list[str]]]:
    """The tables below a heading and above the next, without their first two lines, as cells."""
    section = re.split(rf"^#+ {re.escape(heading)}\n", read(page), flags=re.M)[1]
    lines = re.split(r"^#+ ", section, flags=re.M)[0].split("\n")
    found: list[list[list[str]]] = [[]]
    for line in lines:
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table[2:] for table in found if table]


def names(cell: str) -> list[str]:
    """What stands in backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def write_examples(folder: Path) -> None:
    """Put every example of docs/data.md into ``folder`` under its name."""
    for block in blocks(DATA):
        if block.name:
            (folder / block.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.name).write_text(block.text, encoding="utf-8")


def documented(heading: str, stage: str) -> set[str]:
    """The fields that docs/data.md gives ``metrics.jsonl`` or ``result.json`` of a stage."""
    rows = [cells for cells in tables(DATA, heading)[0] if stage in cells[1] or cells[1] in ("all", "both")]
    return {name for cells in rows for name in names(cells[0])}


def in_run_folder() -> set[str]:
    """What docs/data.md says may lie in a run folder."""
    (tree,) = (block.text for block in blocks(DATA) if block.text.startswith("runs/cpt/"))
    return {line.split()[0].rstrip("/") for line in tree.splitlines()[1:]}
