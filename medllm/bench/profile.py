"""``medllm bench … --profile``: the trace of each engine, read into a table of where the time went.

``DIR/jax`` holds the trace of one more run, the texts of its programs and ``operations.tsv``, every instruction of them with
its time; ``DIR/torch`` the trace and ``operations.json``, the same by operator.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

from medllm.bench.comparison import Figures
from medllm.bench.compiled_text import read_compiled
from medllm.bench.profile_table import Row, lines, longest, operator_rows, profile, read_events, rows, tab_separated
from medllm.bench.shapes import CptShape, GenerateShape, RpoShape

PROGRAMS, OPERATORS = "programs", "operations.json"
_STEP = ("jit_gradients", "jit_add", "jit_update")
_MOST_EVENTS = 1_000_000
"""Of a trace; XLA drops those that come later."""


def read_tables(
    folder: Path, shape: CptShape | RpoShape | GenerateShape, figures: Mapping[str, Figures]
) -> tuple[dict[str, list[Row]], list[str]]:
    """The tables of the traces that ``folder`` got, by engine, and the lines that say what is in them.

    Args:
        folder: What ``--profile`` names.
        shape: What was profiled.
        figures: Of each engine that was.
    """
    steps, unit = (1, "pass") if isinstance(shape, GenerateShape) else (shape.steps, "step")
    tables: dict[str, list[Row]] = {}
    said: list[str] = []
    for engine, one in figures.items():
        if engine == "jax":
            table, remarks = _compiled(folder / engine, shape, steps)
        else:
            table, remarks = _operators(folder / engine, steps), []
        said += ["", f"profile of {engine}, {'a whole pass' if unit == 'pass' else f'mean of {steps} steps'}:"]
        said += [*(lines(table, one.matmul_gflops, unit) if table else []), *remarks]
        tables[engine] = table
    return tables, said


def _compiled(folder: Path, shape: CptShape | RpoShape | GenerateShape, steps: int) -> tuple[list[Row], list[str]]:
    """The table of a trace of compiled programs, and what there is to say about it."""
    traces = sorted(folder.rglob("perfetto_trace.json.gz"))
    trace = json.loads(gzip.decompress(traces[-1].read_bytes())) if traces else {"traceEvents": []}
    training = not isinstance(shape, GenerateShape)
    events = read_events(trace, _STEP if training else None)
    if not events:
        return [], ["no operation was recorded: this jaxlib does not say what a program does on this device"]
    texts = [read_compiled(file.read_text(encoding="utf-8")) for file in sorted((folder / PROGRAMS).glob("*.txt"))]
    found = profile(events, texts, shape.model.rank if training else 0)
    (folder / "operations.tsv").write_text(tab_separated(found, steps), encoding="utf-8")
    remarks = ["most time:", *longest(found, steps), f"every operation: {folder / 'operations.tsv'}"]
    if len(trace["traceEvents"]) >= _MOST_EVENTS:
        remarks.append("the trace is full: what came later is missing; profile less work")
    return rows(found, steps), remarks


def _operators(folder: Path, steps: int) -> list[Row]:
    file = folder / OPERATORS
    return operator_rows(json.loads(file.read_text(encoding="utf-8")), steps) if file.exists() else []
