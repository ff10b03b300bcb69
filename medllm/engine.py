"""What a language model can be asked for, whichever engine holds it: text (:class:`Generates`), likelihoods (:class:`Scores`).

Training is :mod:`medllm.training`'s, where the engines are :mod:`medllm.engines`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from medllm.config import Sampling
from medllm.host.progress import Progress
from medllm.model.tokenizer import Prompt, decode, tokens_of


@dataclass(frozen=True)
class Generation:
    """One continuation: its text without stop string and end token, its tokens, and why it ended.

    ``finish`` is ``stop``; ``length`` where ``max_new_tokens`` ended it; ``filtered`` where a server holds back the text or the
    rest of it. ``stopped`` is the stop string that ended it; empty where the model ended it itself, or nothing did.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length", "filtered"]
    stopped: str = ""


def whole_characters(tokenizer: Any, one: Generation) -> Generation:
    """The same up to its last whole character, where ``max_new_tokens`` ended it inside one.

    The rest of that character would be read, and trained on, as U+FFFD: tokens that were never sampled. Where a model wrote
    U+FFFD itself, it stays.
    """
    if one.finish != "length" or not one.text.endswith(_BROKEN):
        return one
    own, kept = tuple(tokens_of(tokenizer, _BROKEN)), one.tokens
    while kept and kept[-len(own) :] != own and decode(tokenizer, kept).endswith(_BROKEN):
        kept = kept[:-1]
    return replace(one, text=decode(tokenizer, kept), tokens=kept)


_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Continuation:
    """Token ids of a prompt and of a given continuation, whose log-probabilities are asked for."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


class Generates(Protocol):
    """A model that writes text."""

    name: str

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> list[list[Generation]]:
        """``sampling.samples`` continuations for each prompt, in the order of the prompts.

        ``progress`` is called with what is done, and what there is to do in all.

        Raises:
            UserError: a prompt and its continuation do not fit the model's context.
        """
        ...


@dataclass(frozen=True)
class Wanted:
    """Answers that are asked for: the number of a prompt, the prompt, and which of its samples."""

    number: int
    prompt: Prompt
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """One of them. ``facts`` is what is known of the request that it came with; of several answers to one the first has it."""

    number: int
    sample: int
    said: Generation
    facts: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class AnswersSingly(Protocol):
    """A model whose answers depend on nothing else that is asked, and come one by one: those missing can be asked for alone."""

    def answers(self, wanted: Iterable[Wanted], sampling: Sampling) -> Iterator[list[Answer]]:
        """The answers as they come, those together that came together. Prompts are taken from ``wanted`` as there is room.

        Raises:
            UserError: a prompt is refused, or the model is gone; what was under way has come by then, as far as it comes.
        """
        ...

    def account(self, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a result records of all requests, of their ``facts``."""
        ...


@runtime_checkable
class Placed(Protocol):
    """A model on this machine; ``place`` says on what it runs and how its weights are held."""

    place: str


def place(engine: Any) -> str:
    """What an engine says of where it runs; its name where it says nothing."""
    return engine.place if isinstance(engine, Placed) else engine.name


def account(engine: Generates | Scores, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What a result records of the requests to a server; None of an engine that asks none."""
    return engine.account(facts) if isinstance(engine, AnswersSingly) else None


class Scores(Protocol):
    """A model that says how likely it finds a given text; ``tokenizer`` is its own (:mod:`medllm.model.tokenizer`)."""

    name: str
    tokenizer: Any

    def logprobs(self, continuations: Sequence[Continuation], batch_size: int = 32) -> list[np.ndarray]:
        """Per-token log-probabilities (fp32, natural log) of each completion given its prompt.

        Raises:
            UserError: an empty prompt, or one that does not fit the model's context.
        """
        ...


@dataclass(frozen=True)
class Likelihood:
    """Log-probabilities of one continuation, by its number. ``facts`` is what is known of the request that they came with."""

    number: int
    logprobs: np.ndarray
    facts: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class ScoresSingly(Protocol):
    """A model whose log-probabilities depend on nothing else that is asked, and come one by one."""

    def scored(self, continuations: Sequence[Continuation]) -> Iterator[list[Likelihood]]:
        """Those of each continuation, as they come; those together that came together.

        Raises:
            UserError: as for :meth:`Scores.logprobs`, or the model is gone; what was under way has come by then.
        """
        ...
