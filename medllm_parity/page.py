"""What a reader sees of an audit: the table on the terminal, and one self-contained page with the heat maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, NullFormatter

from medllm.config import ALL_LINEAR
from medllm.model.quantities import LAYER
from medllm.report.plots import PALETTE, WIDTH, Figure, new_canvas, render_figure
from medllm.report.templating import page_templates
from medllm.run import atomic_path, environment, write_json
from medllm_parity.measure import Audit, Check

PAGE = "audit.html"
RESULT = "result.json"
_FAILURES_SHOWN = 20
_LABELLED_LAYERS = 12  # up to so many layers a cell has room for its number
# Scales begin near a rounding and always span so much, so that a sound model looks calm.
_DRIFT_DECADES = {"float32": (-8, -3), "bfloat16": (-4, 0)}
_EXCESS_DECADES = (-2, 2)
_FORWARD = tuple(quantity.name for quantity in LAYER)
_LIGHT, _DARK = "YlGnBu", "viridis"  # small is pale on a light page and dark on a dark one


@dataclass(frozen=True)
class Cell:
    """A field of a heat map: its number, what a reader sees on pointing at it, and how it is painted on either page."""

    text: str
    title: str
    style: str
    failed: bool


@dataclass(frozen=True)
class HeatMap:
    """A heat map of quantities over layers, with the labelled steps of its scale."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    scale: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Line:
    """A line of the table: the worst check of one quantity, over all layers."""

    quantity: str
    check: Check
    places: int
    failed: int

    @property
    def verdict(self) -> str:
        return "ok" if not self.failed else f"PARTS in {self.failed} of {self.places}" if self.places > 1 else "PARTS"

    @property
    def where(self) -> str:
        return f"layer {self.check.layer}" if self.check.layer is not None else "–"


def write_audit(out: Path, audit: Audit) -> dict[str, Any]:
    """Write ``result.json`` and the page into the folder ``out``; returns the contents of the former."""
    result = {**audit.to_json(), "environment": environment()}
    text = render(audit, result["environment"])
    write_json(out / RESULT, result)
    with atomic_path(out / PAGE) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return result


def summary(audit: Audit) -> list[str]:
    """The table as a terminal shows it, and the verdict in a line."""
    lines = table(audit)
    width = max(len(line.quantity) for line in lines)
    text = [f"{'what':{width}}  {'worst at':10}  {'error':>8}  {'reference':>9}  {'tolerance':>9}  verdict"]
    for line in lines:
        check = line.check
        numbers = f"{check.error:8.1e}  {check.reference_error:9.1e}  {check.tolerance:9.1e}"
        text.append(f"{line.quantity:{width}}  {line.where:10}  {numbers}  {line.verdict}")
    return [*text, headline(audit)]


def headline(audit: Audit) -> str:
    """The verdict in a sentence."""
    first = audit.first_divergence
    if first is None:
        return f"the two stacks agree: {len(audit.checks)} checks over {audit.layers} layers"
    off = f", {first.stack} is off" if first.stack else ""
    at = f", worst at {first.where}" if first.where else ""
    return (
        f"the two part at {first.module}: {first.quantity} (error {first.error:.1e}, tolerance {first.tolerance:.1e}{off}{at})"
    )


def table(audit: Audit) -> list[Line]:
    """One line a quantity, in the order of the computation: its worst check."""
    groups: dict[str, list[Check]] = {}
    for check in audit.checks:
        label = check.name.removeprefix(f"{check.module}: ")
        groups.setdefault(label, []).append(check)
    return [
        Line(label, max(checks, key=_excess), len(checks), sum(not check.ok for check in checks))
        for label, checks in groups.items()
    ]


def render(audit: Audit, made_on: dict[str, Any]) -> str:
    """The page as text. Everything that comes from a file or a setting is escaped."""
    templates = page_templates("medllm_parity")
    templates.filters["short"] = _short
    failures = [check for check in audit.checks if not check.ok]
    return templates.get_template("audit.html.j2").render(
        audit=audit,
        headline=headline(audit),
        lines=table(audit),
        maps=_maps(audit),
        drift=_drift_figure(audit),
        failures=failures[:_FAILURES_SHOWN],
        hidden=max(0, len(failures) - _FAILURES_SHOWN),
        facts=_facts(audit, made_on),
        labelled=audit.layers <= _LABELLED_LAYERS,
    )


def _maps(audit: Audit) -> list[HeatMap]:
    adapters = bool(audit.facts.get("adapters"))
    maps = []
    for adapter in (True, False) if adapters else (True,):
        suffix = "" if not adapters else ", adapter on" if adapter else ", adapter off"
        label = "" if adapter or not adapters else "adapter off"
        verdicts = {
            (check.quantity, check.layer): check
            for check in audit.checks
            if check.layer is not None and check.quantity in _FORWARD and check.name.endswith(f"({label})") == bool(label)
        }
        drift = {
            (drift.quantity, drift.layer): (drift.jax, f"JAX {_short(drift.jax)}, torch {_short(drift.torch)}", False)
            for drift in audit.drift
            if drift.layer is not None and drift.adapter == adapter
        }
        excess = {place: (_excess(check), _pointed(check), not check.ok) for place, check in verdicts.items()}
        maps.append(
            _heat_map(
                f"Drift{suffix}",
                "How far JAX is from the float64 truth, each stack fed with its own output of the layer before: errors add up "
                "from left to right. The largest error of a quantity over its largest magnitude.",
                audit.layers,
                drift,
                _DRIFT_DECADES[audit.facts["dtype"]],
            )
        )
        maps.append(
            _heat_map(
                f"Each layer on the same input{suffix}",
                "Error over tolerance when both stacks get the truth's state: at most 1 is agreement. A crossed field is where "
                "the two part; what follows it in the same layer is fed by it.",
                audit.layers,
                excess,
                _EXCESS_DECADES,
            )
        )
    maps.append(_gradient_map(audit))
    return [heat_map for heat_map in maps if heat_map.rows]


def _gradient_map(audit: Audit) -> HeatMap:
    """Adapter matrices over layers; of several adapters, the worst."""
    values: dict[tuple[str, int], tuple[float, str, bool]] = {}
    for check in audit.checks:
        if check.layer is not None and check.quantity.startswith("gradient of lora"):
            place = (f"{check.module.rsplit('.', 1)[1]}, {check.quantity.split()[2]}", check.layer)
            values[place] = max(values.get(place, (-1.0, "", False)), (_excess(check), _pointed(check), not check.ok))
    caption = (
        "Error over tolerance of the loss's gradient with respect to every adapter matrix, when both stacks get the truth's "
        "state and the truth's gradient at the layer's output."
    )
    names = [f"{kind}, lora_{matrix}" for kind in ALL_LINEAR for matrix in "AB"]
    return _heat_map("Adapter gradients", caption, audit.layers, values, _EXCESS_DECADES, names)


def _heat_map(
    title: str,
    caption: str,
    layers: int,
    values: Mapping[tuple[str, int], tuple[float, str, bool]],
    decades: tuple[int, int],
    names: Sequence[str] = _FORWARD,
) -> HeatMap:
    """A map whose scale spans ``decades``, and more where the values do."""
    low, high = _decades(decades, (value for value, _, _ in values.values()))

    def paint(value: float) -> str:
        place = 0.0 if value <= 0 else 1.0 if value == math.inf else (math.log10(value) - low) / (high - low)
        return _style(min(1.0, max(0.0, place)))

    def cell(quantity: str, layer: int) -> Cell | None:
        found = values.get((quantity, layer))
        if found is None:
            return None
        value, title, failed = found
        return Cell(_tiny(value), f"layer {layer}, {quantity}: {title}", paint(value), failed)

    rows = tuple(
        (name, tuple(cell(name, layer) for layer in range(layers)))
        for name in names
        if any((name, layer) in values for layer in range(layers))
    )
    every = max(1, -(-layers // 20))
    columns = tuple(str(layer) if layer % every == 0 else "" for layer in range(layers))
    scale = tuple((_power(power), paint(10.0**power)) for power in range(low, high + 1, max(1, (high - low) // 8)))
    return HeatMap(title, caption, columns, rows, scale)


def _decades(usual: tuple[int, int], values: Iterable[float]) -> tuple[int, int]:
    """Powers of ten a scale begins and ends at: the usual ones, and more where finite values lie beyond."""
    finite = [math.log10(value) for value in values if 0 < value < math.inf]
    return min([usual[0], *map(math.floor, finite)]), max([usual[1], *map(math.ceil, finite)])


def _drift_figure(audit: Audit) -> Figure | None:
    """The residual stream's distance from the truth after every layer, of both stacks."""
    last = LAYER[-1].name
    points = [d for d in audit.drift if d.layer is not None and d.quantity == last and d.adapter]
    if len(points) < 2 or not all(0 < x < math.inf for d in points for x in (d.jax, d.torch)):
        return None

    values = [getattr(d, name) for d in points for name in ("jax", "torch")]
    low, high = _decades(_DRIFT_DECADES[audit.facts["dtype"]], values)

    def draw() -> Canvas:
        canvas, axes = new_canvas(WIDTH, 2.7)
        for index, (name, marker) in enumerate((("jax", "o"), ("torch", "s"))):
            drawn: dict[str, Any] = {"color": PALETTE[index], "marker": marker if len(points) <= 40 else None, "linewidth": 2}
            label = "JAX" if name == "jax" else "torch"
            axes.plot([d.layer or 0 for d in points], [getattr(d, name) for d in points], label=label, **drawn)
        axes.set_yscale("log")
        axes.set_ylim(10.0**low, 10.0**high)  # whole decades, as in the heat map: a factor of two is a small step
        powers = range(low, high + 1, max(1, (high - low) // 8))
        axes.set_yticks([10.0**power for power in powers], list(map(_power, powers)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("after layer")
        axes.set_ylabel("error")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.legend(loc="upper left")
        return canvas

    end = points[-1]
    caption = (
        "Distance of each stack's residual stream from the float64 truth after every layer. Rounding adds up from layer to "
        "layer in both, so both curves may rise; JAX's level with torch's, or below it, is agreement. After the last layer JAX "
        f"is {end.jax / end.torch:.2f} times as far from the truth as torch."
    )
    return render_figure("Drift of the residual stream", caption, draw)


def _facts(audit: Audit, made_on: dict[str, Any]) -> list[tuple[str, str]]:
    packages = made_on.get("packages") or {}
    names = ("medllm", "jax", "flax", "torch", "transformers", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {packages[name]}" for name in names if name in packages)
    facts = {
        **{name: _plain(value) for name, value in audit.facts.items()},
        "layers": str(audit.layers),
        "date": str(made_on.get("started") or "")[:16],
        "processor": f"{made_on.get('processor') or ''}, {made_on.get('cpus')} cores",
        "packages": versions,
    }
    return [(name, value) for name, value in facts.items() if value]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)


def _excess(check: Check) -> float:
    """Error over tolerance; where nothing is tolerated, any error is infinitely too large."""
    return check.error / check.tolerance if check.tolerance else math.inf if check.error else 0.0


def _pointed(check: Check) -> str:
    text = f"error {_short(check.error)}, tolerance {_short(check.tolerance)}, torch {_short(check.reference_error)}"
    return f"{text}; {check.where}" if check.where else text


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _tiny(value: float) -> str:
    if value == 0 or value == math.inf:
        return "0" if value == 0 else "∞"
    if 0.01 <= value < 1000:
        return f"{value:.2g}" if value < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def _power(power: int) -> str:
    digits = str(abs(power)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if power == 0 else f"10{'⁻' if power < 0 else ''}{digits}"


def _style(place: float) -> str:
    """Colours of a field, 0 to 1 along the scale, for a light and a dark page, each with an ink that reads on it."""
    parts: Iterable[str] = (
        f"--{page}:{colour};--{page}-ink:{ink}"
        for page, name in (("light", _LIGHT), ("dark", _DARK))
        for colour, ink in [_colours(name, place)]
    )
    return ";".join(parts)


def _colours(name: str, place: float) -> tuple[str, str]:
    red, green, blue, _ = matplotlib.colormaps[name](0.06 + 0.88 * place)
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return matplotlib.colors.to_hex((red, green, blue)), "#14181e" if luminance > 0.2 else "#ffffff"
