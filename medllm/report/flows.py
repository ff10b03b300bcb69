"""Where the questions go when a model has to explain itself: kept, lost or gained, and why; counted, and drawn as flows.

The drawing is plain SVG in the page, not an image: every flow is a link that opens its questions in the browser below it. It is
narrow, so that its text is still text on a telephone; a wide page sets several beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from medllm.exam.flips import CAUSES, Cause, Flip
from medllm.exam.scoring import ProblemResult
from medllm.exam.setting import explained
from medllm.report.labels import spread
from medllm.report.results import Cell
from medllm.report.statistics import Estimate, wilson

WIDTH, BAR, LEFT, RIGHT = 360, 12, 74, 190
_TOP, _BODY, _LINE, _APART = 8, 170, 17, 5
SHORT: Mapping[Cause, str] = {
    "ran_on": "ran on",
    "cut_off": "cut off",
    "unread": "unread",
    "contradicts": "contradicts itself",
    "reasoning": "wrong reasoning",
}
"""Every cause as a column's heading."""


@dataclass(frozen=True)
class Count:
    """Questions of one fate: how many, their share of all with Wilson's interval, and the link that opens them."""

    count: int
    share: Estimate
    link: str


@dataclass(frozen=True)
class Gap:
    """One model, without and with an explanation.

    Attributes:
        model: Its label.
        kept: Right both times.
        missed: Wrong both times.
        lost: By cause, right without and wrong with an explanation.
        gained: By cause of the wrong answer without one, right with it.
    """

    model: str
    kept: Count
    missed: Count
    lost: Mapping[Cause, Count]
    gained: Mapping[Cause, Count]

    @property
    def lost_in_all(self) -> int:
        """Questions lost, whatever the cause."""
        return sum(one.count for one in self.lost.values())

    @property
    def gained_in_all(self) -> int:
        """Questions gained."""
        return sum(one.count for one in self.gained.values())


@dataclass(frozen=True)
class Band:
    """One flow of the drawing: its outline, its end's label and where that stands, what it means, and what it opens."""

    kind: str
    outline: str
    label: str
    label_at: float
    end_at: float
    words: str
    link: str


@dataclass(frozen=True)
class Flows:
    """A model's drawing: two bars to the left (right and wrong without explanation), and the flows out of them."""

    model: str
    height: float
    bars: tuple[tuple[str, float, float, str], ...]
    bands: tuple[Band, ...]


def gaps(cells: Sequence[Cell], flips: Mapping[str, Sequence[Flip]], confidence: float = 0.95) -> tuple[Gap, ...]:
    """The gap of every model that was asked in both ways."""
    results = {(cell.model, cell.setting): cell.results for cell in cells}
    return tuple(
        _gap(model, plain, results[model, explained(setting)], flips[model], confidence)
        for (model, setting), plain in results.items()
        if (model, explained(setting)) in results and model in flips
    )


def _gap(
    model: str, plain: Sequence[ProblemResult], after: Sequence[ProblemResult], flips: Sequence[Flip], confidence: float
) -> Gap:
    right = {one.problem_id: bool(one.correct) for one in after}
    both = [(bool(one.correct), right[one.problem_id]) for one in plain]

    def counted(count: int, **state: str) -> Count:
        return Count(count, wilson(count, len(both), confidence), f"#{urlencode({'model': model, **state})}")

    def by_cause(lost: bool) -> dict[Cause, Count]:
        fate = "lost" if lost else "gained"
        counts = {cause: sum(flip.lost == lost and flip.cause == cause for flip in flips) for cause in CAUSES}
        return {cause: counted(count, flip=fate, cause=cause) for cause, count in counts.items()}

    return Gap(
        model,
        counted(both.count((True, True)), flip="kept"),
        counted(both.count((False, False)), flip="missed"),
        by_cause(True),
        by_cause(False),
    )


def draw(gap: Gap) -> Flows:
    """The drawing of a gap; a fate of no question has no flow."""
    fates = _fates(gap)
    tall = _BODY / (sum(fate.count for fate in fates) or 1)
    right = sum(fate.count for fate in fates if fate.was_right)
    lower = _TOP + right * tall + (_APART if right else 0)
    starts, ends, start, end = [], [], float(_TOP), float(_TOP)
    for fate in fates:
        start = start if fate.was_right else max(start, lower)
        starts.append(start)
        ends.append(end)
        start += fate.count * tall
        end += fate.count * tall + _APART
    centres = [top + fate.count * tall / 2 for top, fate in zip(ends, fates, strict=True)]
    labels = spread(centres, _LINE)
    down = max(0.0, _TOP + _LINE / 2 - min(labels, default=_TOP))
    bands = [
        Band(
            fate.kind,
            _ribbon(*place, fate.count * tall),
            f"{fate.label} {fate.count}",
            label + down,
            centre,
            fate.words,
            fate.link,
        )
        for fate, place, label, centre in zip(fates, zip(starts, ends, strict=True), labels, centres, strict=True)
    ]
    wrong = sum(fate.count for fate in fates) - right
    bars = [("right", float(_TOP), right * tall, f"right {right}"), ("wrong", lower, wrong * tall, f"wrong {wrong}")]
    bottom = max([start, end, *(band.label_at + _LINE for band in bands)])
    return Flows(gap.model, round(bottom + 4, 1), tuple(bar for bar in bars if bar[2]), tuple(bands))


@dataclass(frozen=True)
class _Fate:
    kind: str
    count: int
    label: str
    words: str
    link: str

    @property
    def was_right(self) -> bool:
        return self.kind in ("kept", "lost")


def _fates(gap: Gap) -> list[_Fate]:
    """Those that some question has, from the top of the drawing to its foot."""
    gained = f"#{urlencode({'model': gap.model, 'flip': 'gained'})}"
    lost = [
        _Fate("lost", one.count, SHORT[cause], f"right without an explanation; with one the text {CAUSES[cause]}", one.link)
        for cause, one in gap.lost.items()
    ]
    fates = [
        _Fate("kept", gap.kept.count, "still right", "right both times", gap.kept.link),
        *lost,
        _Fate("gained", gap.gained_in_all, "gained", "wrong without an explanation, right with one", gained),
        _Fate("missed", gap.missed.count, "still wrong", "wrong both times", gap.missed.link),
    ]
    return [fate for fate in fates if fate.count]


def _ribbon(start: float, end: float, thick: float) -> str:
    """A band from the left bar at ``start`` to the right one at ``end``, as high at both."""
    left, right, middle = LEFT + BAR, RIGHT, (LEFT + BAR + RIGHT) / 2
    return (
        f"M{left} {start:.1f}C{middle} {start:.1f} {middle} {end:.1f} {right} {end:.1f}"
        f"V{end + thick:.1f}C{middle} {end + thick:.1f} {middle} {start + thick:.1f} {left} {start + thick:.1f}Z"
    )
