"""What each instruction of a compiled program is: read from the text that XLA writes with ``--xla_dump_to``.

A profile names instructions (``ynn_fusion.21``); the text says which operation of the source an instruction comes from::

    %ynn_fusion.21 = f32[2048,1408] fusion(%a, %b), calls=%fused_computation.21, metadata={op_name="jit(gradients)/
        transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/...i,oi->...o/dot_general" stack_frame_id=7}

and the tables before the first computation say which function of which file each stack frame is in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medllm.hlo import Line, arrays, read_computations

_MODULE = re.compile(r"HloModule ([\w.\-]+)")
_OPERATION = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_BATCH = re.compile(r"lhs_batch_dims=\{([\d,]*)\}")
_ENTRY = re.compile(r"^(\d+) (.*)$")
_FIELD = re.compile(r"(\w+)=(\d+)")

CONTROL = frozenset({"while", "call", "conditional"})
"""Operations whose time is that of the instructions they run."""


@dataclass(frozen=True)
class Product:
    """A matrix product: floating-point operations of one run, and its three lengths without those that are batched."""

    flops: int
    sides: tuple[int, int, int]


@dataclass(frozen=True)
class Instruction:
    """An instruction of a program.

    Attributes:
        opcode: XLA's name of what it does, ``fusion`` for several at once.
        operation: Path of the JAX operation it comes from; of its product where it has one, empty where XLA made it up.
        files: Source files on the stack where that operation was traced, the innermost first.
        products: The matrix products it computes.
        shape: Its result, as XLA writes it.
    """

    opcode: str
    operation: str
    files: tuple[str, ...]
    products: tuple[Product, ...]
    shape: str

    @property
    def flops(self) -> int:
        """Floating-point operations of its matrix products, in one run."""
        return sum(product.flops for product in self.products)


@dataclass(frozen=True)
class CompiledText:
    """A program's name and its instructions, fused ones left out."""

    name: str
    instructions: Mapping[str, Instruction]


def read_compiled(text: str) -> CompiledText:
    """The program in ``text``, as XLA writes it after its optimizations.

    Raises:
        ValueError: the text is no program.
    """
    named = _MODULE.match(text)
    if named is None:
        raise ValueError("the text does not begin with HloModule: it is no program that XLA wrote")
    computations, _ = read_computations(text)
    files = _files(text)
    inner = {line.called()["calls"] for lines in computations.values() for line in lines if line.opcode == "fusion"}
    found: dict[str, Instruction] = {}
    for name, lines in computations.items():
        if name not in inner:
            found |= {line.name: _instruction(line, lines, computations, files) for line in lines}
    return CompiledText(named[1], found)


def _instruction(
    line: Line, beside: Sequence[Line], computations: Mapping[str, Sequence[Line]], files: Mapping[int, tuple[str, ...]]
) -> Instruction:
    called = computations.get(line.called()["calls"], []) if line.opcode == "fusion" else []
    products, source = [], line
    for one, around in [(line, beside), *((one, called) for one in called)]:
        if one.opcode == "dot":
            products.append(_product(one, {other.name: other.type for other in around}))
            source = one
    operation, frame = (
        next((found for one in (source, *called) if (found := pattern.search(one.attributes))), None)
        for pattern in (_OPERATION, _FRAME)
    )
    return Instruction(
        opcode=line.opcode,
        operation=operation[1] if operation else "",
        files=files.get(int(frame[1]), ()) if frame else (),
        products=tuple(products),
        shape=line.type,
    )


def _product(line: Line, types: Mapping[str, str]) -> Product:
    (result,), (left,) = (arrays(text) for text in (line.type, types[line.operands[0]]))
    contracted, batch = (_axes(pattern, line.attributes) for pattern in (_CONTRACTED, _BATCH))
    inner = math.prod(left.dimensions[axis] for axis in contracted)
    rows = math.prod(length for axis, length in enumerate(left.dimensions) if axis not in (*contracted, *batch))
    batches = math.prod(left.dimensions[axis] for axis in batch)
    columns = math.prod(result.dimensions) // max(1, batches * rows)
    return Product(2 * math.prod(result.dimensions) * inner, (rows, inner, columns))


def _axes(pattern: re.Pattern[str], text: str) -> tuple[int, ...]:
    found = pattern.search(text)
    return tuple(int(axis) for axis in found[1].split(",") if axis) if found else ()


def _files(text: str) -> dict[int, tuple[str, ...]]:
    """Files on the stack of each frame, the innermost first."""
    tables = {name: _table(text, name) for name in ("FileNames", "FileLocations", "StackFrames")}
    frames = {number: dict(_FIELD.findall(entry)) for number, entry in tables["StackFrames"].items()}
    # jaxlib 0.10 counts parents from 1, so that the outermost frame, which has none, says 1 and not 0.
    shift = 1 if frames and frames[min(frames)].get("parent_frame_id") == "1" else 0
    names = {number: entry.strip('"') for number, entry in tables["FileNames"].items()}
    places = {number: int(dict(_FIELD.findall(entry))["file_name_id"]) for number, entry in tables["FileLocations"].items()}
    found: dict[int, tuple[str, ...]] = {}
    for number, frame in frames.items():
        parent = int(frame.get("parent_frame_id", 0)) - shift
        found[number] = (names[places[int(frame["file_location_id"])]], *found.get(parent, ()))
    return found


def _table(text: str, name: str) -> dict[int, str]:
    _, _, after = text.partition(f"\n{name}\n")
    found = {}
    for line in after.splitlines():
        entry = _ENTRY.match(line)
        if entry is None:
            break
        found[int(entry[1])] = entry[2]
    return found
