"""Ways to damage a good file: its bytes, or one of the values in it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

DEEP = "[" * 5000 + "]" * 5000


def _nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf, 2**31, 2**63, 10**30, 10**6),
    *("", "x", "a", "1", "a" * 5000, "\ud800", "\x00", "\u2028", "../../x", "/etc/passwd", "x" * 300, "(a+)+$", "(", "*", "{}"),
    *([], {}, [None], {"x": None}, [[]], [1], ["a"], {"a": "b"}, _nested(40), _nested(300)),
)
"""What stands where something else was expected."""

_LINES = (
    "[",
    "{",
    "]",
    "}",
    '"',
    ",",
    "\n",
    "\r",
    "\x00",
    "\ufeff",
    "\u2028",
    "&a ",
    "*a",
    "!!int ''",
    "!!python/object:os.system",
)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """With bytes flipped, put in, cut out or doubled."""
    place, other = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + data[other:]
    if kind == 2:
        return data[:other] + data[place:]
    if kind == 3:
        return data[:place] + rng.choice(_LINES).encode("utf-8", "surrogatepass") + data[place:]
    if kind == 4:
        return data[:place] + (DEEP.encode() if rng.random() < 0.3 else rng.randbytes(3)) + data[place:]
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 40))):
        flipped[rng.randrange(len(flipped))] = rng.randrange(256)
    return bytes(flipped)


def damaged_value(value: Any, rng: random.Random) -> Any:
    """A copy, with one to three of what it holds replaced, dropped, renamed, doubled or moved."""
    root = [_copied(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(root))
        holder, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(rng.choice(("", "x", "a" * 300, "\x00", "class_path", f"{key} ")))] = holder.pop(key)
        elif kind == 2:
            holder[key] = [holder[key], _copied(holder[key])]
        elif kind == 3:
            other, there = rng.choice(places)
            holder[key] = _copied(other[there]) if there in other or isinstance(other, list) else None
        else:
            holder[key] = _copied(rng.choice(STRANGE))
    return root[0]


def _copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(holder, key or index) of everything inside, level by level."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    for one in waiting:
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys][:200]
    return found[:5000]


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """JSON, or JSON that is YAML, with its values damaged."""
    return json.dumps(damaged_value(json.loads(data), rng)).encode()


def damaged_lines(data: bytes, rng: random.Random) -> bytes:
    """JSON lines, one of them damaged in its values."""
    lines = data.split(b"\n")
    place = rng.choice([index for index, line in enumerate(lines) if line])
    lines[place] = damaged_json(lines[place], rng)
    return b"\n".join(lines)


def damaged_header(data: bytes, rng: random.Random) -> bytes:
    """safetensors, its header damaged in its values, and as long as it says."""
    size = int.from_bytes(data[:8], "little")
    header = damaged_json(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def damaged_table(data: bytes, rng: random.Random) -> bytes:
    """Parquet, written anew with columns of other names, types and values."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    name = rng.choice(list(columns))
    count = len(table)
    others: tuple[Callable[[], pa.Array], ...] = (
        lambda: pa.nulls(count),
        lambda: pa.array([2**62] * count),
        lambda: pa.array([10**30] * count, pa.decimal128(38)),
        lambda: pa.array([math.nan] * count),
        lambda: pa.array([b"\xff\xfe"] * count),
        lambda: pa.Array.from_buffers(  # texts that are no UTF-8
            pa.string(), count, [None, *pa.array([b"\xff\xfe"] * count, pa.binary()).buffers()[1:]]
        ),
        lambda: pa.array([2**62] * count, pa.timestamp("ms")),
        lambda: pa.array([2**40] * count, pa.timestamp("ns", tz="Nowhere/None")),
        lambda: pa.array([2**62] * count, pa.duration("s")),
        lambda: pa.array([2**30] * count, pa.date32()),
        lambda: pa.array([{"x": 1}] * count),
        lambda: pa.array([[["a"]]] * count),
        lambda: pa.array([[("a", 1), ("a", 2)]] * count, pa.map_(pa.string(), pa.int64())),
        lambda: pa.array(["a" * 5000] * count),
        lambda: pa.array(["x"] * count).dictionary_encode(),
    )
    kind = rng.randrange(4)
    if kind == 0:
        del columns[name]
    elif kind == 1:
        columns[rng.choice(("", "x", "a" * 300, "\u2028"))] = columns.pop(name)
    else:
        columns[name] = rng.choice(others)()
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()
