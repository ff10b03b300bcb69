"""One self-contained HTML page of a plan, or of a search for one: it opens offline, asks nothing of the network, and prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medllm.axes import MESH_AXES
from medllm.plan import mesh_picture
from medllm.plan.wording import KINDS, mesh_words
from medllm.report.templating import page_templates
from medllm.run import atomic_path

NOTICE = "Research software. A step's time here is a roofline, not a measurement: no step can take less under the rates given."

_REMEDIES = {
    "base": "NF4 instead of bf16, a wider fsdp or tensor axis, or more devices",
    "adapters": "a smaller rank, or a wider fsdp or tensor axis",
    "moments": "a smaller rank, or a wider fsdp or tensor axis",
    "cache": "fewer slots, shorter rows, or a wider tensor axis",
    "gradients": "a smaller rank, or a wider fsdp or tensor axis",
    "activations": "fewer or shorter rows a device, a remat policy that keeps less, or a wider tensor or sequence axis",
}

STAGES = {"cpt": "Continued pretraining", "rpo": "Reasoning preference optimization", "generate": "Generation"}

_NOT_KNOWN: Mapping[str, Any] = {
    "topology": "",
    "rules": "",
    "mesh_devices": None,
    "settings": {},
    "by_kind": {},
    "programs": [],
    "collectives": [],
    "seconds": {},
    "bound": "",
    "step_s": None,
    "tokens_per_s": None,
    "tokens_per_step": None,
    "parameters": [],
    "compile_s": None,
    "versions": {},
}
"""What a plan may leave out, as where the compiler refuses a program too large for the device."""


@dataclass(frozen=True)
class Part:
    """A part of a stacked bar: its name, its share of the bar in percent, its amount in words, and the class that paints it."""

    name: str
    share: float
    amount: str
    paint: str
    meaning: str = ""


@dataclass(frozen=True)
class Memory:
    """The stacked bar of one device: ``limit`` is where its memory ends, in percent of the bar."""

    parts: tuple[Part, ...]
    free: float
    limit: float


@dataclass(frozen=True)
class Bar:
    """A horizontal bar, its length in percent of the longest."""

    name: str
    share: float
    amount: str
    also: str
    parts: tuple[Part, ...] = ()
    longest: bool = False


@dataclass(frozen=True)
class Placement:
    """The arrays that are cut over the same axes of the mesh."""

    title: str
    words: str
    picture: mesh_picture.Picture
    gib: float
    arrays: tuple[Mapping[str, Any], ...]


def write_page(path: Path, plan: Mapping[str, Any]) -> None:
    """Write the page of a plan or of a search (the JSON of ``medllm plan``) to ``path``, all of it or nothing.

    Raises:
        UserError: ``path`` is a folder.
    """
    text = render(plan)
    with atomic_path(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def render(plan: Mapping[str, Any]) -> str:
    """The page as text. Everything that comes from a file or a setting is escaped."""
    templates = page_templates("medllm.plan")
    templates.filters.update(
        gib=gib, whole_gib=whole_gib, seconds=seconds, amount=amount, count=count, rate=rate, mesh=mesh_words, percent=percent
    )
    best = plan["best"] if "candidates" in plan else plan
    shown = {**_NOT_KNOWN, **best} if best else None
    return templates.get_template("plan.html.j2").render(
        notice=NOTICE,
        plan=plan,
        headline=headline(plan),
        verdict=verdict(plan),
        stage=STAGES.get(plan["stage"], plan["stage"]),
        candidates=_candidates(plan) if "candidates" in plan else None,
        shown=shown,
        remedy=_remedy(shown) if shown and not shown["fits"] else "",
        memory=_memory(shown) if shown else None,
        mesh=mesh_picture.draw(shown["mesh"], shown["mesh_devices"]) if shown else None,
        axes=[(name, size, MESH_AXES.get(name, "")) for name, size in shown["mesh"].items()] if shown else [],
        placements=_placements(shown) if shown else [],
        times=_times(shown) if shown else [],
        exchanges=_exchanges(shown) if shown else [],
        exchanged=_exchanged(shown) if shown else 0.0,
        facts=_facts(plan, shown),
    )


def headline(plan: Mapping[str, Any]) -> str:
    """Does it fit, in a sentence without a stop."""
    if "candidates" in plan and not plan["fits"]:
        return f"No candidate for {plan['model']['name']} fits on {devices(plan)}"
    return f"{plan['model']['name']} {'fits' if plan['fits'] else 'does not fit'} on {devices(plan)}"


def verdict(plan: Mapping[str, Any]) -> str:
    """What is needed and what is there, in words."""
    if "candidates" not in plan:
        return _need(plan)
    tried = plan["candidates"]
    fitting = sum(candidate["fits"] is True for candidate in tried)
    if plan.get("best"):
        best = plan["best"]
        return f"{fitting} of {len(tried)} candidates fit. The best by predicted tokens a second: {_name(best)}. {_need(best)}"
    sizes = [candidate["gib_per_device"] for candidate in tried if candidate.get("gib_per_device") is not None]
    nearest = f"; the smallest needs {gib(min(sizes))} a device" if sizes else ""
    there = f"the {gib(plan['memory_gib'])} that a program can have on one {plan['device']}"
    return f"None of {len(tried)} candidates fits in {there}{nearest}."


def devices(plan: Mapping[str, Any]) -> str:
    """``16 × v5e (4x4)``."""
    topology = f" ({plan['topology']})" if plan.get("topology") else ""
    return f"{plan['devices']} × {plan['device']}{topology}"


def _need(plan: Mapping[str, Any]) -> str:
    need, there, left = plan["gib_per_device"], plan["memory_gib"], plan["headroom_gib"]
    each = "The device" if plan["devices"] == 1 else f"Each of the {plan['devices']} devices"
    if plan["fits"]:
        share = percent(left / there)
        return f"{each} needs {gib(need)} of the {gib(there)} that a program can have; {gib(left)} ({share}) stay free."
    return f"{each} would need {gib(need)}, and a program can have {gib(there)}: {gib(-left)} too much."


def _remedy(plan: Mapping[str, Any]) -> str:
    if not plan["by_kind"]:
        return ""
    kind, most = max(plan["by_kind"].items(), key=lambda item: item[1])
    name = KINDS.get(kind, (kind, ""))[0]
    return f"Most of it is {name}, {gib(most)}." + (
        f" What would make it less: {_REMEDIES[kind]}." if kind in _REMEDIES else ""
    )


def _name(candidate: Mapping[str, Any]) -> str:
    settings = candidate.get("settings", candidate)
    named = [mesh_words(candidate["mesh"]), *(f"{key} {settings[key]}" for key in ("remat", "rows") if settings.get(key))]
    return ", ".join(named)


def _candidates(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The ranked table: those that fit in the planner's order, then the rest."""
    tried = [{"gib_per_device": None, "why": "", **candidate} for candidate in plan["candidates"]]
    rates = [candidate["tokens_per_s"] for candidate in tried if candidate["fits"]]
    return {
        "fitting": [candidate for candidate in tried if candidate["fits"] is True],
        "others": [candidate for candidate in tried if candidate["fits"] is not True],
        "columns": [key for key in ("remat", "rows") if any(candidate.get(key) is not None for candidate in tried)],
        "fastest": max(rates, default=1.0),
    }


def _memory(plan: Mapping[str, Any]) -> Memory:
    kinds = {kind: plan["by_kind"][kind] for kind in (*KINDS, *plan["by_kind"]) if plan["by_kind"].get(kind)}
    need, there = plan["gib_per_device"], plan["memory_gib"]
    kinds = kinds or {"everything": need}
    scale = max(need, there)
    parts = (
        Part(
            KINDS.get(kind, (kind,))[0], 100 * size / scale, whole_gib(size), _paint(kind, KINDS), KINDS.get(kind, ("", ""))[1]
        )
        for kind, size in kinds.items()
    )
    return Memory(tuple(parts), free=100 * max(0.0, there - need) / scale, limit=100 * there / scale)


def _paint(kind: str, known: Iterable[str]) -> str:
    names = list(known)
    return f"paint-{names.index(kind)}" if kind in names else "paint-other"


def _times(plan: Mapping[str, Any]) -> list[Bar]:
    if not plan["seconds"]:
        return []
    found, rates = plan["seconds"], plan["rates"]
    work = {"compute": f"{amount(plan['flops'], 'FLOP')} at {amount(rates['flops'], 'FLOP/s')}"}
    if "interconnect" in found:  # else the compiled program could not be read
        work["memory"] = f"{amount(plan['bytes'], 'B')} at {amount(rates['memory_bytes'], 'B/s')}"
        work["interconnect"] = f"{amount(_exchanged(plan), 'B')} at {amount(rates['link_bytes'], 'B/s')}"
    longest = max(found.values()) or 1.0
    return [
        Bar(name, 100 * taken / longest, seconds(taken), work.get(name, ""), longest=name == plan["bound"])
        for name, taken in found.items()
    ]


def _exchanged(plan: Mapping[str, Any]) -> float:
    return math.fsum(collective["bytes"] for collective in plan["collectives"])


def _exchanges(plan: Mapping[str, Any]) -> list[Bar]:
    """A bar a kind of collective, the most bytes first, made of a part a dtype."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for collective in sorted(plan["collectives"], key=lambda collective: -collective["bytes"]):
        kinds.setdefault(collective["kind"], []).append(collective)
    dtypes = list(dict.fromkeys(collective["dtype"] for one in kinds.values() for collective in one))
    totals = {kind: math.fsum(one["bytes"] for one in found) for kind, found in kinds.items()}
    most = max(totals.values(), default=0.0) or 1.0
    bars = []
    for kind, found in sorted(kinds.items(), key=lambda item: -totals[item[0]]):
        parts = tuple(
            Part(
                one["dtype"],
                100 * one["bytes"] / most,
                amount(one["bytes"], "B"),
                f"paint-{dtypes.index(one['dtype']) % len(KINDS)}",
            )
            for one in found
        )
        times = count(sum(one["times"] for one in found))
        also = f"{times} times, {seconds(math.fsum(one['seconds'] for one in found))}"
        bars.append(Bar(kind, 100 * totals[kind] / most, amount(totals[kind], "B"), also, parts))
    return bars


def _placements(plan: Mapping[str, Any]) -> list[Placement]:
    """The arrays by the axes they are cut over, the most memory first."""
    mesh: Mapping[str, int] = plan["mesh"]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for array in plan["parameters"]:
        cutting = {name for entry in array["spread"] for name in entry if mesh.get(name, 1) > 1}
        groups.setdefault(tuple(name for name in mesh if name in cutting), []).append(array)
    placements = []
    for over, found in groups.items():
        arrays = tuple(
            {
                **array,
                "kind": KINDS.get(array["kind"], (array["kind"],))[0],
                "dimensions": _dimensions(array, mesh),
            }
            for array in sorted(found, key=lambda array: (-array["gib"], array["name"]))
        )
        picture = mesh_picture.draw(mesh, cut_over=over)
        total = math.fsum(array["gib"] for array in found)
        title = f"Cut over {' and '.join(over)}" if over else "Whole on every device"
        placements.append(Placement(title, _placed(mesh, over), picture, total, arrays))
    return sorted(placements, key=lambda placement: -placement.gib)


def _placed(mesh: Mapping[str, int], over: Sequence[str]) -> str:
    pieces, copies = mesh_picture.pieces_and_copies(mesh, over)
    if pieces == 1:
        return (
            "One piece, on the one device." if copies == 1 else f"One piece, and each of the {copies} devices holds all of it."
        )
    return f"{pieces} pieces, " + ("each on one device." if copies == 1 else f"each on {copies} devices.")


def _dimensions(array: Mapping[str, Any], mesh: Mapping[str, int]) -> list[tuple[str, str]]:
    """Each dimension's length, and how it is cut: ``29,568`` and ``÷ 16 fsdp · tensor``."""
    dimensions = []
    for size, over in zip(array["shape"], array["spread"], strict=True):
        pieces = math.prod(mesh.get(name, 1) for name in over)
        dimensions.append((count(size), f"÷ {pieces} {' · '.join(over)}" if pieces > 1 else ""))
    return dimensions


def _facts(plan: Mapping[str, Any], shown: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    model = plan["model"]
    sizes = ("parameters", "layers", "width", "heads", "kv_heads", "mlp", "vocabulary")
    settings = shown["settings"] if shown else plan.get("settings", {})
    versions = shown["versions"] if shown else plan.get("versions", {})
    facts = {
        "model": model["name"],
        **{name.replace("_", " "): count(model[name]) for name in sizes if name in model},
        "target": plan["target"],
        "mesh": mesh_words(shown["mesh"]) if shown else "",
        "rules": shown["rules"] or "the standard ones" if shown else "",
        **{name.replace("_", " "): count(value) if isinstance(value, int) else str(value) for name, value in settings.items()},
        **{f"version of {name}" if name != "compiler" else name: str(value) for name, value in versions.items()},
    }
    return [(name, value) for name, value in facts.items() if value]


def gib(value: float) -> str:
    """An amount of memory given in GiB: ``15.75 GiB``, ``1.25 MiB``."""
    if abs(value) >= 0.095 or not value:
        return f"{value:,.2f} GiB"
    for unit, scale in (("MiB", 2.0**10), ("KiB", 2.0**20)):
        if abs(value) * scale >= 0.995:
            return f"{_digits(value * scale)} {unit}"
    return f"{value * 2.0**30:,.0f} B"


def whole_gib(value: float) -> str:
    """An amount of memory in GiB whatever its size, so that a column of them compares."""
    return f"{value:,.2f} GiB" if value >= 0.005 or not value else "< 0.01 GiB"


def amount(value: float, unit: str) -> str:
    """An amount with the decimal prefix that suits it, to three digits: ``910 TFLOP``, ``36 GB``."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * scale:
            return f"{_digits(value / scale)} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def seconds(value: float) -> str:
    """A time from microseconds to hours: ``180 ms``, ``4.60 s``, ``2 min 05 s``."""
    if value < 0.9995:
        return f"{_digits(value * 1e3)} ms" if value >= 0.9995e-3 else f"{value * 1e6:.0f} µs"
    if value < 99.95:
        return f"{_digits(value)} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(value: int) -> str:
    """A whole number with its thousands set apart."""
    return f"{value:,}"


def rate(value: float) -> str:
    """Tokens a second, to three digits."""
    return _digits(value) if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"


def percent(share: float) -> str:
    """A share of one: ``43 %``."""
    return f"{100 * share:.0f} %" if share >= 0.005 or not share else "< 1 %"


def _digits(value: float) -> str:
    """Three digits, and never fewer than the whole number has."""
    whole = len(str(int(abs(float(f"{value:.3g}")))))
    return f"{value:,.{max(0, 3 - whole)}f}"
