"""Preference data from the model's own answers.

The model explains and answers every problem several times; its final answer sorts each response into chosen (right) or
rejected (wrong, none, or cut off), and the verified explanation stands above both as the ground truth.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from medllm.config import PairConfig, Sampling
from medllm.corpus.documents import refuse_held_out
from medllm.engine import Generates, Generation
from medllm.errors import UserError
from medllm.exam.answering import answered
from medllm.exam.answers import extract_answer
from medllm.exam.problem import Problem, check_ids
from medllm.exam.prompts import curation_prompt, curation_response, stop_strings
from medllm.host.progress import Progress
from medllm.journal import Journal
from medllm.model.tokenizer import encode
from medllm.preferences.pairs import Rank, select_pairs
from medllm.preferences.records import Preference, Sample
from medllm.stage_config import CurateConfig


@dataclass(frozen=True)
class CurationReport:
    """What became of the problems and of the model's samples.

    Attributes:
        problems: Problems that were sampled.
        skipped: Problems passed over, by reason.
        samples: Samples the model wrote.
        right: Samples with the right answer, whether kept or not: of ``samples`` the model's score on these problems.
        duplicates: Samples whose text the same problem already had; kept once.
        chosen: Kept samples with the right answer.
        rejected: Kept samples without it; ``unanswered`` and ``cut_off`` are among them.
        unanswered: Kept samples in which no final answer was found.
        cut_off: Kept samples that ran into ``max_new_tokens``; rejected whatever they say.
        filtered: Samples that a server held back; neither chosen nor rejected.
        retokenized: Kept samples that training reads as other tokens than those that were sampled: a stop string began inside a
            token, or the model wrote its text in tokens that the tokenizer would not. 0 where an engine gives no tokens.
        problems_with: Problems that have a pair of each kind of the hierarchy, ``ground truth > chosen`` and so on.
    """

    problems: int
    skipped: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    right: int = 0
    duplicates: int = 0
    chosen: int = 0
    rejected: int = 0
    unanswered: int = 0
    cut_off: int = 0
    filtered: int = 0
    retokenized: int = 0
    problems_with: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Curation:
    """The preferences, in the order of the problems, and the account of how they came about."""

    preferences: tuple[Preference, ...]
    report: CurationReport


def curate(
    engine: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: CurateConfig,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Curation:
    """Sample, grade and rank the model's responses to every problem with a verified explanation.

    Args:
        engine: The model that answers.
        problems: Training problems; they and the shots passed :func:`check_problems`.
        shots: Examples before the question, ``config.shot_count`` of them. A problem is never its own example: there, and
            where they do not suffice, the first problems with an explanation step in.
        config: Shots, sampling and limits.
        progress: Called with (problems done, problems in all).
        journal: Gets the answers as they come; those that it holds are not asked for again.

    Raises:
        UserError: fewer usable shots than ``config.shot_count``, or the engine refuses a prompt.
    """
    wanted, prompt_of = asked_problems(problems, shots, config)
    sampling = dataclasses.replace(config.sampling, stop=(*config.sampling.stop, *stop_strings("curation", True)))

    preferences: list[Preference] = []
    counts: Counter[str] = Counter()
    answers = answered(
        engine,
        wanted,
        prompt_of,
        sampling,
        batch_size=config.batch_size,
        at_a_time=config.batch_size,
        journal=journal or Journal(),
        progress=progress,
    )
    retokenized = 0
    for problem, prompt, generations in answers:
        preferences.append(_rank(problem, prompt, generations, config, counts))
        retokenized += _retokenized(engine, prompt, generations, preferences[-1])
    explained = sum(bool(problem.explanation) for problem in problems)
    skipped = {"no verified explanation": len(problems) - explained, "over the limit": explained - len(wanted)}
    report = CurationReport(
        problems=len(wanted),
        skipped={reason: count for reason, count in skipped.items() if count},
        problems_with=_problems_with_pairs(preferences),
        retokenized=retokenized,
        **counts,
    )
    return Curation(tuple(preferences), report)


def asked_problems(
    problems: Sequence[Problem], shots: Sequence[Problem], config: CurateConfig
) -> tuple[list[Problem], Callable[[Problem], str]]:
    """The problems that the model answers, and how it is asked one of them (see :func:`curate`)."""
    explained = [problem for problem in problems if problem.explanation]
    shown = {shot.text for shot in shots}
    examples = [*shots, *(problem for problem in explained if problem.text not in shown)]

    def prompt_of(problem: Problem) -> str:
        return curation_prompt(problem, _shots_for(problem, examples, config.shot_count), answer_as=config.answer_as)

    return explained[: config.limit] if config.limit else explained, prompt_of


def check_problems(problems: Sequence[Problem], shots: Sequence[Problem], config: CurateConfig) -> None:
    """Refuse what cannot be curated before a model is opened for it.

    Raises:
        UserError: a problem or shot of a year after ``config.problems_until``, a problem id that comes twice, or no problem
            with a verified explanation.
    """
    check_ids(problems)
    for problem in (*problems, *shots):
        refuse_held_out(problem, config.problems_until, "--problems_until")
    if not any(problem.explanation for problem in problems):
        raise UserError(f"none of the {len(problems)} problems has a verified explanation, so there is no ground truth to rank")


def _shots_for(problem: Problem, examples: Sequence[Problem], count: int) -> list[Problem]:
    """The first ``count`` examples that are another problem, under another id too."""
    others = (shot for shot in examples if shot.problem_id != problem.problem_id and shot.text != problem.text)
    shots = list(itertools.islice(others, count))
    if len(shots) < count:
        raise UserError(
            f"problem {problem.problem_id}: {count} shots are asked for, but only {len(shots)} other problems with an "
            "explanation are there; give a longer --shots file or a smaller --shot_count"
        )
    return shots


def _rank(
    problem: Problem, prompt: str, generations: Sequence[Generation], config: CurateConfig, counts: Counter[str]
) -> Preference:
    chosen: list[Sample] = []
    rejected: list[Sample] = []
    seen: dict[str, bool] = {}
    for index, generation in enumerate(generations):
        counts["samples"] += 1
        if generation.finish == "filtered":
            counts["filtered"] += 1
            continue
        # A base model may go on with line breaks up to the stop string: no part of the answer.
        text = generation.text.rstrip()
        if text in seen:
            counts["duplicates"] += 1
            counts["right"] += seen[text]
            continue
        answer = extract_answer(text, problem, explanation=True).answer
        right = seen[text] = generation.finish == "stop" and answer in problem.accepted
        counts["right"] += right
        counts["chosen" if right else "rejected"] += 1
        counts["unanswered"] += not answer
        counts["cut_off"] += generation.finish == "length"
        settings = _settings(config.sampling, index, generation)
        (chosen if right else rejected).append(Sample(text, ",".join(answer), config.sampling.seed, settings))
    ground_truth = Sample(curation_response(problem, answer_as=config.answer_as), ",".join(problem.accepted[0]))
    return Preference(problem.problem_id, prompt, ground_truth, tuple(chosen), tuple(rejected))


def _retokenized(engine: Generates, prompt: str, generations: Sequence[Generation], preference: Preference) -> int:
    tokenizer = getattr(engine, "tokenizer", None)
    if tokenizer is None or not any(one.tokens for one in generations):
        return 0
    before, found = encode(tokenizer, prompt), 0
    for sample in (*preference.chosen, *preference.rejected):
        trained, sampled = encode(tokenizer, prompt + sample.text), [*before, *generations[sample.settings["sample"]].tokens]
        found += trained != sampled[: len(trained)]
    return found


def _settings(sampling: Sampling, index: int, generation: Generation) -> dict[str, float | str]:
    return {
        "sample": index,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "finish": generation.finish,
    }


def _problems_with_pairs(preferences: Sequence[Preference]) -> dict[str, int]:
    names = {Rank.GROUND_TRUTH: "ground truth", Rank.CHOSEN: "chosen", Rank.REJECTED: "rejected"}
    kinds = [(Rank.GROUND_TRUTH, Rank.CHOSEN), (Rank.GROUND_TRUTH, Rank.REJECTED), (Rank.CHOSEN, Rank.REJECTED)]
    found: Counter[tuple[Rank, Rank]] = Counter()
    for preference in preferences:
        paired = select_pairs(preference, PairConfig(max_chosen=0, max_rejected=0))
        found.update({(paired.ranks[high], paired.ranks[low]) for high, low in paired.pairs})
    return {f"{names[high]} > {names[low]}": found[high, low] for high, low in kinds}
