"""llama.cpp's server on a GGUF file, in a process of its own, in whichever form it is installed.

::

    python -m tests.llama_server FILE PORT
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server_process import free_port, up

BINARY = "LLAMA_SERVER"
SLOTS, CONTEXT = 2, 2048
_ROOT = Path(__file__).parents[1]
_PYTHON = [sys.executable, "-m"]


def installed() -> dict[str, list[str]]:
    """By name, how each form of it that is here is started, but for file and port.

    ``llama.cpp`` is the server itself: the binary that the environment variable ``LLAMA_SERVER`` names, or the one inside the
    package xllamacpp. ``llama-cpp-python`` is another server, written in Python over the same library.
    """
    found = {}
    if binary := os.environ.get(BINARY):
        in_fp32 = ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]
        found["llama.cpp"] = [binary, "-c", str(CONTEXT), "-np", str(SLOTS), "-t", "1", *in_fp32, "-m"]
    elif importlib.util.find_spec("xllamacpp"):
        found["llama.cpp"] = [*_PYTHON, "tests.llama_server"]
    if importlib.util.find_spec("llama_cpp"):
        found["llama-cpp-python"] = [*_PYTHON, "llama_cpp.server", "--n_ctx", str(CONTEXT), "--n_threads", "1", "--model"]
    return found


@contextmanager
def serving(start: list[str], file: Path) -> Iterator[str]:
    """The address of a server that has ``file``, up to the end of the block."""
    port = free_port()
    where = [str(port)] if start[-1] == "tests.llama_server" else ["--host", "127.0.0.1", "--port", str(port)]
    with up([*start, str(file), *where], port, file.with_suffix(".log"), answers="/v1/models", cwd=_ROOT) as address:
        yield address


def main(file: str, port: str) -> None:
    """Serve a file as ``llama-server`` does, and compute all in fp32: its flash attention keeps parts in 16 bits."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = file, ["127.0.0.1"], int(port)
    params.n_ctx, params.n_parallel = CONTEXT, SLOTS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
