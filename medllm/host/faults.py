"""What the world does to a command, in one line: a full disk, a folder that cannot be written, a file that vanished.

Libraries wrap such an error in their own, or hold nothing of it but its text; a whole chain of causes is looked through.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from medllm.errors import UserError

_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|\bENOSPC\b|\bEDQUOT\b", re.IGNORECASE)
_FULL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED_NUMBERS = (errno.EACCES, errno.EPERM, errno.EROFS)
_GONE_NUMBERS = (errno.ENOENT, errno.ESTALE)
_DISK_NUMBERS = (errno.EIO, errno.ENXIO, errno.ENODEV)


def explained(error: BaseException, folder: Path | None = None) -> UserError | None:
    """What a user can do about an error that came from the disk or its file system; None where it is another kind.

    Args:
        error: As it was raised.
        folder: What was being written, to be named where the error names no file.
    """
    for one in chain(error):
        found = _of_disk(one, folder)
        if found is not None:
            return found
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those it came from."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        following = following.__cause__ or following.__context__


def _of_disk(error: BaseException, folder: Path | None) -> UserError | None:
    of_system = error if isinstance(error, OSError) and error.errno is not None else None
    named = (of_system.filename if of_system else None) or folder
    where = f"{named}: " if named else ""
    if of_system.errno in _FULL_NUMBERS if of_system else _FULL.search(str(error)):
        return UserError(
            f"{where}the disk is full, or a limit on it is reached; what was whole before stays, so make room, and the same "
            "command goes on"
        )
    if of_system is None:
        return None
    number, reason = of_system.errno, of_system.strerror
    if number in _CLOSED_NUMBERS and named:
        return UserError(f"{where}cannot be opened or written ({reason}); see its rights, or name another path")
    if number in _GONE_NUMBERS and of_system.filename:
        return UserError(f"{where}is not there, or not any more; put it back, and give the same command")
    if number in _DISK_NUMBERS:
        return UserError(f"{where}its disk does not answer ({reason}); give the same command when it does")
    return None
