"""The hierarchy ground truth > chosen > rejected → the pairs that are trained on, and their export to TRL's columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from medllm.config import PairConfig
from medllm.preferences.records import Preference, Sample
from medllm.run import atomic_path


class Rank(IntEnum):
    """Level of a response in the hierarchy; the higher one is preferred."""

    REJECTED = 0
    CHOSEN = 1
    GROUND_TRUTH = 2


@dataclass(frozen=True)
class PairedResponses:
    """The kept responses of one problem and the pairs among them.

    Attributes:
        responses: Ground truth, chosen, rejected samples, in that order; no text twice.
        ranks: The :class:`Rank` of each response.
        pairs: (preferred, dispreferred) indices into ``responses``; every response of a higher rank against every one of
            a lower rank. Empty where only the ground truth is left.
    """

    responses: tuple[Sample, ...]
    ranks: tuple[Rank, ...]
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pair:
    """One row of preference training in TRL's terms: ``chosen`` is the preferred text, ``rejected`` the other."""

    problem_id: str
    prompt: str
    chosen: str
    rejected: str

    def trl_row(self) -> dict[str, str]:
        """Exactly the columns ``prompt``, ``chosen`` and ``rejected``."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


def select_pairs(preference: Preference, config: PairConfig) -> PairedResponses:
    """Keep the first distinct samples of each rank and pair every rank with those below it.

    A text that already stands at a higher rank is not kept again, so no pair holds equal texts and none comes twice.
    Deterministic: the order of the file decides.
    """
    kept: list[tuple[Sample, Rank]] = []
    seen: set[str] = set()
    for rank, samples, most in (
        (Rank.GROUND_TRUTH, (preference.ground_truth,), 1),
        (Rank.CHOSEN, preference.chosen, config.max_chosen),
        (Rank.REJECTED, preference.rejected, config.max_rejected),
    ):
        distinct = list(_distinct(samples, seen))
        kept += [(sample, rank) for sample in (distinct[:most] if most else distinct)]
    ranks = tuple(rank for _, rank in kept)
    pairs = tuple((high, low) for high in range(len(kept)) for low in range(len(kept)) if ranks[high] > ranks[low])
    return PairedResponses(tuple(sample for sample, _ in kept), ranks, pairs)


def text_of(preference: Preference, paired: PairedResponses, pair: tuple[int, int]) -> Pair:
    """One of the pairs of ``paired``, as text."""
    high, low = (paired.responses[index].text for index in pair)
    return Pair(preference.problem_id, preference.prompt, high, low)


def training_pairs(preferences: Iterable[Preference], config: PairConfig) -> list[Pair]:
    """All pairs of all problems, in the order of the file."""
    return [
        text_of(preference, paired, pair)
        for preference in preferences
        for paired in [select_pairs(preference, config)]
        for pair in paired.pairs
    ]


def trl_rows(preferences: Iterable[Preference], config: PairConfig) -> list[dict[str, str]]:
    """All pairs of all problems as rows of TRL's DPOTrainer."""
    return [pair.trl_row() for pair in training_pairs(preferences, config)]


def export_trl(preferences: Sequence[Preference], path: str | Path, config: PairConfig | None = None) -> int:
    """Write :func:`trl_rows` as JSONL, all of it or nothing, and return the number of rows."""
    rows = trl_rows(preferences, config or PairConfig())
    with atomic_path(Path(path)) as scratch, scratch.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return len(rows)


def _distinct(samples: Iterable[Sample], seen: set[str]) -> Iterator[Sample]:
    for sample in samples:
        if sample.text not in seen:
            seen.add(sample.text)
            yield sample
