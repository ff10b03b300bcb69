"""Does a training text hold an exam question? A check by character n-grams that survives re-typesetting.

Texts are compared after NFKC, case folding and removal of everything that is neither letter nor digit, so full-width digits,
line breaks, spaces and punctuation make no difference. Japanese is written without spaces, hence characters and not words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt64
from numpy import ndarray

from medllm.corpus.documents import Document
from medllm.exam.problem import Problem
from medllm.stage_config import HeldOutConfig

THRESHOLD = HeldOutConfig.exact
"""Share of a problem's pieces in one document from which on it counts as leaked."""
WORD_FOR_WORD = "word for word"
"""The kind of a leak that this search finds."""
_NOT_WRITTEN = re.compile(r"[\W_]+")
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, bits evenly spread (2^64 divided by the golden ratio)


@dataclass(frozen=True)
class Leak:
    """A problem found in a document.

    Attributes:
        problem_id: The problem.
        source: The document that holds most of it, ``file:line``.
        overlap: Share of the problem found in that document, 0 to 1.
        kind: How it was found: ``word for word``, or a kind of :class:`medllm.corpus.leaks.near.Near`.
    """

    problem_id: str
    source: str
    overlap: float
    kind: str = WORD_FOR_WORD


def normalize(text: str) -> str:
    """NFKC, case folded, letters and digits only."""
    return _NOT_WRITTEN.sub("", unicodedata.normalize("NFKC", text).casefold())


class ExactSearch:
    """The problems that are looked for, and of each the document that holds most of it so far: one of at least ``threshold``.

    What is counted are the question's distinct n-grams and, as one more each, its options found whole: a stock question
    such as 誤っているのはどれか is a leak only along with its options. A question shorter than ``n`` characters is one
    n-gram by itself; one without letters or digits cannot be looked for.

    Args:
        problems: Exam problems that must not be in the documents.
        threshold: Share of a problem from which on it counts as leaked.
        n: Characters in an n-gram.
    """

    def __init__(self, problems: Sequence[Problem], threshold: float = THRESHOLD, n: int = 13):
        self._threshold = threshold
        self._wanted = [_Wanted.of(problem, n) for problem in problems]
        by_size: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, problem in enumerate(self._wanted):
            for gram in problem.grams:
                by_size[problem.size][gram].append(index)
        self._tables = {size: (np.array(sorted(owners), dtype=np.uint64), owners) for size, owners in by_size.items()}
        self._best: dict[int, Leak] = {}

    def add(self, document: Document) -> None:
        """Look through a document."""
        text = normalize(document.text)
        for index, found in _matches(text, self._tables).items():
            one = self._wanted[index]
            if one.at_most(found) < self._threshold:
                continue
            overlap = one.overlap(found, text)
            if overlap >= self._threshold and (index not in self._best or overlap > self._best[index].overlap):
                self._best[index] = Leak(one.problem_id, document.source, overlap)

    def best(self) -> dict[int, Leak]:
        """What was found, by the problem's number in the order of the problems."""
        return dict(self._best)


@dataclass(frozen=True)
class _Wanted:
    problem_id: str
    size: int
    grams: frozenset[int]
    options: tuple[str, ...]

    @classmethod
    def of(cls, problem: Problem, n: int) -> _Wanted:
        question = normalize(problem.text)
        size = min(n, len(question))
        grams = frozenset(_gram_hashes(question, size).tolist()) if size else frozenset()
        options = tuple(option for option in map(normalize, problem.choices) if option)
        return cls(problem.problem_id, size, grams, options)

    def at_most(self, grams_found: int) -> float:
        """The overlap if all options were found too; spares looking for them where that is not enough."""
        return (grams_found + len(self.options)) / (len(self.grams) + len(self.options))

    def overlap(self, grams_found: int, text: str) -> float:
        options_found = sum(option in text for option in self.options)
        return (grams_found + options_found) / (len(self.grams) + len(self.options))


def _matches(text: str, tables: dict[int, tuple[UInt64[ndarray, "_"], dict[int, list[int]]]]) -> dict[int, int]:
    """Number of distinct n-grams of each wanted problem that ``text`` holds; problems without any are left out."""
    found: dict[int, int] = defaultdict(int)
    for size, (known, owners) in tables.items():
        hashes = _gram_hashes(text, size)
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        for gram in np.unique(hashes[known[places] == hashes]).tolist():
            for index in owners[gram]:
                found[index] += 1
    return found


def _gram_hashes(text: str, size: int) -> UInt64[ndarray, " grams"]:
    """64-bit polynomial hash of each run of ``size`` characters, Σ char · m^k modulo 2^64, in order."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    count = max(0, len(characters) - size + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    multiplier = np.uint64(_MULTIPLIER)
    for offset in range(size):
        hashes *= multiplier
        hashes += characters[offset : offset + count]
    return hashes
