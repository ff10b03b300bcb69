"""Likelihoods of options as they come, a line each: of a run that is killed none is asked for twice.

::

    {"problem_id": "110A1", "option": 0, "asked": "5b1c…", "nll": 12.25, "tokens": 4}

``asked`` is a digest of the prompt and the option. ``facts``, where they are, are what a server said of the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medllm.errors import UserError
from medllm.facts import read_facts
from medllm.kept_lines import append_lines, read_lines

OPTION_JOURNAL = "options.journal"
"""Its name in a run folder."""


@dataclass(frozen=True)
class KeptOption:
    """How likely an option is.

    Attributes:
        problem_id: Whose option it is.
        option: Its number, from 0.
        asked: Digest of the prompt and the option.
        nll: Summed negative log-likelihood, in nats.
        tokens: How many tokens it has.
        facts: What a server said of the request.
    """

    problem_id: str
    option: int
    asked: str
    nll: float
    tokens: int
    facts: Mapping[str, Any] = field(default_factory=dict)


class OptionJournal:
    """The options of a run that are scored. Without a path they are kept in memory alone.

    Raises:
        UserError: a line that is none, and is not the last.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._kept: dict[tuple[str, int], KeptOption] = {}
        if path is not None and path.exists():
            read_lines(path, lambda row: self._take(_kept(row)))

    @property
    def facts(self) -> list[Mapping[str, Any]]:
        """What was said of each request."""
        return [one.facts for one in self._kept.values() if one.facts]

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[KeptOption]:
        return iter(self._kept.values())

    def get(self, problem_id: str, option: int, asked: str) -> KeptOption | None:
        """What is kept of an option.

        Raises:
            UserError: it was scored under another prompt, or said something else.
        """
        kept = self._kept.get((problem_id, option))
        if kept is not None and kept.asked != asked:
            raise UserError(
                f"{self.path}: option {option + 1} of problem {problem_id} was scored under another prompt, or as another "
                "text; put the problem back, or start a new --run"
            )
        return kept

    def add(self, options: Iterable[KeptOption]) -> None:
        """Write options that came together, and wait until they are on the disk.

        Raises:
            UserError: the file cannot be written.
        """
        options = list(options)
        for one in options:
            self._take(one)
        if self.path is not None:
            append_lines(self.path, ({k: v for k, v in asdict(one).items() if k != "facts" or v} for one in options))

    def _take(self, one: KeptOption) -> None:
        self._kept[one.problem_id, one.option] = one


def _kept(row: Any) -> KeptOption:
    return KeptOption(
        row["problem_id"], int(row["option"]), row["asked"], float(row["nll"]), int(row["tokens"]), read_facts(row)
    )
