"""Where the time of a profiled step went: pure functions from the events of a trace and the text of its programs to a table.

Each thread's events nest. An instant belongs to the innermost operation on each thread; where several threads are at work on
operations of their own, each operation gets an equal part of it. So the seconds of all operations, and those in which none
ran, add up to the time from a program's first operation to its last. An operation that a library spreads over other threads
has its event on the thread that called it alone, and counts once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medllm.bench.compiled_text import CONTROL, CompiledText, Instruction

BETWEEN = "between operations"
_REST = "everything else"
_OPTIMIZER = frozenset({"jit_add", "jit_update"})
# By the innermost file on the stack that is one of these.
_PLACES = {
    "jax_medllm/model/attention/": "attention",
    "jax_medllm/generate/cached_attention.py": "attention",
    "jax_medllm/model/logprobs.py": "head",
    "jax_medllm/model/linear.py": "weights",
    "jax_medllm/model/nf4.py": "weights",
}
_ORDER = (
    *("weights", "LoRA", "attention", "attention, rest", "head", "head, rest"),
    *("elementwise and copies", "optimizer", "unknown"),
)
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mkldnn_linear"})
_PHASES = ("forward", "recomputed", "backward", "")


@dataclass(frozen=True)
class Event:
    """An operation on a thread: seconds, the program and the run it belongs to, and the instruction."""

    thread: int
    start: float
    end: float
    program: str
    run: str
    instruction: str


@dataclass(frozen=True)
class Operation:
    """What one instruction took over a whole trace.

    Attributes:
        program: Its program.
        name: The instruction.
        runs: How often it ran.
        seconds: In all.
        part: What it is part of: products of the layers' ``weights``, of ``LoRA``, of ``attention`` and of the ``head``, what
            else those two do, ``elementwise and copies`` anywhere else, the ``optimizer``, or ``unknown``.
        phase: ``forward``, ``recomputed``, ``backward``, or empty.
        instruction: What it is; None where no program's text has it.
    """

    program: str
    name: str
    runs: int
    seconds: float
    part: str
    phase: str
    instruction: Instruction | None = field(repr=False)

    @property
    def flops(self) -> int:
        """Floating-point operations of its matrix products, in all runs."""
        return self.runs * self.instruction.flops if self.instruction else 0


@dataclass(frozen=True)
class Profile:
    """All operations, most seconds first, and the seconds of all runs of their programs."""

    operations: tuple[Operation, ...]
    seconds: float


@dataclass(frozen=True)
class Row:
    """A line of the table: seconds and floating-point operations of a step."""

    name: str
    seconds: float
    flops: float


def read_events(trace: Mapping[str, Any], programs: Collection[str] | None = None) -> list[Event]:
    """The operations in a trace (Chrome's format, times in µs) of the programs named, of all when None."""
    found = []
    for event in trace["traceEvents"]:
        given = event.get("args", {})
        if event.get("ph") != "X" or "hlo_op" not in given:
            continue
        program = given["hlo_module"]
        if programs is None or program in programs:
            start = event["ts"] / 1e6
            run = str(given.get("run_id", ""))
            found.append(Event(event["tid"], start, start + event["dur"] / 1e6, program, run, given["hlo_op"]))
    return found


def profile(events: Sequence[Event], texts: Iterable[CompiledText], rank: int = 0) -> Profile:
    """What each instruction took.

    Args:
        events: The trace's operations.
        texts: The programs; of several with one name a run gets the one that has most of its instructions.
        rank: Of the adapter: a product of the linear layers with a side of this length is one of LoRA's.
    """
    of_run = _programs(events, tuple(texts))
    working = [event for event in events if not _controls(event, of_run[event.program, event.run])]
    seconds = _own_seconds(working)
    runs = Counter((event.program, event.run, event.instruction) for event in working)
    spans: dict[tuple[str, str], tuple[float, float]] = {}
    for event in events:
        first, last = spans.get((event.program, event.run), (event.start, event.end))
        spans[event.program, event.run] = min(first, event.start), max(last, event.end)
    merged: dict[tuple[str, str, Instruction | None], list[float]] = defaultdict(lambda: [0, 0.0])
    for key, count in runs.items():
        program, run, name = key
        text = of_run[program, run]
        one = merged[program, name, text.instructions.get(name) if text else None]
        one[0] += count
        one[1] += seconds[key]
    operations = [
        Operation(program, name, int(count), spent, *_kind(program, instruction, rank), instruction)
        for (program, name, instruction), (count, spent) in merged.items()
    ]
    operations.sort(key=lambda one: -one.seconds)
    return Profile(tuple(operations), sum(last - first for first, last in spans.values()))


def rows(found: Profile, steps: int, least: float = 0.002) -> list[Row]:
    """The table: a row for each part and phase, those below ``least`` of the whole in one, what is between operations last."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    flops: dict[tuple[str, str], float] = defaultdict(float)
    for one in found.operations:
        seconds[one.part, one.phase] += one.seconds / steps
        flops[one.part, one.phase] += one.flops / steps
    whole = found.seconds / steps
    keys = sorted(seconds, key=lambda key: (_ORDER.index(key[0]), _PHASES.index(key[1])))
    shown = [key for key in keys if seconds[key] >= least * whole]
    table = [Row(", ".join(filter(None, key)), seconds[key], flops[key]) for key in shown]
    rest = [key for key in keys if key not in shown]
    if rest:
        table.append(Row(_REST, sum(seconds[key] for key in rest), sum(flops[key] for key in rest)))
    return [*table, Row(BETWEEN, max(0.0, whole - sum(seconds.values())), 0.0)]


def operator_rows(operators: Sequence[Mapping[str, Any]], steps: int) -> list[Row]:
    """The table of a framework that runs operators one by one.

    Args:
        operators: Of each the ``name``, the ``seconds`` it took without those it calls, and its ``flops``.
        steps: Steps in the trace.
    """
    found = {name: [0.0, 0.0] for name in ("matrix products", "attention", "elementwise, copies and the rest")}
    products, attention, rest = found.values()
    for one in operators:
        name = one["name"]
        attends = "attention" in name or "flash" in name
        kind = attention if attends else products if name.rsplit("::", 1)[-1] in _PRODUCTS else rest
        kind[0] += one["seconds"] / steps
        kind[1] += one["flops"] / steps if kind is products else 0.0
    return [Row(name, seconds, flops) for name, (seconds, flops) in found.items()]


def lines(table: Sequence[Row], matrix_gflops: float | None, unit: str = "step") -> list[str]:
    """The table as text: what, seconds, share of the whole, and for products their rate and its share of ``matrix_gflops``.

    Args:
        table: Its rows.
        matrix_gflops: The machine's rate, where it is known.
        unit: What the whole is.
    """
    whole = sum(row.seconds for row in table) or 1.0
    said = [f"{'':<36} {f's a {unit}':>9} {'share':>7} {'GFLOP/s':>8} {'of the matrix rate':>19}"]
    for row in [*table, Row(unit, whole, sum(row.flops for row in table))]:
        line = f"{row.name:<36} {row.seconds:>9.4f} {row.seconds / whole:>7.1%}"
        if row.flops and row.seconds:
            rate = row.flops / row.seconds / 1e9
            line += f" {rate:>8.1f}" + (f" {rate / matrix_gflops:>19.0%}" if matrix_gflops else "")
        said.append(line)
    return said


def longest(found: Profile, steps: int, count: int = 5) -> list[str]:
    """The instructions that take most, a line each: seconds of a step, share, result, and the end of their operation's path."""
    said = []
    for one in found.operations[:count]:
        shape, operation = (one.instruction.shape.split("{")[0], one.instruction.operation) if one.instruction else ("", "")
        where = "/".join(operation.split("/")[-2:])
        kind = ", ".join(filter(None, (one.part, one.phase)))
        spent = f"{one.seconds / steps:>9.4f} {one.seconds / found.seconds:>7.1%}"
        said.append(f"{one.name:<36} {spent}  {kind}: {shape} {where}")
    return said


def tab_separated(found: Profile, steps: int) -> str:
    """All instructions as a table for a spreadsheet, most seconds first."""
    said = ["seconds a step\tshare\truns a step\tGFLOP/s\tpart\tphase\tprogram\tinstruction\tresult\toperation"]
    for one in found.operations:
        rate = f"{one.flops / one.seconds / 1e9:.1f}" if one.flops and one.seconds else ""
        shape, operation = (one.instruction.shape, one.instruction.operation) if one.instruction else ("", "")
        figures = f"{one.seconds / steps:.6f}\t{one.seconds / found.seconds:.4f}\t{one.runs / steps:g}\t{rate}"
        said.append(f"{figures}\t{one.part}\t{one.phase}\t{one.program}\t{one.name}\t{shape}\t{operation}")
    return "\n".join(said) + "\n"


def _programs(events: Sequence[Event], texts: Sequence[CompiledText]) -> dict[tuple[str, str], CompiledText | None]:
    """The text of the program of each run."""
    names: dict[tuple[str, str], set[str]] = defaultdict(set)
    for event in events:
        names[event.program, event.run].add(event.instruction)
    found: dict[tuple[str, str], CompiledText | None] = {}
    for (program, run), used in names.items():
        known = [text for text in texts if text.name == program]
        found[program, run] = max(known, key=lambda text: len(used & text.instructions.keys()), default=None)
    return found


def _controls(event: Event, text: CompiledText | None) -> bool:
    """Whether the event is of an instruction that only runs others."""
    instruction = text.instructions.get(event.instruction) if text else None
    opcode = instruction.opcode if instruction else event.instruction.split(".")[0]
    return opcode in CONTROL


def _own_seconds(events: Sequence[Event]) -> dict[tuple[str, str, str], float]:
    """Seconds of each instruction of each run."""
    changes: list[tuple[float, int, tuple[str, str, str]]] = []
    threads: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.thread].append(event)
    for own in threads.values():
        for start, end, key in _innermost(own):
            changes += [(start, 1, key), (end, 0, key)]
    changes.sort(key=lambda change: change[:2])
    seconds: dict[tuple[str, str, str], float] = defaultdict(float)
    active: Counter[tuple[str, str, str]] = Counter()
    before = 0.0
    for time, begins, key in changes:
        for one, count in active.items():
            seconds[one] += count * (time - before) / active.total()
        before = time
        active[key] += 1 if begins else -1
        if not active[key]:
            del active[key]
    return seconds


def _innermost(events: Sequence[Event]) -> list[tuple[float, float, tuple[str, str, str]]]:
    """A thread's time cut into pieces, each with the innermost of the events around it."""
    pieces: list[tuple[float, float, tuple[str, str, str]]] = []
    around: list[Event] = []
    reached = 0.0

    def advance(to: float) -> None:
        nonlocal reached
        if around and to > reached:
            inner = around[-1]
            pieces.append((reached, to, (inner.program, inner.run, inner.instruction)))
        reached = max(reached, to)

    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        while around and around[-1].end <= event.start:
            advance(around[-1].end)
            around.pop()
        advance(event.start)
        around.append(event)
    while around:
        advance(around[-1].end)
        around.pop()
    return pieces


def _kind(program: str, instruction: Instruction | None, rank: int) -> tuple[str, str]:
    """Part and phase of an instruction."""
    if program in _OPTIMIZER:
        return "optimizer", ""
    if instruction is None:
        return "unknown", ""
    return _part(instruction, rank), _phase(instruction.operation)


def _part(instruction: Instruction, rank: int) -> str:
    place = next((name for file in instruction.files for end, name in _PLACES.items() if end in file), None)
    if not instruction.products:
        return f"{place}, rest" if place in ("attention", "head") else "elementwise and copies"
    if place in ("attention", "head"):
        return place
    if any(rank in product.sides for product in instruction.products):
        return "LoRA"
    return "weights" if place else "head"  # generation takes the logits of a few tokens in the model itself


def _phase(operation: str) -> str:
    if "rematted_computation" in operation:
        return "recomputed"
    return "backward" if "transpose(" in operation else "forward"
