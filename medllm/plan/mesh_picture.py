"""A mesh as a picture: where every device lies on a page, and which devices hold the same piece of an array.

The last two axes that are more than one device long make a grid, the longer of the two across; what is before them makes a
panel each. A grid too long for a page goes on below, as a line of text does. Lengths are in devices.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

PANELS = 8
"""More panels than these are counted, not drawn."""
_COLUMNS = ((256, 16), (1024, 32))  # up to so many devices drawn, so many stand side by side
_MOST_COLUMNS = 96
_GAP = 0.5  # between the lines of a grid of several rows that goes on below


@dataclass(frozen=True)
class Cell:
    """One device: its left upper corner, its number, its place on the mesh in words, and the piece it holds, from 1."""

    x: int
    y: float
    device: int
    place: str
    piece: int


@dataclass(frozen=True)
class Panel:
    """One grid. ``held`` is an SVG path around each device that holds piece 1, ``edges`` one around every piece."""

    title: str
    cells: tuple[Cell, ...]
    held: str
    edges: str


@dataclass(frozen=True)
class Picture:
    """All panels, which are of one size, and what is written beside each.

    Attributes:
        across: The axis across, ``""`` if there is none; ``down`` likewise.
        hidden: How many panels are not drawn.
        lines: Height of the upper edge, width and height of each line of the grid; one unless it goes on below.
        columns: Numbers above the columns; empty where the grid goes on below.
        rows: Heights and words left of the rows, or of the lines where the grid goes on below.
    """

    across: str
    down: str
    panels: tuple[Panel, ...]
    hidden: int
    lines: tuple[tuple[float, int, int], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[float, str], ...]

    @property
    def width(self) -> int:
        """The width of a panel."""
        return self.lines[0][1]

    @property
    def height(self) -> float:
        """The height of a panel."""
        return self.lines[-1][0] + self.lines[-1][2]

    @property
    def drawn(self) -> int:
        """How many devices are drawn."""
        return sum(len(panel.cells) for panel in self.panels)


def draw(mesh: Mapping[str, int], devices: Sequence[object] | None = None, cut_over: Collection[str] | None = None) -> Picture:
    """The picture of ``mesh``.

    Args:
        mesh: Sizes of the axes, in the mesh's order.
        devices: Device numbers, nested along those axes; ``None`` counts them in the mesh's order.
        cut_over: The axes over which an array is cut: devices at one place on these hold the same piece. ``None``: all axes.
    """
    long = {name: size for name, size in mesh.items() if size > 1}
    names = list(long)
    outer, inner = names[:-2], sorted(names[-2:], key=lambda name: long[name])
    down, across = ["", "", *inner][-2:]
    rows, columns = long.get(down, 1), long.get(across, 1)

    def grids(values: Int[np.ndarray, "..."]) -> Int[np.ndarray, "panels rows columns"]:
        order = [names.index(name) for name in (*outer, *inner)]
        return values.reshape(tuple(long.values())).transpose(order).reshape(-1, rows, columns)

    numbers = grids(np.arange(math.prod(long.values())) if devices is None else np.asarray(devices).reshape(-1))
    pieces = grids(_pieces(long, names if cut_over is None else cut_over))
    places = [
        ", ".join(map(" ".join, zip(outer, map(str, at), strict=True))) for at in np.ndindex(*(long[name] for name in outer))
    ]
    pitch = rows + (_GAP if rows > 1 else 0)
    width = _line_width(columns, rows * columns * min(PANELS, len(places)))
    panels = []
    for title, panel_numbers, panel_pieces in zip(places[:PANELS], numbers, pieces, strict=False):
        cells = []
        for row, column in np.ndindex(rows, columns):
            line, x = divmod(column, width)
            words = [title, f"{down} {row}" if down else "", f"{across} {column}" if across else ""]
            number, piece = int(panel_numbers[row, column]), int(panel_pieces[row, column]) + 1
            cells.append(Cell(x, line * pitch + row, number, ", ".join(filter(None, words)), piece))
        held = "".join(f"M{cell.x} {cell.y:g}h1v1h-1z" for cell in cells if cell.piece == 1)
        panels.append(Panel(title, tuple(cells), held, "".join(_edges(cells))))
    starts = range(0, columns, width)
    lines = tuple((index * pitch, min(width, columns - start), rows) for index, start in enumerate(starts))
    return Picture(
        across,
        down,
        tuple(panels),
        len(places) - len(panels),
        lines,
        columns=tuple(map(str, range(columns))) if across and len(lines) == 1 else (),
        rows=tuple((row + 0.5, str(row)) for row in range(rows) if down)
        if len(lines) == 1
        else tuple((top + rows / 2, f"{across} {n}–{n + wide - 1}") for n, (top, wide, _) in zip(starts, lines, strict=True)),
    )


def pieces_and_copies(mesh: Mapping[str, int], cut_over: Collection[str]) -> tuple[int, int]:
    """Into how many pieces an array is cut over these axes, and how many devices hold each of them."""
    pieces = math.prod(size for name, size in mesh.items() if name in cut_over)
    return pieces, math.prod(mesh.values()) // pieces


def _pieces(mesh: Mapping[str, int], cut_over: Collection[str]) -> Int[np.ndarray, "..."]:
    """The piece that each device holds, over the mesh's axes."""
    shape = tuple(size if name in cut_over else 1 for name, size in mesh.items())
    return np.broadcast_to(np.arange(math.prod(shape)).reshape(shape), tuple(mesh.values()))


def _line_width(columns: int, drawn: int) -> int:
    """How many columns stand side by side: all, or a number near the most there may be that divides them."""
    most = next((width for devices, width in _COLUMNS if drawn <= devices), _MOST_COLUMNS)
    return columns if columns <= most else max(range(most // 2, most + 1), key=lambda width: (columns % width == 0, width))


def _edges(cells: Sequence[Cell]) -> Iterator[str]:
    """The sides of each device with none beside it that holds the same piece; a side between two is drawn once."""
    at = {(cell.x, cell.y): cell.piece for cell in cells}
    for (x, y), piece in at.items():
        if at.get((x - 1, y)) != piece:
            yield f"M{x} {y:g}v1"
        if at.get((x, y - 1)) != piece:
            yield f"M{x} {y:g}h1"
        if (x + 1, y) not in at:
            yield f"M{x + 1} {y:g}v1"
        if (x, y + 1) not in at:
            yield f"M{x} {y + 1:g}h1"
