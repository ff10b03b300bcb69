"""A server of OpenAI's interface that answers by rule, or wrongly; in this process, or in one of its own that can be killed.

::

    python -m tests.fake_server PORT LOG DELAY
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wrong:
    """A reply that is none: its bytes, and how it is sent. ``half``: the connection ends in its middle."""

    data: bytes
    status: int = 200
    kind: str = "application/json"
    half: bool = False
    headers: dict[str, str] = field(default_factory=dict)


class Server(ThreadingHTTPServer):
    """Answers with ``respond(path, body)``: a status and a reply, or a :class:`Wrong` one. Remembers requests and how many were
    open at once.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0, respond: Callable[[str, Any], Any] | None = None):
        super().__init__(("127.0.0.1", port), Handler)
        self.requests: list[Any] = []
        self.keys: list[str] = []
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        self.respond = respond or (lambda path, body: (200, reply(path, "c")))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @contextmanager
    def running(self):
        """Answers inside."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def handle_error(self, request, client_address):
        """A client that was killed closes its connections; no news."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, body))
            self.server.keys.append(self.headers["Authorization"])
            self.server.open += 1
            self.server.most_open = max(self.server.most_open, self.server.open)
        answer = self.server.respond(self.path, body)
        with self.server.lock:
            self.server.open -= 1
        if not isinstance(answer, Wrong):
            status, told = answer
            answer = Wrong(json.dumps(told).encode(), status, headers={"retry-after-ms": "1"})
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.data)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.data[: len(answer.data) // 2] if answer.half else answer.data)
        if answer.half:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


def reply(path: str, *texts: str | None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """A reply of one choice a text."""
    said = [{"message": {"role": "assistant", "content": text}} if "chat" in path else {"text": text} for text in texts]
    choices = [{"index": index, "finish_reason": finish, **one} for index, one in enumerate(said)]
    return {"id": "1", "object": "completion", "created": 0, "model": "m", "choices": choices, **more}


def asked(path: str, body: dict[str, Any]) -> str:
    """What was asked, whichever way."""
    return body["messages"][-1]["content"] if "chat" in path else body["prompt"]


def by_rule(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Answers that follow from prompt and seed alone, as vLLM's do: the n-th of several has the n-th seed."""
    seeds = [body.get("seed", 0) + index for index in range(body.get("n", 1))]
    numbers = [hashlib.sha256(f"{seed}/{asked(path, body)}".encode()).digest()[0] for seed in seeds]
    texts = [f"数 {number} による。\n Answer:{'abc'[number % 3]}" for number in numbers]
    usage = {"prompt_tokens": len(asked(path, body)), "completion_tokens": 9 * len(texts), "total_tokens": 0}
    return 200, reply(path, *texts, usage=usage, model="rule-1", system_fingerprint="fp_1")


def main(port: int, log: Path, delay: float) -> None:
    """Answer by rule, and log each question as it comes."""

    def respond(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        digest = hashlib.blake2b(asked(path, body).encode(), digest_size=8).hexdigest()  # as a journal has it
        line = json.dumps({"asked": digest, "seed": body.get("seed", 0)})
        with server.lock, log.open("a") as stream:
            stream.write(f"{line}\n")
        time.sleep(delay)
        return by_rule(path, body)

    server = Server(port, respond)
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
