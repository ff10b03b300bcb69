"""Freed memory goes back to the system when asked to."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's allocator is asked")
def test_memory_that_was_freed_leaves_the_process():
    program = """
from jax_medllm.mesh.host_memory import release_free_memory
from medllm.host.memory import resident_bytes
pieces = [bytearray(60_000) for _ in range(3_000)]  # small enough to be cut from the heap
last = bytearray(60_000)  # above them: the heap cannot shrink by itself
full = resident_bytes()
del pieces
release_free_memory()
print(full - resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 120_000_000
