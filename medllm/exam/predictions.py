"""What a model answered, as IgakuQA publishes it: JSONL of ``{problem_id, prediction, explanation}``."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medllm.errors import UserError
from medllm.exam.problem import LETTERS
from medllm.exam.rows import read_json, read_json_lines
from medllm.run import atomic_path


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one problem.

    Attributes:
        problem_id: The problem.
        prediction: Letters joined by commas (``a,b``), or a number; empty where the model gave no answer.
        explanation: The whole text the answer was taken from.
    """

    problem_id: str
    prediction: str
    explanation: str = ""


def read_predictions(path: str | Path) -> tuple[Prediction, ...]:
    """Read a prediction file, a run folder, every ``.jsonl`` below another folder, or the files a pattern names.

    A pattern, ``baseline_results/*/*_gpt4.jsonl``, picks one system out of a folder that holds the predictions of several.

    Raises:
        UserError: nothing there, a malformed line, a missing field, or two predictions for one problem.
    """
    predictions: dict[str, Prediction] = {}
    lines: dict[str, str] = {}
    for file in _prediction_files(str(path)):
        for prediction, where in _of_file(file):
            key = prediction.problem_id
            if key in predictions:
                raise UserError(
                    f"{where}: a second prediction for problem {key}, the first is at {lines[key]}; give one system's "
                    f"predictions only, by a narrower path or a pattern such as '{file.parent / '*_gpt4.jsonl'}'"
                )
            predictions[key], lines[key] = prediction, where
    if not predictions:
        raise UserError(f"{path}: holds no predictions; expected JSON lines with problem_id and prediction")
    return tuple(predictions.values())


def in_letters(
    predictions: Sequence[Prediction], choices: Mapping[str, int]
) -> tuple[tuple[Prediction, ...], Literal["letters", "digits", "upper case"]]:
    """Predictions in the letters of the gold answers, where a whole file of them is in another alphabet.

    One prediction in lower-case letters is enough to leave all as they are: then the others are what the benchmark's rule makes
    of them.

    Args:
        predictions: A file's.
        choices: How many options each problem has; 0 for a number.
    """
    lettered = [one for one in predictions if choices.get(one.problem_id) and one.prediction.strip()]
    for alphabet, pattern in (("digits", r"[1-9](?:\s*,?\s*[1-9])*"), ("upper case", r"[A-J](?:\s*,?\s*[A-J])*")):
        fitting = [one for one in lettered if re.fullmatch(pattern, one.prediction.strip())]
        if not fitting or any(re.match(r"[a-j](?:,[a-j])*$", one.prediction.strip()) for one in lettered):
            continue
        read = tuple(replace(one, prediction=_lower(one.prediction)) if one in fitting else one for one in predictions)
        return read, "digits" if alphabet == "digits" else "upper case"
    return tuple(predictions), "letters"


def _lower(prediction: str) -> str:
    signs = re.findall(r"\w", prediction)
    return ",".join(sorted(LETTERS[int(sign) - 1] if sign.isdigit() else sign.lower() for sign in signs))


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write predictions as JSONL; all of the file or nothing."""
    with atomic_path(Path(path)) as scratch, scratch.open("w", encoding="utf-8") as stream:
        for prediction in predictions:
            stream.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")


def _prediction_files(path: str) -> list[Path]:
    if Path(path).is_file():
        return [Path(path)]
    if (Path(path) / "predictions.jsonl").is_file():  # a run folder, whose other .jsonl files are not predictions
        return [Path(path) / "predictions.jsonl"]
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if file.suffix in (".jsonl", ".json"))
    else:
        files = sorted(file for file in map(Path, glob.glob(path, recursive=True)) if file.is_file())
    if not files:
        raise UserError(f"{path}: no prediction files here; give a .jsonl file, a folder of them, or a pattern (--predictions)")
    return files


_IDS = ("question_id", "question_number", "problem_id", "index", "id")
_TEXTS = ("raw_response", "response", "output", "explanation")


def _of_file(file: Path) -> Iterator[tuple[Prediction, str]]:
    """JSON lines as IgakuQA's; else the results of another bench: a list of rows, alone or in ``results``."""
    if file.suffix.lower() != ".json":
        yield from ((_prediction(row, where), where) for row, where in read_json_lines(file))
        return
    value = read_json(file)
    rows = value.get("results") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f"{file}: holds no predictions; expected a list of them, alone or in 'results'")
    for number, row in enumerate(rows, start=1):
        where = f"{file}: row {number}"
        numbered = file.stem.endswith("_pred") or (isinstance(row, dict) and not any(name in row for name in _IDS))
        if numbered and "pred" in row:  # KokushiMD-10's are joined by their number
            yield _numbered(row["pred"], f"{file.stem.removesuffix('_pred')}-{number}"), where
        else:
            yield _foreign(row, where), where


def _numbered(pred: Any, problem_id: str) -> Prediction:
    """A prediction as KokushiMD-10's scorer takes it: letters in any order, or digits, with anything else between them."""
    signs = re.sub(r"[^a-z0-9]", "", str(pred or "").lower())
    lettered = signs and all(sign in LETTERS for sign in signs)
    return Prediction(problem_id, ",".join(sorted(signs)) if lettered else signs, str(pred or ""))


def _foreign(row: Any, where: str) -> Prediction:
    """A row of JMLE2026-Bench or IgakuQA119: their letters joined by commas, their text where there is one."""
    if not isinstance(row, dict) or not any(name in row for name in _IDS):
        raise UserError(f"{where}: expected an object with {', '.join(_IDS[:-1])} or {_IDS[-1]}")
    key = str(next(row[name] for name in _IDS if name in row))
    answers = row.get("answers")
    said = answers[0] if isinstance(answers, list) and answers and isinstance(answers[0], dict) else row
    found = next((name for name in ("predicted", "prediction", "pred", "answer") if name in said), None)
    if found is None:
        raise UserError(f"{where}: expected 'predicted', 'prediction', 'pred' or 'answer'")
    given = said[found]
    text = next((said[name] for name in _TEXTS if isinstance(said.get(name), str)), "")
    if "explanation" in said and "raw_response" not in said and isinstance(given, str):
        text = f"answer: {given}\nexplanation: {text}"
    parts = [str(one) for one in given] if isinstance(given, list) else [] if given is None else [str(given)]
    if len(parts) == 1 and re.fullmatch(r"[a-j]+|[A-J]+", parts[0]):
        parts = list(parts[0])
    return Prediction(key, ",".join(parts), text)


def _prediction(row: dict[str, object], where: str) -> Prediction:
    fields: dict[str, str] = {}
    for name in ("problem_id", "prediction", "explanation"):
        value = row.get(name, "" if name == "explanation" else None)
        if not isinstance(value, str):
            found = f"holds {value!r}" if name in row else "is missing"
            raise UserError(f"{where}: '{name}' {found}; expected text (a prediction is written \"a,b\")")
        fields[name] = value
    return Prediction(**fields)
