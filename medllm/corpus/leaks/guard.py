"""The stages' check: what they read holds nothing that the study is tested on, unless that is allowed by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from medllm.corpus.documents import Document
from medllm.corpus.leaks.derivations import derived
from medllm.corpus.leaks.exact import WORD_FOR_WORD, Leak
from medllm.corpus.leaks.search import search
from medllm.errors import UserError
from medllm.exam.loaders import problems_at
from medllm.exam.problem import Problem
from medllm.stage_config import HeldOutConfig


def refuse_leaks(documents: Iterable[Document], files: Sequence[str], held_out: HeldOutConfig) -> None:
    """Refuse training data that holds a held-out problem, or is a set known to be made from its exam.

    Args:
        documents: The texts, each with its ``file:line``.
        files: The files and folders that they are from, for the table of sets.
        held_out: What must not be in them. Without problems nothing is looked for.

    Raises:
        UserError: something is found that ``held_out.allow`` does not name, or it names what is nowhere.
    """
    if not held_out.problems:
        return
    problems = [problem for path in held_out.problems for problem in problems_at(path, held_out).problems]
    texts, allowed = list(documents), frozenset(held_out.allow)
    made_from = derived(files, problems)
    _check_allowed(
        allowed, problems, {name for text in texts for name in _names(text.source)} | {one.file for one in made_from}
    )
    for one in made_from:
        if one.file not in allowed:
            raise UserError(f"{one.words()}: take it out, or name the file in --held_out.allow")
    wanted = [problem for problem in problems if problem.problem_id not in allowed]
    found = search((text for text in texts if not allowed & _names(text.source)), wanted, held_out.exact, held_out.near)
    if found:
        raise UserError(_refusal(found, {problem.problem_id: problem for problem in wanted}))


def problem_texts(problems: Iterable[Problem]) -> list[Document]:
    """Problems as texts to be searched: question, options and explanation."""
    return [
        Document("\n".join([one.question, *one.choices, one.explanation or ""]), one.source or f"problem {one.problem_id}")
        for one in problems
    ]


def _names(source: str) -> frozenset[str]:
    """What a document can be allowed by: its ``file:line``, and its file."""
    return frozenset({source, source.rpartition(":")[0] or source})


def _check_allowed(allowed: frozenset[str], problems: Iterable[Problem], sources: set[str]) -> None:
    nowhere = sorted(allowed - {problem.problem_id for problem in problems} - sources)
    if nowhere:
        raise UserError(
            f"--held_out.allow names '{nowhere[0]}', which is neither the id of a held-out problem nor a file that is read; "
            "give the id, FILE or FILE:LINE as a refusal has it"
        )


def _refusal(found: Sequence[Leak], problems: dict[str, Problem]) -> str:
    first = found[0]
    how = (
        f"{first.overlap:.0%} of it word for word"
        if first.kind == WORD_FOR_WORD
        else f"its {first.kind}, {first.overlap:.2f} alike"
    )
    more = f", and {len(found) - 1} other held-out problems are in what is read" if len(found) > 1 else ""
    return (
        f"{first.source}: holds problem {first.problem_id} of {problems[first.problem_id].source} ({how}), which is held out "
        f"(--held_out.problems){more}: take it out, or allow it by name (--held_out.allow {first.problem_id})"
    )
