"""The preference file: one problem a line, its hierarchy ground truth > chosen > rejected.

::

    {"problem_id": "110A1", "prompt": "Question: …\\n Explanation:",
     "ground_truth": {"text": "…\\n Answer:c", "answer": "c", "seed": null, "settings": {}},
     "chosen": [{"text": "…", "answer": "c", "seed": 0, "settings": {"temperature": 1.0, …}}], "rejected": [ … ]}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medllm.corpus.documents import Document
from medllm.errors import UserError
from medllm.exam.loaders import read_json_lines
from medllm.run import atomic_path


@dataclass(frozen=True)
class Sample:
    """One response to a problem's prompt: explanation and answer as text, and how it came about."""

    text: str
    answer: str
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preference:
    """Everything known about one problem's responses."""

    problem_id: str
    prompt: str
    ground_truth: Sample
    chosen: tuple[Sample, ...] = ()
    rejected: tuple[Sample, ...] = ()


def write_preferences(path: str | Path, preferences: Sequence[Preference]) -> None:
    """Write the preference file, all of it or nothing."""
    with atomic_path(Path(path)) as scratch, scratch.open("w", encoding="utf-8") as stream:
        for preference in preferences:
            stream.write(json.dumps(dataclasses.asdict(preference), ensure_ascii=False) + "\n")


def read_preferences(path: str | Path) -> list[Preference]:
    """Read a preference file. Lines that hold a ground truth alone are kept; they yield no pairs.

    Raises:
        UserError: no such file, no line in it, a line that is not a preference, or a problem that comes twice.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such preference file; `medllm curate` writes one as preferences.jsonl in its run folder")
    first_seen: dict[str, str] = {}
    preferences = []
    for row, where in read_json_lines(file):
        preference = _preference(row, where)
        if preference.problem_id in first_seen:
            earlier = first_seen[preference.problem_id]
            raise UserError(f"{where}: problem {preference.problem_id} was already in {earlier}; keep one line a problem")
        first_seen[preference.problem_id] = where
        preferences.append(preference)
    if not preferences:
        raise UserError(f"{file}: the preference file is empty")
    return preferences


def preference_texts(preferences: Iterable[Preference], file: str) -> list[Document]:
    """Preferences as texts to be searched: each prompt, and each response by itself.

    Together, answers to one problem that have nothing to do with each other would hold the words of another.
    """
    return [
        Document(text, f"{file}:{line}")
        for line, one in enumerate(preferences, start=1)
        for text in (one.prompt, *(sample.text for sample in (one.ground_truth, *one.chosen, *one.rejected)))
    ]


def _preference(row: dict[str, Any], where: str) -> Preference:
    return Preference(
        problem_id=_text(row, "problem_id", where),
        prompt=_text(row, "prompt", where),
        ground_truth=_sample(_required(row, "ground_truth", where), f"{where}: ground_truth"),
        chosen=_samples(row, "chosen", where),
        rejected=_samples(row, "rejected", where),
    )


def _samples(row: dict[str, Any], name: str, where: str) -> tuple[Sample, ...]:
    values = _required(row, name, where)
    if not isinstance(values, list):
        raise UserError(f"{where}: '{name}' must be a list of samples (an empty one is fine)")
    return tuple(_sample(value, f"{where}: {name}[{index}]") for index, value in enumerate(values))


def _sample(value: Any, where: str) -> Sample:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with text and answer")
    seed, settings = value.get("seed"), value.get("settings", {})
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise UserError(f"{where}: 'seed' must be an integer or null")
    if not isinstance(settings, dict):
        raise UserError(f"{where}: 'settings' must be an object")
    return Sample(_text(value, "text", where), _text(value, "answer", where), seed, settings)


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = _required(row, name, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: '{name}' must be text, not {type(value).__name__}")
    return value


def _required(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: '{name}' is missing (there are: {', '.join(row) or 'none'})")
    return row[name]
