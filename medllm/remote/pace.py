"""When the next request may go to a server, and how many are under way at a time."""

from __future__ import annotations

import threading
from time import monotonic

from medllm.stage_config import ServerConfig

_FIRST_WAIT = 0.5
_LONGEST_WAIT = 60.0


class Pace:
    """Requests of many threads, one after the other through this gate.

    One goes alone until the server answers, and every answer lets one more go, up to ``concurrency``. After a failure all wait,
    twice as long each time or as long as the server says, and one goes alone again: a server that is gone for good is asked by
    few. Those that go are spread evenly over the minute.
    """

    def __init__(self, settings: ServerConfig):
        self._settings = settings
        self._changed = threading.Condition()
        self._allowed, self._under_way, self._failures = 1, 0, 0
        self._turn = self._rested = self._failed = 0.0
        self._closed = False

    def begin(self, tokens: float) -> float | None:
        """Wait for a turn with a request of so many ``tokens``; the time at which it goes. None once it is closed."""
        with self._changed:
            while not self._closed:
                wait = max(self._turn, self._rested) - monotonic()
                if wait <= 0 and self._under_way < self._allowed:
                    self._under_way += 1
                    self._turn = max(self._turn, monotonic()) + self._spacing(tokens)
                    return monotonic()
                self._changed.wait(wait if wait > 0 else None)
            return None

    def answered(self) -> None:
        """The server answered a request."""
        with self._changed:
            self._failures = 0
            self._under_way -= 1
            self._allowed = min(self._settings.concurrency, self._allowed + 1)
            self._changed.notify_all()

    def failed(self, began: float, wait: float | None = None) -> bool:
        """It did not answer the one that began then, or asks to ``wait`` so many seconds. Whether another try is worth it.

        Those under way together fail together, and count once.
        """
        with self._changed:
            now = monotonic()
            if began > self._failed:
                self._failures += 1
                self._failed = now
            backoff = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (self._failures - 1))
            self._rested = max(self._rested, now + (backoff if wait is None else wait))
            self._under_way -= 1
            self._allowed = 1
            self._changed.notify_all()
            return self._failures <= self._settings.retries

    def close(self) -> None:
        """Let no more go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _spacing(self, tokens: float) -> float:
        """Seconds to the next request, for both limits to hold."""
        requests, most_tokens = self._settings.requests_per_minute, self._settings.tokens_per_minute
        return max(60 / requests if requests else 0.0, 60 * tokens / most_tokens if most_tokens else 0.0)
