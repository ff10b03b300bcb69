"""What a model answered, as IgakuQA publishes it: JSONL of ``{problem_id, prediction, explanation}``."""

from __future__ import annotations

import glob
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medllm.errors import UserError
from medllm.exam.field_map import plain
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


Alphabet = Literal["letters", "digits", "upper case", "full width"]
_LETTERS = re.compile(r"\s*[a-j](?:\s*,\s*[a-j])*\s*", re.ASCII)
_ALPHABETS: dict[Alphabet, re.Pattern[str]] = {
    "digits": re.compile("(?:10|[0-9])(?:,(?:10|[0-9]))*"),
    "upper case": re.compile("[A-J](?:,[A-J])*"),
    "full width": re.compile("[a-j](?:,[a-j])*"),
}
"""What is read where no prediction is in letters, :func:`_folded`."""


def in_letters(predictions: Sequence[Prediction], choices: Mapping[str, int]) -> tuple[tuple[Prediction, ...], Alphabet]:
    """Predictions in the letters of the gold answers, where a whole file of them is in another alphabet.

    One prediction in lower-case letters is enough to leave all as they are: then the others are what the benchmark's rule makes
    of them (:func:`in_no_letters` counts them). A number that is written full-width is the number.

    Args:
        predictions: A file's.
        choices: How many options each problem has; 0 for a number.

    Raises:
        UserError: a whole file is in other signs (ア, イ), or numbers the options from 0.
    """
    lettered = [one for one in predictions if choices.get(one.problem_id) and one.prediction.strip()]
    alphabet: Alphabet = "letters"
    if lettered and not any(_LETTERS.fullmatch(one.prediction) for one in lettered):
        signs = [_folded(one.prediction) for one in lettered]
        alphabet = max(_ALPHABETS, key=lambda name: sum(_ALPHABETS[name].fullmatch(sign) is not None for sign in signs))
        if not any(map(_ALPHABETS[alphabet].fullmatch, signs)):
            alphabet = "letters"
        if alphabet == "letters" and all(re.fullmatch(r"\w(?:,\w)*", sign) for sign in signs):
            raise UserError(
                f"the {len(lettered)} predictions are in signs that are not read: problem {lettered[0].problem_id} has "
                f'{lettered[0].prediction!r}; expected letters as in the gold answers, "a,b", or digits from 1'
            )
        if (
            alphabet == "digits"
            and (zero := next((n for n, sign in enumerate(signs) if "0" in sign.split(",")), None)) is not None
        ):
            raise UserError(
                f"problem {lettered[zero].problem_id} has the prediction {lettered[zero].prediction!r}: digits number the "
                "options from 1; write letters, or number them so"
            )
    return tuple(_in_letters(one, choices.get(one.problem_id), alphabet) for one in predictions), alphabet


def in_no_letters(predictions: Sequence[Prediction], choices: Mapping[str, int]) -> int:
    """How many predictions of problems with options hold something, and no letters: each counts as wrong."""
    return sum(
        bool(choices.get(one.problem_id) and one.prediction.strip()) and not _LETTERS.fullmatch(one.prediction)
        for one in predictions
    )


def _in_letters(one: Prediction, choices: int | None, alphabet: Alphabet) -> Prediction:
    folded, number = _folded(one.prediction), unicodedata.normalize("NFKC", one.prediction)
    if choices == 0 and not one.prediction.isascii() and re.fullmatch(r"-?[0-9]+(?:\.[0-9]+)?", number):
        return replace(one, prediction=number)
    if not choices or alphabet == "letters" or not _ALPHABETS[alphabet].fullmatch(folded):
        return one
    signs = folded.lower().split(",")
    if alphabet == "digits":
        if max(map(int, signs)) > choices:
            return one
        signs = [LETTERS[int(sign) - 1] for sign in signs]
    return replace(one, prediction=",".join(sorted(signs)))


def _folded(prediction: str) -> str:
    """Without spaces, full-width signs as ASCII's, joined by commas; digits and upper-case letters may have had none."""
    folded = re.sub(r"[,、・]", ",", re.sub(r"\s", "", unicodedata.normalize("NFKC", prediction)))
    return ",".join(folded) if re.fullmatch(r"[1-9]+|[A-J]+", folded) else folded


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
    key = plain(next(row[name] for name in _IDS if name in row))
    answers = row.get("answers")
    said = answers[0] if isinstance(answers, list) and answers and isinstance(answers[0], dict) else row
    found = next((name for name in ("predicted", "prediction", "pred", "answer") if name in said), None)
    if found is None:
        raise UserError(f"{where}: expected 'predicted', 'prediction', 'pred' or 'answer'")
    given = said[found]
    text = next((said[name] for name in _TEXTS if isinstance(said.get(name), str)), "")
    if "explanation" in said and "raw_response" not in said and isinstance(given, str):
        text = f"answer: {given}\nexplanation: {text}"
    parts = [plain(one) for one in given] if isinstance(given, list) else [] if given is None else [plain(given)]
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
