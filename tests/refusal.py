"""A command that a user's mistake ends."""

from __future__ import annotations

import re
from pathlib import Path

from medllm.cli import main

_AT_ITS_START = re.compile(r"medllm: (\w+ on \d+ x .*|[\d,]+ (rows|problems) .*: [\d,]+ steps .*|writing to .*)$")


def refused(folder: Path, capsys, *arguments: str) -> str:
    """Run the command, hold it to one line and exit code 2, and to leaving ``folder`` as it was; that line.

    Before it may stand what a stage says at its start.
    """
    before = sorted(folder.rglob("*"))
    assert main(list(arguments)) == 2
    *said, line = capsys.readouterr().err.strip().splitlines()
    assert all(map(_AT_ITS_START.match, said)), said
    assert sorted(folder.rglob("*")) == before
    return line
