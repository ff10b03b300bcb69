"""What a training run taught of where a text begins and ends: recorded in its ``result.json``, read where it is published.

It is counted in what was trained on, not concluded from settings: an end token that no position predicts was not trained,
whatever the tokenizer calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from medllm.corpus.packing import PackedRows
from medllm.errors import UserError
from medllm.exam.prompts import stop_strings
from medllm.model.tokenizer import end_token
from medllm.preferences.tokenization import TokenizedPreferences


@dataclass(frozen=True)
class Taught:
    """What a run taught of the ends of a text.

    Attributes:
        end: The token that ended its texts.
        end_id: Its id.
        ends: How often that token was a target.
        pad_id: Id of the padding.
        pad_targets: Positions of padding that were targets: each teaches to write padding behind a text.
        begins: Ids of the tokens before each text (BOS).
        conversations: Texts in which the tokenizer's chat template opened the assistant's turn.
        stop: Stop strings that ended the texts its data were sampled from.
    """

    end: str
    end_id: int
    ends: int
    pad_id: int
    pad_targets: int
    begins: tuple[int, ...]
    conversations: int
    stop: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Any, where: object) -> Taught:
        """As ``result.json`` holds it.

        Raises:
            UserError: it is missing, or is no such thing.
        """
        try:
            return cls(**{**value, "begins": tuple(value["begins"]), "stop": tuple(value["stop"])})
        except (TypeError, KeyError):
            raise UserError(
                f"{where}: has no 'taught', what the run taught of the ends of a text; it is of an earlier version: train again"
            ) from None


def taught_by_rows(tokenizer: Any, rows: PackedRows, texts: Iterable[str]) -> Taught:
    """What continued pretraining on ``rows``, made of ``texts``, teaches."""
    targets, end = rows.targets, end_token(tokenizer)
    return _taught(
        tokenizer,
        ends=int(((rows.tokens == end) & targets).sum()),
        pad_targets=int((targets & (rows.segment_ids == 0)).sum()),
        texts=texts,
    )


def taught_by_preferences(tokenizer: Any, preferences: TokenizedPreferences) -> Taught:
    """What preference training on them teaches. Their prompts are the paper's, sampled up to the next question."""
    end = end_token(tokenizer)
    responses = [response for group in preferences.groups for response in group.responses]
    return _taught(
        tokenizer,
        ends=sum(response[-1:] == (end,) for response in responses),
        pad_targets=0,  # groups hold no padding; an engine's batches mask theirs
        texts=(pair.prompt for pair in preferences.texts),
        stop=stop_strings("curation", explanation=True),
    )


def beginning(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens that a tokenizer puts before a text."""
    plain, begun = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return tuple(begun[: len(begun) - len(plain)])


def turn_of_assistant(tokenizer: Any) -> str:
    """What the chat template writes between a user's text and the answer; empty without a template that shows both."""
    if not tokenizer.chat_template:
        return ""
    said = "\N{WHITE SQUARE}"
    turns: list[Mapping[str, str]] = [{"role": "user", "content": said}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text.rpartition(said)[2]


def _taught(tokenizer: Any, *, ends: int, pad_targets: int, texts: Iterable[str], stop: tuple[str, ...] = ()) -> Taught:
    turn = turn_of_assistant(tokenizer).strip()
    return Taught(
        end=tokenizer.convert_ids_to_tokens(end_token(tokenizer)),
        end_id=end_token(tokenizer),
        ends=ends,
        pad_id=tokenizer.pad_token_id,
        pad_targets=pad_targets,
        begins=beginning(tokenizer),
        conversations=sum(turn in text for text in texts) if turn else 0,
        stop=stop,
    )
