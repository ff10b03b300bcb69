"""Exams as tasks of EleutherAI's lm-evaluation-harness: rows of a prompt and its options, and the YAML that reads them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from medllm.config import OptionPrompt
from medllm.errors import UserError
from medllm.exam.option_prompts import option_prompt
from medllm.exam.problem import LETTERS, Problem
from medllm.run import atomic_path


@dataclass(frozen=True)
class HarnessTask:
    """A task that was written.

    Attributes:
        name: What the harness calls it.
        file: Its YAML; the rows lie beside it.
        questions: How many rows it has.
        left_out: Problems that are no choice of one option, counted by reason.
    """

    name: str
    file: Path
    questions: int
    left_out: Mapping[str, int]


def write_task(
    problems: Sequence[Problem],
    out: str | Path,
    name: str,
    *,
    prompt: OptionPrompt = "mcqa_with_options_jp",
    method: Literal["options", "letters"] = "options",
) -> HarnessTask:
    """Write ``name.yaml`` and ``name.jsonl`` into the folder ``out``.

    Args:
        problems: The exam.
        out: A folder, for the harness's ``--include_path``.
        name: The task's name: letters, digits and ``_ - .``.
        prompt: One of :data:`medllm.exam.option_prompts.OPTION_PROMPTS`.
        method: What is compared: the ``options``' own texts, or their ``letters``.

    Raises:
        UserError: an unknown prompt, a name that cannot be one, or no problem with exactly one right option.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name is '{name}'; a task's name has letters, digits and _ - . alone")
    left_out: Counter[str] = Counter()
    rows = []
    for problem in problems:
        if problem.is_numeric or problem.answer_count > 1 or len(problem.accepted) > 1:
            left_out["numeric problem" if problem.is_numeric else "several right options"] += 1
        else:
            rows.append(_row(problem, prompt, method))
    if not rows:
        raise UserError("no problem has exactly one right option; a task of multiple choice needs such problems")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    data, file = (folder / f"{name}.jsonl").absolute(), folder / f"{name}.yaml"
    with atomic_path(data) as scratch:
        scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with atomic_path(file) as scratch:
        scratch.write_text(yaml.safe_dump(_task(name, data), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return HarnessTask(name, file, len(rows), dict(left_out))


def _row(problem: Problem, prompt: OptionPrompt, method: str) -> dict[str, Any]:
    lettered = method == "letters"
    letters = LETTERS[: len(problem.choices)]
    return {
        "problem_id": problem.problem_id,
        "category": problem.category or "",
        "prompt": option_prompt(problem, prompt, lettered=lettered),
        "choices": list(letters.upper() if lettered else problem.choices),
        "gold": letters.index(problem.accepted[0][0]),
    }


def _task(name: str, data: Path) -> dict[str, Any]:
    share = {"aggregation": "mean", "higher_is_better": True}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", **share}, {"metric": "acc_norm", **share}],
        "metadata": {"version": 1.0},
    }
