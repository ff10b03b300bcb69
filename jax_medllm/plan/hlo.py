"""Reads a compiled program's text: what it sends between devices, and what it moves through memory.

XLA's cost analysis counts a loop's body once and is missing on some platforms. Here everything counts as often as the loops
around it run.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax_medllm.plan.replica_groups import replica_groups
from medllm.hlo import ArrayType, Line, arrays, read_computations

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_INTEGER = re.compile(r"-?\d+")
_INDEX = re.compile(r"index=(\d+)")
# Name things without moving them.
_FREE = frozenset(
    {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
    | {"while", "call", "conditional", "async-start"}  # what they call is counted
)
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and type in a program's run.

    Attributes:
        kind: ``all-gather`` and so on.
        dtype: Of its elements.
        devices: In each of its groups.
        times: How often a device takes part.
        bytes: What a device sends, in all: ``(n - 1) / n`` of the result of a gather, of the argument of a scatter and an
            all-to-all, twice that of a reduction, and the argument of a permutation.
    """

    kind: str
    dtype: str
    devices: int
    times: int
    bytes: int


class Program:
    """A compiled program.

    Args:
        text: As ``compiled.as_text()`` gives it.
        while_trips: Rounds of a loop whose number of rounds the compiler does not know.
    """

    def __init__(self, text: str, while_trips: int = 1):
        self._computations, self._entry = read_computations(text)
        self._while_trips = while_trips
        self._types = {name: {line.name: line.type for line in lines} for name, lines in self._computations.items()}

    def collectives(self) -> list[Collective]:
        """All that is sent between devices in one run, most bytes first."""
        times: dict[tuple[str, str, int], float] = defaultdict(int)
        sent: dict[tuple[str, str, int], float] = defaultdict(int)
        started: set[Any] = set()
        alone = {computation for computation, _ in self._runs(fused=False)}
        for computation, runs in self._runs(fused=True):
            types = self._types[computation]
            for line in self._computations[computation]:
                kind = line.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                devices = 2 if kind == "collective-permute" else replica_groups(line.attributes).shape[1]
                if devices == 1:
                    continue
                sent_arrays = [array for name in line.operands for array in arrays(types[name])]
                channel = _CHANNEL.search(line.attributes)
                if channel and computation not in alone:
                    # A TPU's compiler writes one collective in each of the products that it goes on beside. The channel alone
                    # does not tell: those of shard_map all have the same.
                    one = (channel[1], kind, *(array[:2] for array in sent_arrays))
                    if one in started:
                        continue
                    started.add(one)
                sizes: dict[str, int] = defaultdict(int)
                for array in sent_arrays:
                    sizes[array.dtype] += _size(array)
                for dtype, size in sizes.items():
                    times[kind, dtype, devices] += runs
                    sent[kind, dtype, devices] += runs * round(size * _share(kind, devices))
        found = [Collective(*key, round(times[key]), round(sent[key])) for key in times]
        return sorted(found, key=lambda one: (-one.bytes, one.kind))

    def traffic(self) -> int:
        """Bytes read from and written to the main memory in one run: arguments and results of everything that is not fused.

        What a fused operation reads only slices of counts with those slices, what it updates a slice of with that slice.
        Arrays in a memory space of their own (``S(1)``, a TPU's vector memory) are not in the main memory.
        """
        return round(
            sum(
                runs * sum(self._moved(computation, line) for line in self._computations[computation])
                for computation, runs in self._runs(fused=False)
            )
        )

    def _runs(self, fused: bool) -> Iterator[tuple[str, float]]:
        """Computations and how often each runs, a choice's as often as each other; with or without the insides of fused
        operations."""
        waiting: list[tuple[str, float]] = [(self._entry, 1)]
        while waiting:
            computation, runs = waiting.pop()
            yield computation, runs
            for line in self._computations[computation]:
                called = line.called()
                if line.opcode == "while":
                    rounds = runs * self._rounds(computation, line)
                    waiting += [(called["body"], rounds), (called["condition"], rounds)]
                elif line.opcode in ("call", "async-start"):
                    waiting += [(name, runs) for name in called.values()]
                elif line.opcode == "conditional":
                    waiting += [(name, runs / len(called)) for name in called.values()]
                elif line.opcode == "fusion" and fused:
                    waiting.append((called["calls"], runs))

    def _rounds(self, computation: str, loop: Line) -> int:
        """Of a loop: as the compiler says, or up to the number its counter is compared with."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        condition = {line.name: line for line in self._computations[loop.called()["condition"]]}
        before = {line.name: line for line in self._computations[computation]}
        initial = before[loop.operands[0]]

        def constant(name: str) -> int | None:
            line = condition.get(name)
            if line is not None and line.opcode == "get-tuple-element" and initial.opcode == "tuple":
                line = before.get(initial.operands[int(_INDEX.findall(line.attributes)[0])])
                while line is not None and line.opcode in ("copy", "bitcast"):
                    line = before.get(line.operands[0])
            is_number = line is not None and line.opcode == "constant" and _INTEGER.fullmatch(line.arguments)
            return int(line.arguments) if line is not None and is_number else None

        for line in condition.values():
            if line.opcode == "compare" and "direction=LT" in line.attributes:
                start, end = (constant(name) for name in line.operands)
                if end is not None:
                    return end - (start or 0)
        return self._while_trips

    def _moved(self, computation: str, line: Line) -> int:
        if line.opcode in _FREE or line.opcode.endswith(("-done", "-update")):
            return 0
        types = self._types[computation]
        operands = [_bytes(types[name]) for name in line.operands]
        result = _bytes(line.type)
        if line.opcode.endswith("-start"):  # its result names its argument too
            if line.opcode.removesuffix("-start") not in _SLICES:
                return result
            whole = sum(_bytes(types[name], anywhere=True) for name in line.operands)
            return _bytes(line.type, anywhere=True) - whole + result - sum(operands)
        if line.opcode in _SLICES:
            return 2 * result
        if line.opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if line.opcode == "fusion":
            return self._moved_by_fusion(line, operands)
        return sum(operands) + result

    def _moved_by_fusion(self, line: Line, operands: list[int]) -> int:
        body = line.called()["calls"]
        inside = {one.name: one for one in self._computations[body]}
        collects = any(one.opcode in COLLECTIVES for one in inside.values())
        moved = untouched = 0
        for parameter, whole in zip(self._parameters(body), operands, strict=True):
            users = list(self._users(body, parameter.name))
            if collects and all(_hands_on(one) for _, one, _ in users):
                continue
            read = [_bytes(one.type, anywhere=True) for _, one, _ in users if one.opcode in _SLICES]
            updates = [(where, one) for where, one, place in users if one.opcode == "dynamic-update-slice" and place == 0]
            if users and len(read) + len(updates) == len(users):
                moved += min(whole, sum(read))
                if updates:
                    changed = sum(_bytes(self._types[where][one.operands[1]], anywhere=True) for where, one in updates)
                    untouched += max(0, whole - changed)
            else:
                moved += whole
        (root,) = (one for one in inside.values() if one.root)
        results = [_kept(array) for array in arrays(line.type)]
        if collects and root.opcode == "tuple":
            made = [inside[name].opcode not in ("parameter", *COLLECTIVES) for name in root.operands]
            results = [size for size, here in zip(results, made, strict=True) if here]
        elif collects and "AsyncCollectiveStart" in root.attributes:
            results = []
        return moved + max(0, sum(results) - untouched)

    def _parameters(self, computation: str) -> list[Line]:
        return sorted((one for one in self._computations[computation] if one.opcode == "parameter"), key=_number)

    def _users(self, computation: str, name: str) -> Iterator[tuple[str, Line, int]]:
        """Who takes ``name``: in which computation, and as which operand. What only names the same bytes counts as the array
        itself, and what a fusion within the fusion does with it as done here."""
        for one in self._computations[computation]:
            for place, operand in enumerate(one.operands):
                if operand != name:
                    continue
                if one.opcode == "bitcast":
                    yield from self._users(computation, one.name)
                    continue
                body = one.called()["calls"] if one.opcode == "fusion" else ""
                within = list(self._users(body, self._parameters(body)[place].name)) if body else []
                yield from within or [(computation, one, place)]


def _hands_on(one: Line) -> bool:
    """Of a collective that goes on beside a fused product (TPU): its buffers are the product's arguments and results."""
    return one.opcode in ("tuple", *COLLECTIVES) or "AsyncCollective" in one.attributes


def _number(parameter: Line) -> int:
    return int(parameter.arguments or 0)


def _size(array: ArrayType) -> int:
    digits = re.search(r"\d+", array.dtype)
    bits = _BITS[array.dtype] if array.dtype in _BITS else int(digits[0]) if digits else 0
    return -(-math.prod(array.dimensions) * bits // 8)


def _bytes(text: str, anywhere: bool = False) -> int:
    """Bytes of a type in the main memory, or ``anywhere``."""
    return sum(_size(array) if anywhere else _kept(array) for array in arrays(text))


def _kept(array: ArrayType) -> int:
    """Bytes of an array in the main memory."""
    return 0 if "S(" in array.layout else _size(array)


def _share(kind: str, devices: int) -> float:
    """Of a collective's argument, what a device sends."""
    other = (devices - 1) / devices
    return {"all-gather": devices - 1, "all-reduce": 2 * other, "collective-permute": 1.0}.get(kind, other)
