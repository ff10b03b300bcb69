"""Work in a process of its own: ``python -m jax_medllm.plan NAME SETTINGS`` prints one line of JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any, TextIO

from medllm.errors import UserError
from medllm.host.progress import Progress

_TOLD = "MEDLLM_PROGRESS"
"""Environment variable of a child process: the descriptor on which it tells its progress."""


def run_in_child(
    module: str,
    name: str,
    settings: Mapping[str, Any],
    *,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    log: TextIO | None = None,
    progress: Progress = lambda done, total, doing="": None,
) -> dict[str, Any]:
    """Run ``name`` of ``module``, which :func:`serve` serves, in a fresh process and return what it found.

    Args:
        module: Where it is.
        name: Which.
        settings: Its arguments.
        timeout: Seconds after which the process is ended.
        environment: The process's environment variables; this one's when unset.
        log: Gets what the process wrote to its standard error.
        progress: Is told what the process tells of its progress with :func:`tell`.

    Raises:
        UserError: it refuses the settings (its own one-line reason).
        RuntimeError: the process failed, or took longer than ``timeout``.
    """
    command = [sys.executable, "-m", module, name, json.dumps(settings)]
    variables = dict(os.environ if environment is None else environment)
    with tempfile.TemporaryDirectory(prefix="medllm-child-") as nothing_compiled, _listening(progress) as told:
        variables |= {"JAX_COMPILATION_CACHE_DIR": nothing_compiled, _TOLD: str(told)}  # so that the time to compile is seen
        done = run_process(command, timeout=timeout, environment=variables, log=log, kept_open=(told,))
    said = done.stderr.strip().splitlines()
    if done.returncode == 2 and said:
        raise UserError(said[-1])
    if done.returncode != 0:
        # A process that a signal ends, as the kernel does for its memory, often says nothing, or nothing to the point.
        reason = _signal(done.returncode) or (said[-1] if said else f"exit code {done.returncode}")
        raise RuntimeError(f"the child process ended early: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def _listening(progress: Progress) -> Iterator[int]:
    """A descriptor on which another process tells its progress, a line of JSON each time."""
    reading, writing = os.pipe()

    def listen() -> None:
        with open(reading, encoding="utf-8") as lines:
            for line in lines:
                progress(*json.loads(line))

    listener = Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield writing
    finally:
        os.close(writing)
        listener.join(timeout=1)


def run_process(
    command: Sequence[str],
    *,
    timeout: float | None,
    environment: Mapping[str, str],
    log: TextIO | None = None,
    kept_open: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` and return what it wrote; past ``timeout`` seconds it and its own children are ended.

    ``kept_open`` are descriptors that it gets.

    Raises:
        RuntimeError: it took longer.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment),
        process_group=0,
        pass_fds=kept_open,
    )
    out = err = ""
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RuntimeError(f"not done after {timeout:.0f} s") from None
        raise
    finally:
        if log is not None:
            log.write(f"$ {' '.join(command)}\n{err}\n")
            log.flush()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _signal(code: int) -> str | None:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else None


def tell(done: int, total: int, doing: str = "") -> None:
    """The child's side: so many of so many are done, and what comes next, for the progress of :func:`run_in_child`."""
    if told := os.environ.get(_TOLD):
        os.write(int(told), f"{json.dumps([done, total, doing])}\n".encode())


def serve(functions: Mapping[str, Callable[..., dict[str, Any]]], argv: list[str]) -> int:
    """The child's side: run what is named in ``argv`` with the settings that follow it."""
    name, settings = argv
    try:
        found = functions[name](**json.loads(settings))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Exception as error:
        traceback.print_exc()
        # Last, because that is what is reported: JAX ends a traceback with remarks of its own.
        print(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}", file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0
