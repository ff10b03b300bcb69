"""Answers of an exam or of a curation: every text read anew by the stage's own rules, scored anew, and held against the result.

The texts are those of ``answers.journal``, written as they came. No model is asked.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medllm.engine import Generation
from medllm.errors import UserError
from medllm.exam.answers import Readings
from medllm.exam.endings import EndingCounts
from medllm.exam.evaluation import check_exam, sit
from medllm.exam.option_journal import OPTION_JOURNAL, OptionJournal
from medllm.exam.option_scores import OptionResult
from medllm.exam.predictions import Prediction, read_predictions
from medllm.exam.problem import Problem, check_ids
from medllm.exam.scoring import score
from medllm.journal import JOURNAL, Journal
from medllm.model.tokenizer import load_tokenizer
from medllm.preferences.curation import check_problems, curate
from medllm.preferences.records import read_preferences
from medllm.run import RESULT
from medllm.stages.curate import PREFERENCES
from medllm.stages.evaluate import PREDICTIONS
from medllm.stages.problems import of_subjects, read_problems, read_shots
from medllm.verify.findings import Finding, held, refuted_by
from medllm.verify.record import Record

GUARD = "nothing that must not be in it"
ANSWERS = "the answers"
SCORE = "the score"
LIKELIHOODS = "the likelihoods"


class _Silent:
    """Stands where the model stood: every answer is in the journal."""

    def __init__(self, name: str, tokenizer: Any):
        self.name = name
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def generate(self, prompts: Sequence[Any], *_: Any) -> list[list[Generation]]:
        """Refuse.

        Raises:
            UserError: always.
        """
        raise UserError(f"{JOURNAL}: {len(prompts)} problems have no answer in it")


def check_answers(record: Record) -> list[Finding]:
    """The answers of a run that asked a model.

    Raises:
        UserError: its problems cannot be read.
    """
    if record.stage == "evaluate" and record.config.method != "generate":
        try:
            return _check_options(record)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            return [Finding(SCORE, "refuted", RESULT, f"is not what such an exam leaves ({type(error).__name__})")]
    problems, shots = _asked(record)
    guard: Callable[..., None] = check_exam if record.stage == "evaluate" else check_problems
    try:
        guard(problems, shots, record.config)
        found = [Finding(GUARD, "proved", said=f"{len(problems)} problems, {len(shots)} examples")]
    except UserError as error:
        found = [refuted_by(GUARD, error)]
    if not (record.path / JOURNAL).exists():
        return [*found, Finding(ANSWERS, "not checked", JOURNAL, "is not there: texts cannot be held against what was said")]
    try:
        return [*found, *(_exam if record.stage == "evaluate" else _curation)(record, problems, shots)]
    except UserError as error:  # an answer to another prompt, an answer that is missing, a line that is none
        return [*found, refuted_by(ANSWERS, error)]


def _asked(record: Record) -> tuple[Sequence[Problem], Sequence[Problem]]:
    config = record.config
    problems, _ = read_problems(config.problems, config)
    if record.stage == "curate":
        return problems, read_shots(config.shots, config.shot_count, config) if config.shots else ()
    problems = of_subjects(problems, config.subjects)
    problems = problems[: config.limit] if config.limit else problems
    asks = config.method == "generate"
    return problems, read_shots(config.shots, config.shot_count, config) if asks else ()


def _exam(record: Record, problems: Sequence[Problem], shots: Sequence[Problem]) -> Iterator[Finding]:
    with _journal(record) as journal:
        sat = sit(_Silent(record.engine, None), problems, shots, record.config, journal=journal)
    expected = [prediction for prediction, _, _ in sat]
    yield from held(ANSWERS, PREDICTIONS, _other_predictions(record, expected), f"{len(expected)} texts read anew")
    if record.result is None:
        yield Finding(SCORE, "not checked", RESULT, "the run has not finished")
        return
    anew = {
        "score": score(problems, expected, lenient=record.config.lenient).to_json(),
        "endings": asdict(EndingCounts.count(ended for _, ended, _ in sat)),
        "readings": asdict(Readings.count(reading for _, _, reading in sat)),
    }
    yield from held(SCORE, RESULT, _other_values(anew, record.result), f"{len(problems)} problems scored anew")


def _curation(record: Record, problems: Sequence[Problem], shots: Sequence[Problem]) -> Iterator[Finding]:
    config = record.config
    tokenizer = None if record.engine == "openai" else load_tokenizer(config.model.tokenizer or config.model.path)
    with _journal(record) as journal:
        made = curate(_Silent(record.engine, tokenizer), problems, shots, config, journal=journal)
    written = {one.problem_id: one for one in read_preferences(record.path / PREFERENCES)}
    expected = {one.problem_id: one for one in made.preferences}
    differences = [f"problem {name} is in one of it and the journal alone" for name in sorted(written.keys() ^ expected.keys())]
    for name in (name for name in expected if name in written):
        if _plain(written[name]) != _plain(expected[name]):
            differences.append(f"problem {name}: its responses are not those that were given, or not ranked as they are read")
    yield from held(ANSWERS, PREFERENCES, differences, f"{made.report.samples} texts read and ranked anew")
    if record.result is None:
        yield Finding(SCORE, "not checked", RESULT, "the run has not finished")
        return
    yield from held(SCORE, RESULT, _other_values(_plain(made.report), record.result), "every count of the report")


def _check_options(record: Record) -> list[Finding]:
    """An exam by likelihood: the choices follow from the log-probabilities, and these are those that were kept as they came."""
    if record.result is None:
        return [Finding(SCORE, "not checked", RESULT, "the run has not finished")]
    problems = {problem.problem_id: problem for problem in _asked(record)[0]}
    check_ids(list(problems.values()))
    rows, differences = record.result["results"], []
    for row in rows:
        problem = problems.get(row["problem_id"])
        if problem is None or [letter for (letter,) in problem.accepted] != row["accepted"]:
            differences.append(f"problem {row['problem_id']}: the right options are not those of the problem file")
        anew = OptionResult(row["problem_id"], tuple(row["accepted"]), tuple(row["nll"]), tuple(row["tokens"]))
        if (anew.chosen, anew.correct) != (row["prediction"], row["correct"]):
            differences.append(
                f"problem {row['problem_id']}: the likeliest option is {anew.chosen}, {row['prediction']} is recorded"
            )
    accuracy = sum(row["correct"] for row in rows) / max(1, len(rows))
    if abs(accuracy - record.result["accuracy"]) > 1e-12:
        differences.append(f"accuracy is {record.result['accuracy']}, its rows give {accuracy}")
    return [*held(SCORE, RESULT, differences, f"{len(rows)} choices made anew"), *_likelihoods(record, rows)]


def _likelihoods(record: Record, rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    if not (record.path / OPTION_JOURNAL).exists():
        return [Finding(LIKELIHOODS, "not checked", OPTION_JOURNAL, "is not there: they are the result's own")]
    with _copied(record, OPTION_JOURNAL) as file:
        kept = {(one.problem_id, one.option): one.nll for one in OptionJournal(file)}
    differences = [
        f"problem {row['problem_id']}: the likelihood of option {option + 1} is not the one that was given"
        for row in rows
        for option, nll in enumerate(row["nll"])
        if kept.get((row["problem_id"], option)) != nll
    ]
    return held(LIKELIHOODS, OPTION_JOURNAL, differences, f"{len(kept)} options")


@contextmanager
def _journal(record: Record) -> Iterator[Journal]:
    """The run's. What reading it says to a user who goes on is not said."""
    with _copied(record, JOURNAL) as file, redirect_stderr(io.StringIO()):
        yield Journal(file)


@contextmanager
def _copied(record: Record, name: str) -> Iterator[Path]:
    """A copy of a journal: it mends its own torn end."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copyfile(record.path / name, Path(folder) / name))


def _other_predictions(record: Record, expected: Sequence[Prediction]) -> list[str]:
    written = {one.problem_id: one for one in read_predictions(record.path / PREDICTIONS)}
    wanted = {one.problem_id: one for one in expected}
    found = [f"problem {name} is in one of it and the exam alone" for name in sorted(written.keys() ^ wanted.keys())]
    for name in (name for name in wanted if name in written):
        if written[name].explanation != wanted[name].explanation:
            found.append(f"problem {name}: its text is not the one that was given")
        elif written[name].prediction != wanted[name].prediction:
            found.append(f"problem {name}: its text says '{wanted[name].prediction}', '{written[name].prediction}' is recorded")
    return found


def _other_values(anew: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """What a result has otherwise than it comes to now, by its innermost name."""
    found = []
    for name, value in json.loads(json.dumps(dict(anew))).items():
        recorded = result.get(name)
        if isinstance(value, dict) and isinstance(recorded, dict):
            found += [f"{name}.{difference}" for difference in _other_values(value, recorded)]
        elif value != recorded:
            found.append(f"{name}: {_short(recorded)} is recorded, it comes to {_short(value)}")
    return found


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(asdict(value)))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:120]}…"
