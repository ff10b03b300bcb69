"""The measurements of ``medllm bench`` that run in a process of their own (:mod:`medllm.host.child`)."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medllm.bench.profile import OPERATORS
from medllm.bench.work import measurements
from medllm.host.child import serve
from medllm.run import write_json


def matmul(rows: int, inner: int, columns: int, repeats: int = 20) -> dict[str, Any]:
    """The rate of an fp32 product [rows, inner] x [columns, inner]ᵀ as a linear layer takes it: a yardstick for the rest."""
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - start)
    return {"gflops": 2 * rows * inner * columns / statistics.median(times) / 1e9}


@contextmanager
def profiler(folder: str) -> Iterator[None]:
    """Writes a trace for Perfetto or chrome://tracing into ``folder``, and what each operator took."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(with_flops=True) as trace:
        yield
    trace.export_chrome_trace(str(Path(folder) / "trace.json.gz"))
    operators = [
        {"name": one.key, "runs": one.count, "seconds": one.self_cpu_time_total / 1e6, "flops": one.flops}
        for one in trace.key_averages()
        if one.key.startswith("aten::")
    ]
    operators.sort(key=lambda one: -one["seconds"])
    write_json(Path(folder) / OPERATORS, operators)


if __name__ == "__main__":
    sys.exit(serve({"matmul": matmul, **measurements("torch", profiler)}, sys.argv[1:]))
