"""Several processes, each with devices of its own, that run one stage together.

JAX is a multi-controller system: every process runs the same program on the same host data, sends its own devices their parts
(:mod:`jax_medllm.mesh.layout`), and takes the same decisions from the same numbers. What differs is who writes files: the
process with number 0 (:func:`medllm.host.processes.is_primary_process`). Checkpoints are written by all of them.

They find one another by three variables, or by what JAX knows of its surroundings::

    JAX_COORDINATOR_ADDRESS   host:port of process 0, the same in all; the port is free there
    JAX_NUM_PROCESSES         how many there are; or auto: JAX finds all three, on TPU pods, under SLURM, Open MPI and the like
    JAX_PROCESS_ID            0, 1, …
    MEDLLM_HEARTBEAT_SECONDS  after how long a process that is not heard of is lost, and all others end with an error
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from medllm.errors import UserError
from medllm.host.processes import Place, take_place

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = "MEDLLM_HEARTBEAT_SECONDS"

_HEARTBEAT_SECONDS = 60
_MEETING_SECONDS = 90


def join(mesh: str) -> None:
    """Meet the other processes, where the environment names some; to be called before the first computation.

    Args:
        mesh: What ``--mesh`` says; several processes need one.

    Raises:
        UserError: the variables are incomplete or no numbers, there is no mesh, or JAX cannot begin.
    """
    found = None if jax.distributed.is_initialized() else _arguments()
    if found is not None:
        _refuse_without_mesh(mesh)
        _initialize(found)
    if jax.distributed.is_initialized():
        if jax.process_count() > 1:
            _refuse_without_mesh(mesh)
        take_place(Place(jax.process_index(), jax.process_count()))


def whole(array: Any) -> np.ndarray:
    """An array on the host of every process, wherever its parts are. All processes call it, with the same arrays in order."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return process_allgather(array, tiled=True)
    return np.asarray(array)


def everywhere(flag: bool) -> bool:
    """Whether ``flag`` is true in every process. All of them call it."""
    return bool(process_allgather(np.array(flag)).all())


def _arguments() -> dict[str, Any] | None:
    """What ``jax.distributed.initialize`` is given; None where there is one process."""
    given = {name: os.environ.get(name, "").strip() for name in (ADDRESS, COUNT, INDEX)}
    if given[COUNT] == "auto":
        return {}
    if not any(given.values()):
        return None
    missing = [name for name, value in given.items() if not value]
    if missing:
        there = ", ".join(f"{name}={value}" for name, value in given.items() if value)
        raise UserError(
            f"{there} is set without {' and '.join(missing)}; several processes need all three, or {COUNT}=auto alone where a "
            "launcher that JAX knows has started them"
        )
    count, index = (_number(name, given[name]) for name in (COUNT, INDEX))
    if not 0 <= index < count:
        raise UserError(f"{INDEX}={index} with {COUNT}={count}: a number from 0 to {COUNT} - 1 is needed, each once")
    host, _, port = given[ADDRESS].rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{ADDRESS}={given[ADDRESS]}: host:port of process 0 is needed, as in 10.0.0.1:1234")
    return {
        "coordinator_address": given[ADDRESS],
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _initialize(arguments: dict[str, Any]) -> None:
    heartbeat = _number(HEARTBEAT, os.environ.get(HEARTBEAT, "") or str(_HEARTBEAT_SECONDS))
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for a notice, and nobody here asks for it
    met = threading.Timer(_MEETING_SECONDS, _give_up, [arguments])
    met.daemon = True
    met.start()
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=heartbeat,
            initialization_timeout=2 * _MEETING_SECONDS,  # JAX aborts with a trace of its own; _give_up comes before
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        where = arguments.get("coordinator_address", f"{COUNT}=auto")
        raise UserError(f"{where}: the processes cannot meet: {reason}; see {ADDRESS}, {COUNT} and {INDEX}") from error
    finally:
        met.cancel()


def _give_up(arguments: dict[str, Any]) -> None:
    """End a process that waits in JAX's own code, where no exception reaches it."""
    count, address = arguments.get("num_processes", "all"), arguments.get("coordinator_address", "the coordinator")
    print(
        f"medllm: {count} processes were to meet at {address}, and have not within {_MEETING_SECONDS} s; start all of them, "
        f"with the same {ADDRESS} and {COUNT} and each its own {INDEX}, and see that the first can be reached",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _refuse_without_mesh(mesh: str) -> None:
    if not mesh:
        raise UserError(
            f"several processes are set up ({COUNT}), and there is no mesh to spread the stage over; add --mesh, as in "
            f"--mesh fsdp=-1, or unset {ADDRESS}, {COUNT} and {INDEX}"
        )


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise UserError(f"{name}={text}: a whole number is needed")
    return int(text)
