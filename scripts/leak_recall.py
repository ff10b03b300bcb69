#!/usr/bin/env python
"""How many planted copies of exam problems are found at each level of change, and how many problems that are not there.

    python scripts/leak_recall.py --plot curve.svg --json recall.json                          # made-up problems
    python scripts/leak_recall.py --problems EXAM --problems EXAM --documents TEXT       # one's own, planted in one's own texts

The problems are split in two halves, and each half into problems that are planted and problems that are not. The threshold is
chosen on the first half: the least at which no more than ``--false-alarms`` of its absent problems are found, over all
changes. What is reported is the second half. Absent problems face the copies of the planted ones (the same exam, the same
diseases, the same stock questions) and the documents. Problems that share their case with another are left out of the absent.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medllm.corpus.documents import Document, read_documents
from medllm.corpus.leaks.changes import CHANGES, as_text
from medllm.corpus.leaks.made_up import made_up_problems, made_up_texts
from medllm.corpus.leaks.near import near_leaks
from medllm.corpus.leaks.pieces import fold, pieces
from medllm.exam.loaders import load_problems
from medllm.exam.problem import Problem
from medllm.stage_config import CorpusConfig

LEVELS = (0.1, 0.2, 0.3, 0.4)
WHOLE = (0.5, 1.0)
"""Levels of changes of the options, which are a matter of how many."""
_SHARED, _SHARED_PIECES = 0.6, 60
"""Share and number of the pieces of its question that a problem has in common with another, where both are about one case."""


@dataclass(frozen=True)
class Half:
    """Problems of which some are planted, and what the texts alone hold of each."""

    problems: Sequence[Problem]
    planted: np.ndarray
    absent: np.ndarray
    texts: np.ndarray


def main() -> None:
    """Plant, search, choose a threshold and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", action="append", default=[], help="problem file or folder; made-up ones without it")
    parser.add_argument("--documents", action="append", default=[], help="text to plant them in")
    parser.add_argument("--most", type=int, default=1000, help="problems that are used")
    parser.add_argument("--false-alarms", type=float, default=0.005, help="share of absent problems that may be found")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()

    chance = random.Random(0)
    problems = _problems(arguments.problems, arguments.most)
    chance.shuffle(problems)
    texts = _texts(arguments.documents)
    halves = [_half(problems[start::2], texts, chance) for start in (0, 1)]
    scores = [
        {f"{name} {level:g}": _scores(half, texts, name, level, chance) for name in CHANGES for level in _levels(name)}
        for half in halves
    ]
    chosen = np.concatenate([found[halves[0].absent] for found in scores[0].values()])
    threshold = round(float(np.quantile(chosen, 1 - arguments.false_alarms)), 3) + 0.001
    rows = {key: _row(found, halves[1], threshold) for key, found in scores[1].items()}
    print(f"{len(problems)} problems, {len(texts)} texts; threshold {threshold:.3f} of the first half, the second half:")
    for key, row in rows.items():
        print(f"{key:24}", *(f"{name.replace('_', ' ')} {value:.4f} " for name, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"threshold": threshold, "rows": rows}, indent=1))
    if arguments.plot:
        _plot(arguments.plot, scores[1], halves[1], threshold)


def _problems(paths: Sequence[str], most: int) -> list[Problem]:
    if not paths:
        return made_up_problems(most)
    found = [(number, one) for number, path in enumerate(paths) for one in load_problems(path).problems]
    named = [replace(one, problem_id=f"{number}/{one.problem_id}") for number, one in found]
    return random.Random(1).sample(named, min(most, len(named)))


def _texts(paths: Sequence[str]) -> list[str]:
    if not paths:
        return made_up_texts(300)
    return [one.text for one in read_documents(CorpusConfig(documents=tuple(paths)), Counter())]


def _half(problems: Sequence[Problem], texts: Sequence[str], chance: random.Random) -> Half:
    alone = _best(problems, [Document(text, "text") for text in texts])
    planted = np.zeros(len(problems), bool)
    planted[chance.sample(range(len(problems)), len(problems) // 2)] = True
    return Half(problems, planted, ~planted & ~_shares_a_case(problems), alone)


def _shares_a_case(problems: Sequence[Problem]) -> np.ndarray:
    """Which problems have most of a long question in common with another: questions about one case."""
    asked = [set(pieces(fold(problem.text)).tolist()) - {0} for problem in problems]
    owners: dict[int, list[int]] = {}
    for number, own in enumerate(asked):
        for piece in own:
            owners.setdefault(piece, []).append(number)
    shared = np.zeros(len(problems), bool)
    for number, own in enumerate(asked):
        others = Counter(other for piece in own for other in owners[piece] if other != number)
        most = max(others.values(), default=0)
        shared[number] = most >= _SHARED_PIECES and most >= _SHARED * len(own)
    return shared


def _scores(half: Half, texts: Sequence[str], name: str, level: float, chance: random.Random) -> np.ndarray:
    """What the texts with the planted copies hold of each problem."""
    documents = []
    for problem in (one for one, planted in zip(half.problems, half.planted, strict=True) if planted):
        before, behind = chance.sample(texts, 2)
        copy = as_text(CHANGES[name](problem, level, chance), chance)
        documents.append(Document(f"{before[: chance.randint(0, 400)]}\n{copy}\n{behind[: chance.randint(0, 400)]}", "copy"))
    return np.maximum(half.texts, _best(half.problems, documents))


def _best(problems: Sequence[Problem], documents: Sequence[Document]) -> np.ndarray:
    found = np.zeros(len(problems))
    for one in near_leaks(documents, problems, 0.0):
        found[one.problem] = one.found
    return found


def _levels(name: str) -> tuple[float, ...]:
    return WHOLE if name.startswith("options") else LEVELS


def _row(found: np.ndarray, half: Half, threshold: float) -> dict[str, float]:
    there, absent = found[half.planted], found[half.absent]
    right, wrong = float((there >= threshold).sum()), float((absent >= threshold).sum())
    return {
        "recall": right / len(there),
        "false_alarms": wrong / len(absent),
        "precision": right / max(right + wrong, 1.0),
        "area": float((there[:, None] > absent).mean() + (there[:, None] == absent).mean() / 2),
    }


def _plot(file: Path, scores: dict[str, np.ndarray], half: Half, threshold: float) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for name in CHANGES:
        levels = _levels(name)
        panels[0].plot(
            levels, [_row(scores[f"{name} {level:g}"], half, threshold)["recall"] for level in levels], marker="o", label=name
        )
        if name.startswith("options") or name == "typeset anew":
            continue
        hardest = scores[f"{name} {levels[-1]:g}"]
        cuts = np.unique(hardest)[::-1]
        false = [(hardest[half.absent] >= cut).mean() for cut in cuts]
        panels[1].plot(false, [(hardest[half.planted] >= cut).mean() for cut in cuts], label=f"{name}, {levels[-1]:g}")
    panels[0].set(xlabel="level of change", ylabel=f"share of copies found at {threshold:.2f}", ylim=(0, 1.03))
    panels[1].set(xlabel="share of absent problems found", ylabel="share of copies found", xlim=(-0.002, 0.1), ylim=(0, 1.03))
    for panel in panels:
        panel.legend(fontsize=8, loc="lower right")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
