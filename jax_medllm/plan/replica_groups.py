"""The devices that go together in a collective of a compiled program, in each way that XLA writes them.

::

    replica_groups={{0,1},{2,3}}                              listed
    replica_groups=[2,4]<=[4,2]T(1,0)                         counted through, in the order of some axes
    replica_groups=mesh['a'=2,'b'=4] {'b','a'}                along axes of a mesh, in the order in which they are named
    replica_groups=mesh['a'=8] {'a':(2)4}                     along a part of an axis: of its sizes 2, 4, … the second
"""

from __future__ import annotations

import math
import re

import numpy as np
from jaxtyping import Int

_LISTED = re.compile(r"replica_groups=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, *device_ids=\(\[([\d,]*)\](?:T\(([\d,]*)\))?\))? *\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]*)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?")
_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\((\d+)\)(\d+))?")


def replica_groups(attributes: str) -> Int[np.ndarray, "groups devices"]:
    """Those of a collective, by the attributes on its line.

    Raises:
        ValueError: they are in none of these forms.
    """
    listed = _LISTED.search(groups_written_out(attributes))
    if listed is None:
        raise ValueError(f"a collective of no known groups: {attributes[:200]}")
    return np.array([_integers(group) for group in listed[1].strip("{}").split("},{")])


def groups_written_out(text: str) -> str:
    """A program, or a part of it, with all groups listed."""
    return _IOTA.sub(_counted_groups, _MESH.sub(_mesh_groups, text))


def _mesh_groups(found: re.Match[str]) -> str:
    """Groups along some axes of a mesh, in the order in which they are named, or along parts of axes (``'a':(2)4``: of its
    sizes 2, 4, … the second)."""
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(found[1])}
    along = [(name, int(before or 1), int(part or sizes[name])) for name, _, before, part in _AXIS.findall(found[4])]
    shape: list[int] = []
    place: dict[tuple[str, int, int], int] = {}
    for name, size in sizes.items():
        reached = 1
        for axis, before, part in sorted(one for one in along if one[0] == name):
            place[axis, before, part] = len(shape) + 1
            shape += [before // reached, part]
            reached = before * part
        shape.append(size // reached)
    within = [place[one] for one in along]
    apart = [number for number in range(len(shape)) if number not in within]
    numbers = _numbers(found[2] or str(math.prod(sizes.values())), found[3]).reshape(shape)
    return _listed(numbers.transpose(apart + within).reshape(-1, math.prod(shape[number] for number in within)))


def _counted_groups(found: re.Match[str]) -> str:
    return _listed(_numbers(found[2], found[3]).reshape(_integers(found[1])))


def _numbers(shape: str, order: str | None) -> np.ndarray:
    """Devices counted through in this shape, its axes then put into an order."""
    numbers = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return numbers.transpose(_integers(order)) if order else numbers


def _listed(groups: np.ndarray) -> str:
    return f"replica_groups={{{','.join('{' + ','.join(map(str, group)) + '}' for group in groups.tolist())}}}"


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
