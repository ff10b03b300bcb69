"""Zero-shot sets by model: of each the share of problems answered right, all and by subject.

The sets are of different problems, so nothing is paired here; an interval is Wilson's, of one share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from medllm.errors import UserError
from medllm.report import paper
from medllm.report.results import Cell
from medllm.report.statistics import BOOTSTRAP, Estimate, wilson
from medllm.report.tables import interval, number


@dataclass(frozen=True)
class Share:
    """Problems answered right.

    Attributes:
        accuracy: Their share, with its interval.
        right: How many.
        problems: Of how many.
        published: The paper's figure for such a model; None where it has none.
    """

    accuracy: Estimate
    right: int
    problems: int
    published: float | None = None


@dataclass(frozen=True)
class SetRow:
    """One model in one setting (zero-shot by options, by letters, or in words).

    Attributes:
        model: Its label.
        setting: How it was asked.
        shares: By set; one that it was not asked is absent.
        subjects: By set and subject, where a set has subjects.
        mean: Of the sets, where it was asked all of the table's.
        published_mean: The paper's, where it has all of them for such a model.
    """

    model: str
    setting: str
    shares: Mapping[str, Share]
    subjects: Mapping[str, Mapping[str, Share]]
    mean: float | None
    published_mean: float | None


@dataclass(frozen=True)
class SetsTable:
    """Rows of models, columns of sets: the paper's first, in its order."""

    sets: tuple[str, ...]
    rows: tuple[SetRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Every figure, unrounded."""
        return {"sets": list(self.sets), "rows": [asdict(row) for row in self.rows]}


def build_sets(cells: Sequence[Cell], confidence: float = BOOTSTRAP.confidence) -> SetsTable | None:
    """The table of the cells that name a set; None where there is none.

    Raises:
        UserError: the same model, setting and set twice, or models that were asked different numbers of a set's problems.
    """
    named = list(dict.fromkeys(cell.problem_set for cell in cells if cell.problem_set))
    sets = tuple(sorted(named, key=lambda name: paper.SETS.index(name) if name in paper.SETS else len(paper.SETS)))
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        mine = found.setdefault((cell.model, cell.setting), {})
        where = f"set '{cell.problem_set}', model '{cell.model}', setting '{cell.setting}'"
        if cell.problem_set in mine:
            raise UserError(f"{where}: given twice; give each model its own label (--label), or leave one run out")
        mine[cell.problem_set] = cell
    for name in sets:
        asked = {len(mine[name].results) for mine in found.values() if name in mine}
        if len(asked) > 1:
            raise UserError(
                f"set '{name}': models were asked {' and '.join(map(str, sorted(asked)))} problems of it; "
                "evaluate all on the same files, with the same --subjects and --limit"
            )
    rows = tuple(_row(*key, sets, mine, confidence) for key, mine in found.items())
    return SetsTable(sets, rows) if rows else None


def _row(model: str, setting: str, sets: Sequence[str], mine: Mapping[str, Cell], confidence: float) -> SetRow:
    shares: dict[str, Share] = {}
    subjects: dict[str, dict[str, Share]] = {}
    for name in (one for one in sets if one in mine):
        cell = mine[name]
        right, published = sum(result.correct for result in cell.results), paper.published_value(model, setting, name)
        shares[name] = Share(wilson(right, len(cell.results), confidence), right, len(cell.results), published)
        subjects[name] = {subject: Share(wilson(*counts, confidence), *counts) for subject, counts in cell.by_category.items()}
    known = [share.published for share in shares.values() if share.published is not None]
    return SetRow(
        model,
        setting,
        shares,
        {name: found for name, found in subjects.items() if len(found) > 1},
        sum(share.accuracy.value for share in shares.values()) / len(sets) if len(shares) == len(sets) else None,
        sum(known) / len(sets) if len(known) == len(sets) else None,
    )


def terminal_sets(table: SetsTable) -> Table:
    """A rich table: each share above its interval and the paper's figure."""
    drawn = Table(title="Zero-shot: share of problems right", title_justify="left", title_style="bold", show_lines=True)
    drawn.add_column("model", overflow="fold")
    for name in (*table.sets, "mean"):
        drawn.add_column(name, justify="right")
    for row in table.rows:
        cells = [_lines(row.shares[name]) if name in row.shares else "–" for name in table.sets]
        mean = "–" if row.mean is None else number(row.mean) + _beside(row.published_mean)
        drawn.add_row(*map(Text, (f"{row.model}\n{row.setting}", *cells, mean)))
    return drawn


def _lines(share: Share) -> str:
    return f"{number(share.accuracy.value)}\n{interval(share.accuracy)}{_beside(share.published)}"


def _beside(published: float | None) -> str:
    return "" if published is None else f"\npublished {number(published)}"
