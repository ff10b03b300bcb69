"""The ways in which a served model is asked: as it was trained, and as those ask it who do not know how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medllm.exam.answers import extract_answer
from medllm.exam.evaluation import prompt_of
from medllm.exam.problem import LETTERS, Problem
from medllm.model.tokenizer import Message, Prompt
from medllm.stage_config import CheckServingConfig

CHAT = "chat"
"""The trained prompt as a user's turn."""


@dataclass(frozen=True)
class Way:
    """A way of asking.

    Attributes:
        name: What it is called.
        ask: The prompt of a problem.
        read: The answer that a text gives to a problem.
    """

    name: str
    ask: Callable[[Problem], Prompt]
    read: Callable[[str, Problem], tuple[str, ...]]


def ways(config: CheckServingConfig, shots: Sequence[Problem], *, chats: bool) -> tuple[Way, ...]:
    """The trained prompt first; then foreign ones, through the chat where the model takes conversations.

    Args:
        config: What the trained prompt is.
        shots: The examples in it.
        chats: The model has a chat template. Without one, the foreign prompts are texts to continue, and ``chat`` is left out.
    """

    def trained(problem: Problem) -> Prompt:
        return prompt_of(problem, shots, config)

    def explained(text: str, problem: Problem) -> tuple[str, ...]:
        return extract_answer(text, problem, explanation=config.explanation).answer

    def bare(text: str, problem: Problem) -> tuple[str, ...]:
        return extract_answer(text, problem, explanation=False).answer

    def through(ask: Callable[[Problem], str]) -> Callable[[Problem], Prompt]:
        return (lambda problem: (Message("user", ask(problem)),)) if chats else ask

    def in_a_turn(problem: Problem) -> Prompt:
        asked = trained(problem)
        return (Message("user", asked),) if isinstance(asked, str) else asked

    foreign = (
        *((Way(CHAT, in_a_turn, explained),) if chats else ()),
        Way("other wording", through(_other_wording), bare),
        Way("【回答】", through(_in_brackets), bare),
        Way("JSON", through(_as_json), _read_json),
    )
    return (Way("trained prompt", trained, explained), *foreign)


def _options(problem: Problem) -> str:
    return "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False))


def _other_wording(problem: Problem) -> str:
    wanted = f"正しいものを{problem.answer_count}つ、記号で示すと"
    return f"次の問いに答えなさい。\n\n{problem.text}\n{_options(problem)}\n\n{wanted}\n"


def _in_brackets(problem: Problem) -> str:
    return f"【問題】\n{problem.text}\n【選択肢】\n{_options(problem)}\n【回答】\n"


def _as_json(problem: Problem) -> str:
    form = '{"answer": "a"}'
    return f"{problem.text}\n{_options(problem)}\n\n答えを次の形のJSONだけで書くこと: {form}\n"


def _read_json(text: str, problem: Problem) -> tuple[str, ...]:
    """JSON was asked for, and nothing else counts."""
    reading = extract_answer(text, problem, explanation=False)
    return reading.answer if reading.rule == "json" else ()
