"""A signal that asks a training to end: the step under way is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What a scheduler, a user at the keyboard and ``sbatch --signal`` send."""


class StopRequest:
    """Whether somebody asked to end; ``asked`` stays false where nobody did."""

    asked = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take :data:`SIGNALS` for requests while the block runs. A second one ends the process at once.

    Outside the main thread no signal arrives, and nothing is asked.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        request.asked = True
        # Written past Python's buffer, in the middle of which the signal may have come.
        os.write(2, f"medllm: {signal.Signals(number).name}: saving after this step; a second one ends at once\n".encode())

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
