"""Memory of this machine and of this process, in bytes."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
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


def watch_device(peak_bytes: Callable[[], int]) -> None:
    """Say where the most is read that a device of this process had in use; 0 where its memory is the host's."""
    global _device_peak
    _device_peak = peak_bytes


def memory_words() -> str:
    """The most memory that was in use so far, in words: a device's, where there is one, else that of the process."""
    device = _device_peak()
    return f"device memory {size_words(device)}" if device else f"memory {size_words(peak_resident_bytes())}"


def size_words(size: float) -> str:
    """Bytes in words: ``38.2 GiB``, ``640 MiB``, ``12 KiB``."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 2**10:.0f} KiB"


def _no_device() -> int:
    return 0


_device_peak: Callable[[], int] = _no_device
