"""The text of a compiled program, as XLA writes it: computations of instructions, a line each.

::

    %add.2 = f32[8,32]{1,0} add(%dot.1, %b), metadata={op_name="jit(f)/add"}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class ArrayType(NamedTuple):
    """An array in a type: its element type, its dimensions, and its layout as text."""

    dtype: str
    dimensions: tuple[int, ...]
    layout: str


@dataclass(frozen=True)
class Line:
    """One line of a computation.

    Attributes:
        name: The instruction's.
        type: Its result's, as text.
        opcode: What it does, ``fusion`` for several operations at once.
        arguments: What stands in its parentheses: operands, the value of a constant, the number of a parameter.
        operands: Names of the instructions among them.
        attributes: The rest of the line.
        root: Whether it is what the computation returns.
    """

    name: str
    type: str
    opcode: str
    arguments: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self) -> dict[str, str]:
        """Computations it calls, by the role they have."""
        found = dict(_CALLED.findall(self.attributes))
        if branches := _BRANCHES.search(self.attributes):
            found |= {f"branch {i}": name for i, name in enumerate(_NAME.findall(branches[1]))}
        return found


class Computations(NamedTuple):
    """The lines of each computation by its name, and the name of the one that is run."""

    lines: Mapping[str, Sequence[Line]]
    entry: str


def read_computations(text: str) -> Computations:
    """All computations of a program, those that are called among them."""
    found: dict[str, list[Line]] = {}
    lines: list[Line] = []
    entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = found[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("  ") and " = " in line:
            lines.append(_read_line(line))
    return Computations(found, entry)


def arrays(text: str) -> list[ArrayType]:
    """The arrays of a type: one, or those of a tuple."""
    return [
        ArrayType(dtype, tuple(int(size) for size in sizes.split(",") if size), layout)
        for dtype, sizes, layout in _ARRAY.findall(text)
    ]


def _read_line(line: str) -> Line:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode = _OPCODE.match(rest)
    assert opcode is not None, line
    closing = _closing(rest, opcode.end() - 1)
    arguments = rest[opcode.end() : closing]
    operands = tuple(_NAME.findall(arguments))
    root = line.lstrip().startswith("ROOT ")
    return Line(name.lstrip("%"), shape, opcode[1], arguments, operands, rest[closing + 1 :], root)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at ``opening`` closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis is left open: {text}")
