"""The report's figures as SVG, in the colours of a light and of a dark page.

Colours are Okabe and Ito's, which stay apart for every kind of colour vision; what a colour says is also said by place, marker
or label. Text stays text in the SVG, so that a label in Japanese is set by the reader's own fonts.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from medllm.report.labels import shortened, spread, wrapped
from medllm.report.results import StudyTable
from medllm.report.study import Composition, RunSummary

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8A8A")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 5.2  # inches: a column of the page, and of a telephone, where text must still be text
_CURVES = ("loss", "dpo_loss", "nll", "margins", "accuracies", "chosen", "rejected", "learning_rate", "grad_norm")
_PANELS = 6


INK, FAINT = "#1c2430", "#c9d0d9"
"""Text and rules of a light page; the background is the page's own."""
_DARK = {INK: "#e4e8ee", FAINT: "#46505e"}
"""What stands for them on a dark page."""


@dataclass(frozen=True)
class Figure:
    """A drawn figure: its heading, what it shows in words, and the SVG source for a light and a dark page."""

    title: str
    caption: str
    light: str
    dark: str

    @property
    def light_uri(self) -> str:
        """The light SVG as a data URI."""
        return _data_uri(self.light)

    @property
    def dark_uri(self) -> str:
        """The dark SVG as a data URI."""
        return _data_uri(self.dark)


def scores(table: StudyTable) -> Figure:
    """Bars of every setting for every model, with their intervals."""

    def draw() -> Canvas:
        settings, rows = table.settings, table.rows
        thick = 0.76 / len(settings)
        canvas, axes = new_canvas(WIDTH, 0.9 + len(rows) * (0.2 + 0.3 * len(settings)))
        for place, setting in enumerate(settings):
            here = [(index, row.scores[setting].score) for index, row in enumerate(rows) if setting in row.scores]
            heights = [index + (place - (len(settings) - 1) / 2) * thick for index, _ in here]
            values = [score.value for _, score in here]
            errors = [[max(0.0, s.value - s.low) for _, s in here], [max(0.0, s.high - s.value) for _, s in here]]
            axes.barh(
                heights,
                values,
                thick * 0.92,
                xerr=errors,
                label=setting,
                color=_colour(place),
                hatch="////" if place % 2 else None,
                edgecolor="white",
                linewidth=0,
                error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1.1},
            )
            for height, (_, score) in zip(heights, here, strict=True):
                axes.text(min(score.high, 1) + 0.012, height, f"{score.value:.3f}", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [wrapped(row.model) for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.09)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.set_xlabel("points earned / points possible")
        axes.grid(axis="x")
        _legend_above(axes, 1 if len(settings) > 2 else len(settings))
        return canvas

    caption = f"Bars are scores, whiskers {table.draw.confidence:.0%} bootstrap intervals over problems."
    return render_figure("Score in each setting", caption, draw)


def slopes(table: StudyTable) -> Figure | None:
    """From the score without to the score with explanation, a line a model; None where the study has only one of the two."""
    pair = table.stability_settings
    rows = [row for row in table.rows if row.stability is not None]
    if pair is None or not rows:
        return None
    plain, explained = pair

    def draw() -> Canvas:
        canvas, axes = new_canvas(WIDTH, 3.8)
        ends = [(row.scores[plain].score, row.scores[explained].score) for row in rows]
        values = [score.value for end in ends for score in end]
        low, high = min(values), max(values)
        room = max(0.12 * (high - low), 0.02)
        apart = (high - low + 2 * room) / 13
        left = spread([start.value for start, _ in ends], apart)
        right = spread([end.value for _, end in ends], apart)
        axes.set_ylim(min(low - room, *left, *right) - apart / 2, max(high + room, *left, *right) + apart / 2)
        for index, (row, (start, end)) in enumerate(zip(rows, ends, strict=True)):
            colour = _colour(index)
            axes.plot([0, 1], [start.value, end.value], color=colour, marker=_MARKERS[index % len(_MARKERS)], linewidth=2.2)
            axes.text(-0.05, left[index], f"{start.value:.3f}", ha="right", va="center")
            axes.text(1.05, right[index], f"{end.value:.3f}  {shortened(row.model)}", ha="left", va="center")
            axes.plot([1.008, 1.04], [end.value, right[index]], color=colour, linewidth=1, clip_on=False)
            axes.plot([-0.04, -0.008], [left[index], start.value], color=colour, linewidth=1, clip_on=False)
        axes.set_xlim(-0.36, 2.3)
        axes.set_xticks([0, 1], [plain, explained])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        for side in (0, 1):
            axes.axvline(side, color=FAINT, linewidth=1, zorder=0)
        return canvas

    caption = "A level line keeps its score when the model has to explain itself first; a falling one loses points."
    return render_figure("Does explaining cost points?", caption, draw)


def stabilities(table: StudyTable) -> Figure | None:
    """Stability of each model with its interval; None where the study has no two settings to compare."""
    rows = [row for row in table.rows if row.stability is not None]
    if not rows:
        return None

    def draw() -> Canvas:
        canvas, axes = new_canvas(WIDTH, 0.9 + 0.42 * len(rows))
        for index, row in enumerate(rows):
            estimate = row.stability
            assert estimate is not None
            errors = [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]
            axes.errorbar(
                estimate.value,
                index,
                xerr=errors,
                color=_colour(index),
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=8,
                capsize=4,
                linewidth=1.8,
            )
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(rows)), [wrapped(row.model) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("score with explanation - score without")
        axes.grid(axis="x")
        return canvas

    caption = f"Whiskers are {table.draw.confidence:.0%} paired bootstrap intervals. Left of zero, explaining costs points."
    return render_figure("Stability", caption, draw)


def training_curves(run: RunSummary) -> Figure | None:
    """What a training run logged, a panel a metric; None where it logged nothing."""
    names = _curve_names(run.metrics)
    if not names:
        return None

    def draw() -> Canvas:
        columns = min(2, len(names))
        lines = -(-len(names) // columns)
        canvas, grid = plt.subplots(lines, columns, figsize=(WIDTH, 1.9 * lines + 0.2), squeeze=False, layout="constrained")
        for axes, name in zip(grid.flat, names, strict=False):
            points = [(line["step"], line[name]) for line in run.metrics if name in line]
            axes.plot(
                *zip(*points, strict=True),
                color=_colour(0),
                linewidth=1.5,
                marker="o" if len(points) < 25 else None,
                markersize=3,
            )
            axes.set_title(name, fontsize=10)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.ticklabel_format(axis="y", scilimits=(-3, 4))
            axes.grid(axis="y")
        for axes in grid[-1]:
            axes.set_xlabel("optimizer step")
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        return canvas

    return render_figure(f"Training: {run.name}", f"What the {run.stage} stage logged, by optimizer step.", draw)


def kinds(breakdown: Mapping[str, Mapping[tuple[str, str], float]], kind_name: str, counts: Mapping[str, int]) -> Figure | None:
    """Score by kind of problem, one panel a setting, one column a model; None where there is nothing to break down."""
    cells = list(dict.fromkeys(cell for row in breakdown.values() for cell in row))
    if len(breakdown) < 2:
        return None
    settings = list(dict.fromkeys(setting for _, setting in cells))
    models = list(dict.fromkeys(model for model, _ in cells))
    labels = [f"{kind} ({counts[kind]})" for kind in breakdown]

    def draw() -> Canvas:
        canvas, grid = plt.subplots(
            len(settings),
            1,
            figsize=(WIDTH, 1.0 + len(settings) * (0.6 + 0.3 * len(breakdown))),
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        for axes, setting in zip(grid[:, 0], settings, strict=True):
            for index, model in enumerate(models):
                cell = (model, setting)
                found = [(row[cell], place) for place, row in enumerate(breakdown.values()) if cell in row]
                if found:
                    style = {"color": _colour(index), "marker": _MARKERS[index % len(_MARKERS)]}
                    axes.plot(
                        *zip(*found, strict=True), linestyle="none", markersize=7, alpha=0.9, label=shortened(model), **style
                    )
            axes.set_title(setting, fontsize=10)
            axes.set_xlim(-0.03, 1.03)
            axes.set_yticks(range(len(labels)), [wrapped(label) for label in labels])
            axes.set_ylim(len(labels) - 0.5, -0.5)
            axes.grid(axis="both")
        grid[-1, 0].set_xlabel("score")
        handles, names = grid[0, 0].get_legend_handles_labels()
        canvas.legend(handles, names, loc="outside upper center", ncols=min(2, len(models)), frameon=False)
        return canvas

    return render_figure(
        f"Score by {kind_name}", f"Number of problems in brackets. A {kind_name} of few problems says little.", draw
    )


def preferences(composition: Composition, name: str) -> Figure:
    """How many problems give which pairs, and how often the sampled answers were right."""

    def draw() -> Canvas:
        canvas, (left, right) = plt.subplots(2, 1, figsize=(WIDTH, 4.2), layout="constrained")
        names = ("chosen and rejected", "chosen only", "rejected only", "ground truth only")
        counts = (composition.both, composition.only_chosen, composition.only_rejected, composition.neither)
        bars = left.barh(names, counts, color=[_colour(index) for index in (2, 0, 1, 6)])
        left.bar_label(bars, padding=4)
        left.invert_yaxis()
        left.set_xlim(0, max(*counts, 1) * 1.15)
        left.set_xlabel("problems")
        left.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        right.bar(list(composition.right_counts), list(composition.right_counts.values()), color=_colour(0), width=0.8)
        right.set_xlabel("chosen (right) responses of a problem")
        right.set_ylabel("problems")
        right.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        right.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axes, along in ((left, "x"), (right, "y")):
            axes.grid(axis=along)
        return canvas

    caption = (
        f"{composition.problems} problems, {composition.chosen} chosen and {composition.rejected} rejected responses. "
        "Only a problem with both gives all three pairs of the hierarchy ground truth > chosen > rejected."
    )
    return render_figure(f"Preference data: {name}", caption, draw)


def _curve_names(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    logged = list(dict.fromkeys(name for line in metrics for name in line if name != "step"))
    known = [name for curve in _CURVES for name in logged if name.rsplit("/", 1)[-1] == curve]
    return [*known, *(name for name in logged if name not in known)][:_PANELS]


def render_figure(title: str, caption: str, draw: Callable[[], Canvas]) -> Figure:
    """Draw in the report's style, in the colours of a light page; a dark page has its own in their place."""
    light = _svg(draw)
    return Figure(title, caption, light, re.sub(r'style="[^"]*"', lambda style: _in_dark(style[0]), light))


def _in_dark(style: str) -> str:
    for ours, theirs in _DARK.items():
        style = style.replace(ours, theirs)
    return style


def _svg(draw: Callable[[], Canvas]) -> str:
    with _style():
        canvas = draw()
        text = io.StringIO()
        # No date and no creator: the same study gives the same bytes.
        canvas.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(canvas)
    return text.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "medllm",
        "text.parse_math": False,
        "font.size": 11,
        "hatch.linewidth": 0.6,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Noto Sans", "Helvetica", "Arial"],
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.edgecolor": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
    }
    with plt.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's fonts have it
        yield


def new_canvas(width: float, height: float) -> tuple[Canvas, Axes]:
    """An empty figure of so many inches, with one pair of axes."""
    return plt.subplots(figsize=(width, height), layout="constrained")


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2)


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")
