"""What a report is made of: the evaluated cells, the runs behind them, the preference data and every answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medllm.exam.setting import explained
from medllm.preferences.records import Preference
from medllm.report.nested import Equivalence, equivalence
from medllm.report.questions import Questions
from medllm.report.results import Cell, StudyTable, build_table
from medllm.report.sets import SetsTable, build_sets
from medllm.report.statistics import BOOTSTRAP, Bootstrap


@dataclass(frozen=True)
class RunSummary:
    """One run folder.

    Attributes:
        name: Name of the folder, with as much of its path as tells it from the others.
        stage: ``cpt``, ``curate``, ``rpo``, ``evaluate``, ``options`` (an exam by the likelihood of its options), or ``score``
            (predictions that were made elsewhere; a file, so without configuration and environment).
        config: The resolved configuration.
        metrics: The lines of ``metrics.jsonl``, each with its ``step``.
        result: What the stage ended with.
        environment: Versions, hardware and commit it ran with.
    """

    name: str
    stage: str
    config: Mapping[str, Any]
    metrics: tuple[Mapping[str, float], ...] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Composition:
    """What the preference data consist of.

    Attributes:
        both: Problems with chosen and rejected responses; all three pairs of the hierarchy exist.
        only_chosen: Problems answered right every time.
        only_rejected: Problems never answered right.
        neither: Problems with a ground truth alone; they yield no pair.
        chosen: Chosen responses in all.
        rejected: Rejected responses in all.
        right_counts: How many problems have so many chosen responses.
    """

    both: int
    only_chosen: int
    only_rejected: int
    neither: int
    chosen: int
    rejected: int
    right_counts: Mapping[int, int]

    @property
    def problems(self) -> int:
        """All problems of the file."""
        return self.both + self.only_chosen + self.only_rejected + self.neither


@dataclass(frozen=True)
class PlainTable:
    """A table as text.

    Attributes:
        heading: What it is of.
        note: What its figures are, below it.
        columns: Headings, that of the rows first.
        rows: Each row's cells as lines: in the page the first is set large.
    """

    heading: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], ...], ...]


@dataclass(frozen=True)
class ReportInput:
    """Everything the report page shows.

    Attributes:
        title: Headline.
        engine: Which engine(s) ran it.
        environment: Hardware, versions, commit and date, as a run folder records them.
        cells: The evaluated models, on the exam.
        sets: The evaluated models, on zero-shot sets.
        runs: The stages behind them, in the order in which they ran.
        preferences: Composition of each set of preference data, by the name of the run that made it.
        questions: Every question with each model's answer; None where no exam was sat.
        names: What each model is called in full, where it is shown under less.
        kinds: Kind of each problem (section, subject, …) by problem_id, for the breakdown.
        kind_name: What the kinds are, e.g. ``section``.
        previous: For a model, the stage it started from; each with the one before it when unset.
        summary: Further paragraphs under the headline, plain text.
        answer: The sentence at the top, where it is not that of the table.
        tables: Further tables, behind that of the scores.
        draw: How intervals are drawn.
    """

    title: str
    engine: str
    environment: Mapping[str, Any]
    cells: tuple[Cell, ...]
    sets: tuple[Cell, ...] = ()
    runs: tuple[RunSummary, ...] = ()
    preferences: Mapping[str, Composition] = field(default_factory=dict)
    questions: Questions | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    kind_name: str = "kind"
    previous: Mapping[str, str] | None = None
    summary: tuple[str, ...] = ()
    answer: str = ""
    tables: tuple[PlainTable, ...] = ()
    draw: Bootstrap = BOOTSTRAP

    def table(self) -> StudyTable | None:
        """The table of the exam; None where only sets were sat. It takes a while: every interval is drawn.

        Raises:
            UserError: the cells cannot stand in one table.
        """
        return build_table(self.cells, previous=self.previous, draw=self.draw) if self.cells else None

    def sets_table(self) -> SetsTable | None:
        """The table of the sets; None where only an exam was sat.

        Raises:
            UserError: the cells cannot stand in one table.
        """
        return build_sets(self.sets, self.draw.confidence)

    def equivalences(self) -> dict[str, Equivalence]:
        """Of each model that was asked in both ways, whether its score stayed within the margin, over exams like this one."""
        years = {one.problem_id: one.problem.year for one in self.questions.every if one.problem} if self.questions else {}
        results = {(cell.model, cell.setting): cell.results for cell in self.cells}
        found = {}
        for (model, setting), plain in results.items():
            right = {one.problem_id: bool(one.correct) for one in results.get((model, explained(setting)), ())}
            if right:
                values = np.array([[right[one.problem_id] - bool(one.correct) for one in plain]], dtype=float)
                points = np.array([one.points for one in plain], dtype=float)
                groups = [str(years.get(one.problem_id)) for one in plain]
                found[model] = equivalence(values, points, groups, over="problems", draw=self.draw)
        return found


def composition(preferences: Sequence[Preference]) -> Composition:
    """Count the preference data."""
    sides = Counter((bool(preference.chosen), bool(preference.rejected)) for preference in preferences)
    right = Counter(len(preference.chosen) for preference in preferences)
    return Composition(
        both=sides[True, True],
        only_chosen=sides[True, False],
        only_rejected=sides[False, True],
        neither=sides[False, False],
        chosen=sum(len(preference.chosen) for preference in preferences),
        rejected=sum(len(preference.rejected) for preference in preferences),
        right_counts=dict(sorted(right.items())),
    )
