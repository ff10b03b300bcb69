"""A command that a user's mistake ends."""

from __future__ import annotations

from pathlib import Path

from medllm.cli import main


def refused(folder: Path, capsys, *arguments: str) -> str:
    """Run the command, hold it to one line and exit code 2, and to leaving ``folder`` as it was; that line."""
    before = sorted(folder.rglob("*"))
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert sorted(folder.rglob("*")) == before
    return lines[0]
