"""A model's answers as they come, a line each, so that none is lost and none is asked for twice.

::

    {"problem_id": "110A1", "sample": 0, "prompt": "5b1c…", "text": "…", "tokens": [310, 7], "finish": "stop", "stopped": ""}

``prompt`` is a digest: the prompt itself, with its shots, would be most of the file. ``facts``, where they are, are what a
server said of the request that the answer came with; of several answers to one request the first has them. Lines that arrive
together are written together, and are on the disk before the next ones are asked for.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medllm.engine import Generation
from medllm.errors import UserError
from medllm.facts import read_facts
from medllm.kept_lines import append_lines, read_lines
from medllm.model.tokenizer import Prompt

JOURNAL = "answers.journal"
"""Its name in a run folder."""


@dataclass(frozen=True)
class Kept:
    """An answer as it is kept: to which problem, which sample, to which prompt, and what was said of the request."""

    problem_id: str
    sample: int
    prompt: str
    generation: Generation
    facts: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """The answers of a run. Without a path they are kept in memory alone.

    A last line that is torn, as a kill leaves it, is dropped. Of two lines for one answer the later one counts: answers of a
    batch that was torn are all given again.

    Raises:
        UserError: a line that is none, and is not the last.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.facts: list[Mapping[str, Any]] = []
        self._answers: dict[str, dict[int, Generation]] = {}
        self._tokens: dict[str, dict[int, array[int]]] = {}
        self._counts: Counter[str] = Counter()
        self._prompts: dict[str, str] = {}
        if path is not None and path.exists():
            read_lines(path, lambda row: self._take(_kept(row)))

    def answers(self, problem_id: str, prompt: Prompt) -> Mapping[int, Generation]:
        """Those to a problem, by sample.

        Raises:
            UserError: they are to another prompt.
        """
        asked = self._prompts.get(problem_id)
        if asked is not None and asked != digest(prompt):
            raise UserError(
                f"{self.path}: problem {problem_id} was answered under another prompt: it, or the examples before it, changed "
                "since; put them back, or start a new --run"
            )
        return self._answers.get(problem_id, {})

    def add(self, answers: Iterable[Kept]) -> None:
        """Write answers that came together, and wait until they are on the disk.

        Raises:
            UserError: the file cannot be written.
        """
        rows = []
        for one in answers:
            self._take(one)
            rows.append(_row(one))
        if self.path is not None:
            append_lines(self.path, rows)

    def take(self, problem_id: str, prompt: Prompt) -> Mapping[int, Generation]:
        """:meth:`answers`, for the last time: the memory they take is given back.

        Raises:
            UserError: as there.
        """
        answers, tokens = self.answers(problem_id, prompt), self._tokens.pop(problem_id, {})
        self._answers.pop(problem_id, None)
        return {sample: replace(one, tokens=tuple(tokens[sample])) for sample, one in answers.items()}

    def count(self, problem_id: str) -> int:
        """How many answers to a problem were kept, those taken among them."""
        return self._counts[problem_id]

    def _take(self, one: Kept) -> None:
        self._prompts[one.problem_id] = one.prompt
        answers = self._answers.setdefault(one.problem_id, {})
        answers[one.sample] = replace(one.generation, tokens=())
        # Four bytes a token: a run that goes on holds all of them.
        self._tokens.setdefault(one.problem_id, {})[one.sample] = array("I", one.generation.tokens)
        self._counts[one.problem_id] = len(answers)
        if one.facts:
            self.facts.append(one.facts)


def digest(prompt: Prompt) -> str:
    """A short digest of a prompt."""
    text = prompt if isinstance(prompt, str) else json.dumps([message.to_json() for message in prompt], ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _row(one: Kept) -> dict[str, Any]:
    said = one.generation
    return {
        "problem_id": one.problem_id,
        "sample": one.sample,
        "prompt": one.prompt,
        "text": said.text,
        "tokens": said.tokens,
        "finish": said.finish,
        "stopped": said.stopped,
        **({"facts": one.facts} if one.facts else {}),
    }


def _kept(row: Any) -> Kept:
    for name in ("problem_id", "prompt", "text", "finish", "stopped"):
        if not isinstance(row[name], str):
            raise TypeError(f"'{name}' is no text")
    if type(row["sample"]) is not int:
        raise TypeError("'sample' is no whole number")
    generation = Generation(row["text"], tuple(row["tokens"]), row["finish"], row["stopped"])
    return Kept(row["problem_id"], row["sample"], row["prompt"], generation, read_facts(row))
