"""Paths that are written beside a target until they take its place, and what killed processes left of such.

A scratch path says whose it is: ``.NAME.HOST.PID.part``. One of a process that is gone is nobody's, and goes when the same
target is written again. That a process of another machine is gone cannot be seen here; its paths stay.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path
from typing import Literal

Kind = Literal["part", "merged"]
"""What takes the target's place, and what it is made from on the way."""

_OWN: set[Path] = set()
"""Paths that were asked for in this process. Others of its number are of a process before it, as in a container that was
started again."""


def scratch_path(target: Path, kind: Kind = "part") -> Path:
    """This process's own scratch path beside ``target``."""
    path = target.with_name(f".{target.name}.{_host()}.{os.getpid()}.{kind}")
    _OWN.add(path)
    return path


def remove_left(target: Path) -> None:
    """Remove the scratch paths that dead processes of this machine left of ``target``, and of scratch paths of it; nothing
    else."""
    suffix = rf"\.{re.escape(_host())}\.(\d+)\.(?:part|merged)"
    left = re.compile(rf"(\.+){re.escape(target.name)}((?:{suffix})+)")
    for path in target.parent.glob(f".*{_literal(target.name)}.*"):
        found = left.fullmatch(path.name)
        owners = [int(number) for number in re.findall(suffix, found[2])] if found else []
        if found and path not in _OWN and len(found[1]) == len(owners) and not any(map(_is_another_alive, owners)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def of_the_living(path: Path) -> bool:
    """Whether a scratch path is that of another process of this machine, which is at work."""
    found = re.search(rf"\.{re.escape(_host())}\.(\d+)\.(?:part|merged)$", path.name)
    return found is not None and _is_another_alive(int(found[1]))


def _is_another_alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or a number that no process has had
        return True
    return True


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def _literal(name: str) -> str:
    """A name as a pattern of :meth:`pathlib.Path.glob` that fits nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", name)
