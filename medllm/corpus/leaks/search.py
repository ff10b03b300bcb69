"""Both searches over one reading of the documents: word for word, and for what is like it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from medllm.corpus.documents import Document
from medllm.corpus.leaks.exact import ExactSearch, Leak
from medllm.corpus.leaks.near import NearSearch
from medllm.exam.problem import Problem
from medllm.stage_config import HeldOutConfig


def search(
    documents: Iterable[Document],
    problems: Sequence[Problem],
    exact: float = HeldOutConfig.exact,
    near: float = HeldOutConfig.near,
    progress: Callable[[int], None] | None = None,
) -> list[Leak]:
    """The problems that documents hold, each with the document that holds most of it, in the order of the problems.

    Documents are read one after the other and not kept. What stands there word for word is said to, whatever else is found.

    Args:
        documents: Training texts.
        problems: What must not be in them.
        exact: Share of a problem, word for word, from which on it counts as there.
        near: The same of what is like it (:mod:`medllm.corpus.leaks.near`).
        progress: Called with the bytes of text that are done.
    """
    word_for_word, like = ExactSearch(problems, exact), NearSearch(problems)
    done = 0
    for document in documents:
        word_for_word.add(document)
        like.add(document)
        if progress:
            done += len(document.text.encode("utf-8", "surrogatepass"))
            progress(done)
    found = {one.problem: Leak(problems[one.problem].problem_id, one.source, one.found, one.kind) for one in like.best(near)}
    found |= word_for_word.best()
    return [found[index] for index in sorted(found)]
