"""Memory of this machine and of this process, in bytes."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def physical_bytes() -> int:
    """What the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """What is resident now; the peak so far where the system does not say."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that was ever resident."""
    # Linux carries getrusage's peak over from the parent process; the one in /proc is this program's own.
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _status("VmHWM") or largest


def _status(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
