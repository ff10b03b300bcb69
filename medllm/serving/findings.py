"""A server's answers beside an engine's own to the same tokens: how each ends, and which promise was not kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import fisher_exact

from medllm.engine import Generation
from medllm.exam.endings import EndingCounts, ending, runs_on
from medllm.exam.predictions import Prediction
from medllm.exam.problem import Problem
from medllm.exam.scoring import score
from medllm.model.tokenizer import Prompt
from medllm.serving.asking import CHAT, Way

_THOUGHT = "<think>"
_CHANCE = 0.05


@dataclass(frozen=True)
class Answer:
    """A text, however it was come by.

    Attributes:
        text: What was written.
        cut_off: The length ended it.
        stopped: The stop string that ended it, where known.
        prompt_tokens: How many tokens the prompt was made into, where known.
        thought: What was written before the answer and kept apart.
    """

    text: str
    cut_off: bool
    stopped: str = ""
    prompt_tokens: int | None = None
    thought: str = ""

    @classmethod
    def own(cls, generation: Generation, prompt_tokens: int) -> Answer:
        """An engine's."""
        return cls(generation.text, generation.finish == "length", generation.stopped, prompt_tokens)


@dataclass(frozen=True)
class Asked:
    """Answers to all problems under one way of asking.

    Attributes:
        way: The way.
        prompts: The prompts.
        served: The server's answers; empty where it refused.
        own: The engine's, to the same prompts; empty where there is none to compare with.
        thinking: Tokens of each prompt with the template's thinking left on; empty where it knows of none.
        refused: What the server said, where it refused.
    """

    way: Way
    prompts: Sequence[Prompt]
    served: Sequence[Answer]
    own: Sequence[Answer] = ()
    thinking: Sequence[int] = ()
    refused: str = ""

    @property
    def is_text(self) -> bool:
        """Whether the prompts are texts to continue."""
        return isinstance(self.prompts[0], str)

    @property
    def pairs(self) -> list[tuple[Answer, Answer]]:
        """(the server's, the engine's) of each problem, where there are both."""
        return list(zip(self.served, self.own, strict=True)) if self.served and self.own else []

    @property
    def others(self) -> int:
        """Texts that are not the engine's own. A server may leave the stop string at the end, and trim spaces."""
        return sum(served.text.strip() not in _same(own) for served, own in self.pairs)

    @property
    def surplus(self) -> set[int]:
        """By how many tokens the server's prompts are longer than the engine's."""
        return {
            served.prompt_tokens - own.prompt_tokens
            for served, own in self.pairs
            if served.prompt_tokens is not None and own.prompt_tokens is not None
        }


def rates(way: Way, problems: Sequence[Problem], prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, float]:
    """Share of the texts that run on, are cut off and unread, and the score (points earned over points possible)."""
    read = [way.read(answer.text, problem) for answer, problem in zip(answers, problems, strict=True)]
    endings = EndingCounts.count(
        ending(
            answer.text,
            prompt=_words(prompt),
            stop=answer.stopped,
            cut_off=answer.cut_off,
            unread=not found,
        )
        for answer, prompt, found in zip(answers, prompts, read, strict=True)
    )
    predictions = [Prediction(one.problem_id, ",".join(found)) for one, found in zip(problems, read, strict=True)]
    sheet = score(problems, predictions)
    counts = {name: getattr(endings, name) / endings.texts for name in ("run_on", "cut_off", "unread")}
    return {**counts, "score": sheet.points / sheet.possible if sheet.possible else 0.0}


def way_result(asked: Asked, problems: Sequence[Problem]) -> dict[str, Any]:
    """What one way came to: the server's rates, the engine's, the difference, and how many texts are others."""
    if asked.refused:
        return {"refused": asked.refused}
    # A server may leave the stop string at the end or cut it off; that it ended the text, the engine's own says.
    alike = [replace(s, text=o.text, stopped=o.stopped) if s.text.strip() in _same(o) else s for s, o in asked.pairs]
    served = rates(asked.way, problems, asked.prompts, alike or asked.served)
    if not asked.own:
        return {"asked": len(problems), **served}
    own = rates(asked.way, problems, asked.prompts, asked.own)
    difference = {name: served[name] - own[name] for name in served}
    surplus = sorted(asked.surplus)
    return {
        "asked": len(problems),
        **served,
        "own": own,
        "difference": difference,
        "other_texts": asked.others,
        "prompt_tokens": surplus,
    }


def findings(asked: Sequence[Asked]) -> dict[str, str]:
    """The promises that the server, or the model, does not keep: name → what was seen."""
    found: dict[str, str] = {}
    pairs = [pair for one in asked if not one.surplus - {0} for pair in one.pairs]  # what began otherwise may end so too
    if thinks := sum(_thinks(one, number) for one in asked for number in range(len(one.served))):
        seen = f"{thinks} answers begin with thoughts, or their prompts are those of thinking"
        found["thinking left on"] = f"{seen}: serve with enable_thinking false (llama.cpp: --reasoning off)"
    else:
        found |= _beginnings(asked)
    beyond = [own for served, own in pairs if own.text.strip() and _goes_on(served, own)]
    if ended := sum(not own.stopped for own in beyond):
        found["end token"] = f"{ended} of {len(pairs)} texts go on where the engine's ended with its end token"
    if stopped := sum(bool(own.stopped) for own in beyond):
        strings = ", ".join(sorted({repr(own.stopped) for own in beyond if own.stopped}))
        found["stop string"] = f"{stopped} of {len(pairs)} texts go on behind a stop string ({strings})"
    trained = asked[0]
    on = sum(runs_on(one.text, _words(prompt)) for one, prompt in zip(trained.served, trained.prompts, strict=False))
    if on:  # what a stop string held back is not read by anybody
        found["runs on"] = f"under the trained prompt {on} of {len(trained.served)} texts go on with another question or turn"
    return found


def _beginnings(asked: Sequence[Asked]) -> dict[str, str]:
    """What is wrong in front of the answer: the beginning of every text, or the template of a conversation."""
    texts, chats = [one for one in asked if one.is_text], [one for one in asked if not one.is_text]
    surplus = set().union(*(one.surplus for one in texts)) if texts else set()
    if surplus - {0}:
        amounts = ", ".join(f"{one:+d}" for one in sorted(surplus))
        if len(surplus) == 1:
            return {"BOS": f"the server makes {amounts} tokens of each text: it begins texts otherwise than the training"}
        return {"tokenizer": f"the server's prompts differ by {amounts} tokens from text to text: it has another tokenizer"}
    for one in chats:
        if one.refused:
            return {"chat template": f"a conversation is refused: {one.refused}"}
        if one.surplus - {0}:
            amounts = ", ".join(f"{amount:+d}" for amount in sorted(one.surplus))
            return {"chat template": f"a conversation ({one.way.name}) has {amounts} tokens on the server: another template"}
    turned = [_answers_otherwise(*pair) for one in chats if one.way.name == CHAT for pair in one.pairs]
    texts_too = [_answers_otherwise(*pair) for one in texts for pair in one.pairs]
    if _more_often(turned, texts_too):
        beside = f"{sum(texts_too)} of {len(texts_too)} texts"
        seen = f"{sum(turned)} of {len(turned)} conversations are answered otherwise, and {beside}: another template"
        return {"chat template": seen}
    return {}


def _thinks(asked: Asked, number: int) -> bool:
    served = asked.served[number]
    if served.thought.strip() or served.text.lstrip().startswith(_THOUGHT):
        return True
    own = asked.own[number] if asked.own else None
    known = asked.thinking and own is not None and asked.thinking[number] != own.prompt_tokens
    return bool(known) and served.prompt_tokens == asked.thinking[number]


def _answers_otherwise(served: Answer, own: Answer) -> bool:
    return not served.text.strip().startswith(own.text.strip())


def _more_often(some: Sequence[bool], others: Sequence[bool]) -> bool:
    """Whether something is more frequent among ``some`` than by chance (Fisher's exact test): near-ties turn round anywhere."""
    counts = [[sum(one), len(one) - sum(one)] for one in (some, others)]
    return bool(some and others) and bool(fisher_exact(counts, alternative="greater").pvalue < _CHANCE)


def _same(own: Answer) -> tuple[str, str]:
    return own.text.strip(), (own.text + own.stopped).strip()


def _goes_on(served: Answer, own: Answer) -> bool:
    """Whether a text is the engine's own and more, where the engine's was at an end."""
    if own.cut_off:
        return False
    whole = (own.text + own.stopped).strip()
    text = served.text.strip()
    return text.startswith(whole) and len(text) > len(whole)


def _words(prompt: Prompt) -> str:
    """What was asked last."""
    return prompt if isinstance(prompt, str) else prompt[-1].content
