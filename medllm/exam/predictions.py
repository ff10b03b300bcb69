"""What a model answered, as IgakuQA publishes it: JSONL of ``{problem_id, prediction, explanation}``."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from medllm.errors import UserError
from medllm.exam.loaders import read_json_lines
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
        for row, where in read_json_lines(file):
            prediction = _prediction(row, where)
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
        files = sorted(Path(path).rglob("*.jsonl"))
    else:
        files = sorted(file for file in map(Path, glob.glob(path, recursive=True)) if file.is_file())
    if not files:
        raise UserError(f"{path}: no prediction files here; give a .jsonl file, a folder of them, or a pattern (--predictions)")
    return files


def _prediction(row: dict[str, object], where: str) -> Prediction:
    fields: dict[str, str] = {}
    for name in ("problem_id", "prediction", "explanation"):
        value = row.get(name, "" if name == "explanation" else None)
        if not isinstance(value, str):
            found = f"holds {value!r}" if name in row else "is missing"
            raise UserError(f"{where}: '{name}' {found}; expected text (a prediction is written \"a,b\")")
        fields[name] = value
    return Prediction(**fields)
