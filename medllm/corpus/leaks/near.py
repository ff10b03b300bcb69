"""Problems in training text that are not there word for word: by the pieces that tell a problem from all others.

A copy with scanning errors, other words, its options shuffled, translated or left out keeps part of the problem's pieces, close
together. What a window of a document holds of them is added up, each piece by how rare it is,

    found = Σ weight of the problem's pieces in the window / (Σ weight of all its pieces + DOUBT),

over question and options, and over the question alone; the larger counts. A piece that many problems have, or that stands
in a stock phrase of exams, says nothing about which problem it is and is left out. ``DOUBT`` is what a problem has to bring
with it: one whose question and options are all stock never reaches the threshold, whatever is found; it is told by exact
containment alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy import ndarray

from medllm.corpus.documents import Document
from medllm.corpus.leaks.pieces import BETWEEN, fold, pieces
from medllm.exam.problem import Problem
from medllm.stage_config import HeldOutConfig

THRESHOLD = HeldOutConfig.near
"""Chosen on one half of planted copies and reported on the other: docs/evidence.md."""
DOUBT = 60.0
"""Weight of some eight rare pieces."""
MOST_SHARED = 0.01
"""A piece of a larger share of the problems says nothing about which of them it is."""
_UNSEEN = 200
"""Problems that a small set of problems is filled up with, none of which has the piece."""
_BATCH = 1 << 18
_BLOCKS = 3
"""Blocks in a window; one begins at every block, so a copy of two blocks lies whole in one."""


@dataclass(frozen=True)
class Near:
    """What a document holds of a problem at most.

    Attributes:
        problem: Its number in the order of the problems.
        source: The document, ``file:line``.
        found: 0 to 1; see the module.
        kind: ``question and options``, or ``question`` where that alone gives more.
    """

    problem: int
    source: str
    found: float
    kind: str


class NearSearch:
    """The problems that are looked for, and the best place of each so far."""

    def __init__(self, problems: Sequence[Problem]):
        questions = [np.unique(pieces(fold(one.text))) for one in problems]
        options = [np.unique(pieces(BETWEEN.join(map(fold, one.choices)))) for one in problems]
        owned = [np.union1d(question, option) for question, option in zip(questions, options, strict=True)]
        self._known, index, shared = np.unique(np.concatenate([*owned, _NONE]), return_inverse=True, return_counts=True)
        weights = _weights(self._known, shared, len(problems))
        owners = np.repeat(np.arange(len(problems)), [len(one) for one in owned])
        order = np.argsort(index[weights[index] > 0], kind="stable")
        piece, self._owner = index[weights[index] > 0][order], owners[weights[index] > 0][order]
        self._begin = np.searchsorted(piece, np.arange(len(self._known) + 1))
        self._weight = weights[piece]
        asked = [np.isin(one, question) for one, question in zip(owned, questions, strict=True)]
        in_question = np.concatenate([*asked, np.zeros(0, bool)])[weights[index] > 0][order]
        self._question_weight = self._weight * in_question
        size = len(problems)
        self._whole = np.bincount(self._owner, self._weight, size) + DOUBT
        self._question = np.bincount(self._owner, self._question_weight, size) + DOUBT
        lengths = np.array([len(fold(one.text)) + sum(len(fold(option)) for option in one.choices) for one in problems], float)
        self._block = np.maximum((1.2 * lengths + 40) / (_BLOCKS - 1), 1).astype(np.int64)
        self._best: dict[int, Near] = {}
        self._waiting: list[tuple[str, str]] = []
        self._characters = 0

    def add(self, document: Document) -> None:
        """Look through a document; a short one is looked through with those that follow."""
        folded = fold(document.text)
        overlap = _BLOCKS * int(self._block.max(initial=1))
        for start in range(0, max(len(folded), 1), _BATCH):
            part = folded[start : start + _BATCH + overlap]
            self._waiting.append((part, document.source))
            self._characters += len(part)
            if self._characters >= _BATCH:
                self._look()

    def best(self, least: float) -> list[Near]:
        """Each problem's best place, where it has one with ``found`` of ``least`` or more, in the order of the problems."""
        self._look()
        return [self._best[index] for index in sorted(self._best) if self._best[index].found >= least]

    def _look(self) -> None:
        texts, self._waiting, self._characters = self._waiting, [], 0
        if not texts or not len(self._owner):
            return
        found = pieces(BETWEEN.join(text for text, _ in texts))
        starts = np.cumsum([0, *(len(text) + 1 for text, _ in texts)])
        place = np.minimum(np.searchsorted(self._known, found), len(self._known) - 1)
        position = np.flatnonzero((self._known[place] == found) & (found != 0))
        begin, end = self._begin[place[position]], self._begin[place[position] + 1]
        position = np.repeat(position, end - begin)
        pair = _ranges(begin, end)
        document = np.searchsorted(starts, position, side="right") - 1
        block = (position - starts[document]) // self._block[self._owner[pair]]
        self._add_up(pair, document, block, [source for _, source in texts])

    def _add_up(self, pair: ndarray, document: ndarray, block: ndarray, sources: Sequence[str]) -> None:
        """The weights of the distinct pieces in every window of ``_BLOCKS`` blocks, and the best window of each problem."""
        blocks = int(block.max(initial=0)) + _BLOCKS
        window = document * blocks + block
        windows = len(sources) * blocks
        keys = _distinct(np.concatenate([pair * windows + window + shift for shift in range(_BLOCKS)]))
        pair, window = keys // windows, keys % windows
        groups, group = np.unique(self._owner[pair] * windows + window, return_inverse=True)
        owner = groups // windows
        whole = np.bincount(group, self._weight[pair], len(groups)) / self._whole[owner]
        question = np.bincount(group, self._question_weight[pair], len(groups)) / self._question[owner]
        found = np.maximum(whole, question)
        order = np.lexsort((groups, -found, owner))
        for one in order[np.unique(owner[order], return_index=True)[1]].tolist():
            problem = int(owner[one])
            if problem not in self._best or found[one] > self._best[problem].found:
                source = sources[int(groups[one] % windows) // blocks]
                kind = "question and options" if whole[one] >= question[one] else "question"
                self._best[problem] = Near(problem, source, float(found[one]), kind)


def near_leaks(documents: Iterable[Document], problems: Sequence[Problem], least: float) -> list[Near]:
    """The problems that documents nearly hold; documents are read one after another and not kept."""
    search = NearSearch(problems)
    for document in documents:
        search.add(document)
    return search.best(least)


_NONE = np.zeros(0, np.uint64)


def _weights(known: ndarray, shared: ndarray, problems: int) -> ndarray:
    """−ln of the share of problems that have a piece; 0 for what says nothing."""
    share = np.maximum(shared - 1, 0.5) / (problems + _UNSEEN)
    weights = np.minimum(-np.log(share), math.log(2000))
    weights[(share > MOST_SHARED) | (known == 0) | np.isin(known, _stock_pieces())] = 0
    return weights


@functools.cache
def _stock_pieces() -> ndarray:
    phrases = resources.files("medllm.corpus.leaks").joinpath("stock_phrases.txt").read_text(encoding="utf-8").splitlines()
    return np.unique(pieces(BETWEEN.join(fold(phrase) for phrase in phrases if not phrase.startswith("#"))))


def _distinct(keys: ndarray) -> ndarray:
    """Sorted and each once. numpy's own ``unique`` hashes, and keys as regular as these fall into few of its places."""
    keys = np.sort(keys)
    return keys[np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]])]


def _ranges(begin: ndarray, end: ndarray) -> ndarray:
    """All of begin[0] … end[0]−1, begin[1] … end[1]−1 and so on."""
    sizes = end - begin
    ends = np.cumsum(sizes)
    return np.arange(int(sizes.sum())) + np.repeat(begin - (ends - sizes), sizes)
