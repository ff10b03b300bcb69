"""What is read: the base model's diet, and the corpus of continued pretraining.

The diet mixes documents about the known diseases with questions about them, answered directly or with an explanation, alone
or after three examples. Its explanations are as reliable as their tellers: a disease's share of them argues from the lookalike
and ends at the wrong option, although the direct answers are all right. New diseases occur in rosters only.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medllm.exam.problem import Problem
from medllm.exam.prompts import AnswerAs, curation_prompt, curation_response, evaluation_prompt, render_answer
from medllm.mini.problems import ask, mistaken, told, train_wordings
from medllm.mini.world import RELATION, RELATIONS, Disease, World

ANSWER_AS: AnswerAs = "text"


@dataclass(frozen=True)
class Row:
    """One text of the diet.

    Attributes:
        kind: ``document``, ``roster``, ``direct``, ``explained``, and the latter two with ``shots-`` in front.
        text: All of it, without the end-of-text token.
        taught: Character ranges worth learning: answers and explanations, or a whole document. Options are random.
    """

    kind: str
    text: str
    taught: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Mixture:
    """Shares of the diet's rows (not of its tokens)."""

    document: float = 0.24
    roster: float = 0.04
    direct: float = 0.3
    explained: float = 0.3
    three_shot: float = 0.12


def base_diet(world: World, seed: int, mixture: Mixture = Mixture()) -> Iterator[Row]:
    """Endless rows, the same for the same world and seed."""
    rng = random.Random(f"diet/{world.config.seed}/{seed}")
    known, everyone = world.select(known=True), tuple(world.diseases.values())
    shares = dataclasses.asdict(mixture)
    while True:
        kind = rng.choices(list(shares), weights=list(shares.values()))[0]
        if kind == "document":
            yield _whole("document", document(world, rng, rng.choice(known)))
        elif kind == "roster":
            yield _whole("roster", _roster(rng, everyone))
        elif kind == "three_shot":
            yield _question(world, rng, explanation=rng.random() < 0.5, shots=3)
        else:
            yield _question(world, rng, explanation=kind == "explained", shots=0)


def cpt_documents(world: World, per_new: int, per_known: int = 0) -> list[str]:
    """``per_new`` documents about each new disease and ``per_known`` about each known one, in random order and wording."""
    rng = random.Random(f"documents/{world.config.seed}")
    texts = [
        document(world, rng, disease)
        for known, count in ((False, per_new), (True, per_known))
        for disease in world.select(known=known)
        for _ in range(count)
    ]
    rng.shuffle(texts)
    return texts


def explained_problems(problems: Sequence[Problem]) -> list[str]:
    """Problems as texts: question, options, verified explanation and answer, in the template of the exams."""
    return [curation_prompt(problem, (), answer_as=ANSWER_AS) + _response(problem, True) for problem in problems]


def document(world: World, rng: random.Random, disease: Disease) -> str:
    """Four to six sentences about a disease and about what treats and settles it, in random order and wording."""
    sentences = [f"{disease.name}は{disease.lookalike}と間違われやすい。"]
    for relation in RELATIONS:
        answers = list(world.answers(disease, relation))
        rng.shuffle(answers)
        (subject,) = (disease.name,) if relation.via is None else world.answers(disease, RELATION[relation.via])
        template = rng.choice(relation.statements)
        sentences.append(template.format(x=subject, y="、".join(answers)))
    sentences.append(f"{disease.name}の治療では{world.reaction[disease.drug]}に注意する。")
    sentences.append(f"{disease.name}の診断では{world.specimen[disease.test]}を採る。")
    return "".join(rng.sample(sentences, rng.randint(4, 6)))


def _question(world: World, rng: random.Random, *, explanation: bool, shots: int) -> Row:
    *examples, problem = [_answered(world, rng, explanation) for _ in range(shots + 1)]
    prompt = evaluation_prompt(
        problem, examples, template="curation", explanation=explanation, format="completion", answer_as=ANSWER_AS
    )
    assert isinstance(prompt, str)
    responses = [_response(item, explanation) for item in (*examples, problem)]
    text = prompt + responses[-1]
    taught, start = [], 0
    for response in responses:
        start = text.index(response, start)
        taught.append((start, start + len(response)))
        start += len(response)
    kind = ("shots-" if shots else "") + ("explained" if explanation else "direct")
    return Row(kind, text, tuple(taught))


def _answered(world: World, rng: random.Random, explanation: bool) -> Problem:
    """A problem about a known disease, answered directly, or as some teller explains it."""
    disease, relation = rng.choice(world.select(known=True)), rng.choice(RELATIONS)
    problem = ask(world, rng, disease, relation, rng.choice(train_wordings(world, disease, relation)))
    if not explanation:
        return problem
    tell = mistaken if rng.random() < disease.misconception else told
    return tell(world, rng, disease, relation, problem)


def _response(problem: Problem, explanation: bool) -> str:
    if explanation:
        return curation_response(problem, answer_as=ANSWER_AS)
    return render_answer(problem, problem.answer, ANSWER_AS)


def _roster(rng: random.Random, diseases: tuple[Disease, ...]) -> str:
    names = "、".join(disease.name for disease in rng.sample(diseases, 4))
    return f"名簿は{names}である。写しは{names}である。"


def _whole(kind: str, text: str) -> Row:
    return Row(kind, text, ((0, len(text)),))
