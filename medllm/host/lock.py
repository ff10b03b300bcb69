"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from medllm.errors import UserError

LOCK = ".lock"
"""The file that is locked. It says who holds it, and goes with the lock; one that a killed process left is held by nobody."""


class Held(UserError):
    """Another process holds the lock."""


class FolderLock:
    """A lock on ``folder``, held until :meth:`release` or the end of the process, however that comes.

    On a file system without locks a line on standard error says so, and nothing is held.

    Raises:
        Held: another process holds it; which one, and on which machine.
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self._file = folder / LOCK
        self._held: TextIO | None = None
        while self._held is None:
            try:
                stream = self._file.open("a+", encoding="utf-8")
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot be written ({error.strerror}); see its rights, or give another --run"
                ) from error
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # which of the two depends on the system
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                stream.close()
                raise Held(f"{folder}: {holder} is at work here; wait for it or end it, or give another --run") from None
            except OSError as error:
                print(f"medllm: {folder}: cannot be locked ({error.strerror}); start one process at a time", file=sys.stderr)
                self._held = stream
                return
            if self._is_current(stream):
                self._held = stream
            else:  # its holder took it away between our opening and locking it
                stream.close()
        with suppress(OSError):  # on a full disk the lock is held all the same, by nobody that is named
            self._held.truncate(0)
            self._held.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._held.flush()

    def release(self) -> None:
        """Let others in."""
        if self._held is not None:
            self._file.unlink(missing_ok=True)
            with suppress(OSError):  # what a full disk kept back
                self._held.close()
            self._held = None

    def _is_current(self, stream: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(stream.fileno()), self._file.stat())
        except FileNotFoundError:
            return False
