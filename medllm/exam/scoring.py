"""The official score of a set of predictions, and whether it would pass.

Scoring is the benchmark's own (``scripts/evaluate_main.py`` of IgakuQA): ``sorted(prediction.split(","))`` must equal the
sorted gold answer, spaces included, so that published outputs give published totals to the point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from medllm.errors import UserError
from medllm.exam.answers import Readings, extract_answer
from medllm.exam.predictions import Prediction, read_predictions
from medllm.exam.problem import Problem

__all__ = ["Prediction", "ProblemResult", "ScoreSheet", "Tally", "Verdict", "is_correct", "read_predictions", "score"]

ALWAYS_RIGHT = frozenset({"116A71"})
"""Problems the official scoring counts as right whatever was answered."""

NO_GROUP = "unknown"
"""The year, section or subject of problems that have none."""

Outcome = Literal["pass", "fail", "unknown"]

REQUIRED_SECTIONS = frozenset("BE")
GENERAL_SECTIONS = frozenset("ACDF")
REQUIRED_PERCENT = 80
MOST_KINKI = 3
EXAM_QUESTIONS = 400
GENERAL_CUT = {2018: 208, 2019: 209, 2020: 217, 2021: 209, 2022: 214}
"""Points needed in the general sections, as announced by the Ministry of Health (of 299, 296, 299, 300 and 297)."""


@dataclass(frozen=True)
class ProblemResult:
    """One problem: what it is worth, what was predicted (None: nothing), and whether that earned the points."""

    problem_id: str
    correct: bool
    points: int
    prediction: str | None = None


@dataclass(frozen=True)
class Tally:
    """Points earned and possible, and problems right and asked."""

    points: int
    possible: int
    correct: int
    questions: int


@dataclass(frozen=True)
class Verdict:
    """Whether one year's exam would be passed, rule by rule; ``unknown`` where a rule cannot be decided.

    Attributes:
        required: At least 80 % of the points of sections B and E.
        general: At least that year's cut in the other sections.
        kinki: Prohibited options were chosen in at most three problems. The prohibited options are those of the metadata;
            the ministry does not publish its own.
        passed: All three.
        reason: Why something is unknown; empty where nothing is.
    """

    required: Outcome
    general: Outcome
    kinki: Outcome
    passed: Outcome
    reason: str = ""


@dataclass(frozen=True)
class ScoreSheet:
    """The score of one system on a set of problems.

    Attributes:
        points: Points earned.
        possible: Points possible.
        correct: Problems answered right, each counted once.
        questions: Problems asked.
        unanswered: Problems without a prediction, or with an empty one; they count as wrong.
        lenient: Spaces in predictions were forgiven.
        by_year: Tally of each exam year (``unknown`` where a problem has none).
        by_section: Tally of each section.
        by_category: Tally of each subject.
        text_only: Tally of the problems that need no image.
        kinki: Problems in which a prohibited option was chosen.
        verdicts: By exam year, for years with sections.
        results: Problem by problem, in the order of the problems.
    """

    points: int
    possible: int
    correct: int
    questions: int
    unanswered: int
    lenient: bool
    by_year: Mapping[str, Tally]
    by_section: Mapping[str, Tally]
    by_category: Mapping[str, Tally]
    text_only: Tally
    kinki: tuple[str, ...]
    verdicts: Mapping[str, Verdict]
    results: tuple[ProblemResult, ...]

    @property
    def mean_of_years(self) -> float:
        """Mean over exam years of points earned / points possible: the paper's score. 0 where no points are possible."""
        return mean_share((tally.points, tally.possible) for tally in self.by_year.values())

    def words(self) -> str:
        """For a line of text: ``12 of 20 points (0.600), 10 of 16 right``."""
        share = self.points / self.possible if self.possible else 0.0
        return f"{self.points} of {self.possible} points ({share:.3f}), {self.correct} of {self.questions} right"

    def to_json(self) -> dict[str, Any]:
        """Everything on the sheet, as plain JSON values."""
        return asdict(self) | {"kinki": list(self.kinki), "mean_of_years": self.mean_of_years}


def mean_share(tallies: Iterable[tuple[int, int]]) -> float:
    """Mean of points earned / points possible, over years that have points; 0 where there are none."""
    shares = [points / possible for points, possible in tallies if possible]
    return sum(shares) / len(shares) if shares else 0.0


def score(problems: Sequence[Problem], predictions: Sequence[Prediction], *, lenient: bool = False) -> ScoreSheet:
    """Score predictions, joined to the problems by ``problem_id``.

    Args:
        problems: The exam: problems without a prediction count as wrong.
        predictions: At most one for each problem.
        lenient: Forgive spaces around letters. The official scoring does not.

    Raises:
        UserError: no problems, a problem or a prediction that occurs twice, or a prediction for an unknown problem.
    """
    if not problems:
        raise UserError("there are no problems to score; check --problems")
    asked = _by_id("problem", problems)
    answered = _by_id("prediction", predictions)
    unknown = [key for key in answered if key not in asked]
    if unknown:
        raise UserError(
            f"{len(unknown)} predictions are for problems that are not asked, first {unknown[0]}; "
            "score them with the problem files they were made for (--problems)"
        )
    results = tuple(_result(problem, answered.get(problem.problem_id), lenient) for problem in problems)
    kinki = tuple(p.problem_id for p in problems if _chose_kinki(p, answered.get(p.problem_id)))
    rows = list(zip(problems, results, strict=True))
    return ScoreSheet(
        **asdict(_tally(results)),
        unanswered=sum(not (result.prediction or "").strip() for result in results),
        lenient=lenient,
        by_year=_group(rows, lambda problem: problem.year),
        by_section=_group(rows, lambda problem: problem.section),
        by_category=_group(rows, lambda problem: problem.category),
        text_only=_tally(result for problem, result in rows if problem.text_only),
        kinki=kinki,
        verdicts=_verdicts(rows, frozenset(kinki)),
        results=results,
    )


@dataclass(frozen=True)
class ReadAnew:
    """What the texts of a prediction file give when they are read here.

    Attributes:
        read_points: Points that these readings earn.
        readings: How many were read by each rule, and how many were not, by reason.
        differing: Problems whose reading is another than the file's own prediction: ``(file's, ours)``.
    """

    read_points: int
    readings: Readings
    differing: Mapping[str, tuple[str, str]]


def read_anew(problems: Sequence[Problem], predictions: Sequence[Prediction], *, explanation: bool = False) -> ReadAnew:
    """Read the texts of predictions, and score what is read; the predictions' own score is :func:`score`'s.

    Args:
        problems: The exam.
        predictions: Predictions with the whole texts (``explanation``) they were taken from.
        explanation: The texts were asked to explain before they answer.

    Raises:
        UserError: no prediction holds a text.
    """
    if not any(prediction.explanation for prediction in predictions):
        raise UserError(
            "no prediction holds the text it was taken from ('explanation'), so none can be read anew (--from_text)"
        )
    asked = _by_id("problem", problems)
    read = {
        one.problem_id: extract_answer(one.explanation, asked[one.problem_id], explanation=explanation)
        for one in predictions
        if one.problem_id in asked
    }
    anew = [Prediction(key, ",".join(reading.answer)) for key, reading in read.items()]
    own = {one.problem_id: one.prediction for one in predictions}
    differing = {one.problem_id: (own[one.problem_id], one.prediction) for one in anew if own[one.problem_id] != one.prediction}
    return ReadAnew(score(problems, anew).points, Readings.count(read.values()), differing)


def is_correct(problem: Problem, prediction: str, *, lenient: bool = False) -> bool:
    """The official rule for one problem."""
    if problem.problem_id in ALWAYS_RIGHT:
        return True
    parts = prediction.split(",")
    given = sorted(part.strip() for part in parts) if lenient else sorted(parts)
    return any(given == sorted(answer) for answer in (problem.answer, *problem.accepted))


def _by_id(kind: str, items: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        if item.problem_id in found:
            raise UserError(f"{kind} {item.problem_id} is given twice; each problem may count once")
        found[item.problem_id] = item
    return found


def _result(problem: Problem, prediction: Prediction | None, lenient: bool) -> ProblemResult:
    given = None if prediction is None else prediction.prediction
    return ProblemResult(problem.problem_id, is_correct(problem, given or "", lenient=lenient), problem.points, given)


def _chose_kinki(problem: Problem, prediction: Prediction | None) -> bool:
    return prediction is not None and any(part.strip() in problem.kinki for part in prediction.prediction.split(","))


def _tally(results: Iterable[ProblemResult]) -> Tally:
    counted = list(results)
    right = [result for result in counted if result.correct]
    return Tally(
        points=sum(result.points for result in right),
        possible=sum(result.points for result in counted),
        correct=len(right),
        questions=len(counted),
    )


_Row = tuple[Problem, ProblemResult]


def _group(rows: Sequence[_Row], key: Callable[[Problem], Any]) -> dict[str, Tally]:
    groups: dict[str, list[ProblemResult]] = {}
    for problem, result in rows:
        value = key(problem)
        groups.setdefault(NO_GROUP if value is None else str(value), []).append(result)
    return {name: _tally(groups[name]) for name in sorted(groups)}


def _verdicts(rows: Sequence[_Row], kinki: frozenset[str]) -> dict[str, Verdict]:
    years = sorted({problem.year for problem, _ in rows if problem.year is not None and problem.section is not None})
    return {str(year): _verdict(year, [row for row in rows if row[0].year == year], kinki) for year in years}


def _verdict(year: int, rows: Sequence[_Row], kinki: frozenset[str]) -> Verdict:
    """A part of an exam decides nothing: points not asked for could still be earned or lost."""
    if len(rows) != EXAM_QUESTIONS or {problem.section for problem, _ in rows} != REQUIRED_SECTIONS | GENERAL_SECTIONS:
        reason = f"{len(rows)} problems are not a whole exam ({EXAM_QUESTIONS} in sections A to F)"
        return Verdict("unknown", "unknown", "unknown", "unknown", reason)
    required = _tally(result for problem, result in rows if problem.section in REQUIRED_SECTIONS)
    general = _tally(result for problem, result in rows if problem.section in GENERAL_SECTIONS)
    cut = GENERAL_CUT.get(year)
    rules: list[Outcome] = [
        _outcome(100 * required.points >= REQUIRED_PERCENT * required.possible),
        "unknown" if cut is None else _outcome(general.points >= cut),
        _outcome(sum(problem.problem_id in kinki for problem, _ in rows) <= MOST_KINKI)
        if any(problem.kinki for problem, _ in rows)
        else "unknown",
    ]
    reasons = []
    if cut is None:
        reasons.append(f"the general cut of {year} is not known here")
    if rules[2] == "unknown":
        reasons.append("the problems name no prohibited options (load them with their metadata)")
    passed: Outcome = "fail" if "fail" in rules else "unknown" if "unknown" in rules else "pass"
    return Verdict(rules[0], rules[1], rules[2], passed, "; ".join(reasons))


def _outcome(met: bool) -> Outcome:
    return "pass" if met else "fail"
