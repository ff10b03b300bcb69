"""What ends a continuation: token ids and strings, from all places that name them.

A base model, its tokenizer, its generation_config and its config rarely agree on the token that ends a text, and a model may
have learned any of theirs: the end is the union. What *training* puts at the end of a text is one token, the tokenizer's own
(:func:`medllm.model.tokenizer.end_token`), which is always among them, so a model that learned its data always stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medllm.errors import UserError
from medllm.model.tokenizer import end_token
from medllm.text_files import read_json_object

GENERATION = "generation_config.json"
_CHANGES_TOKENS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "suppress_tokens",
)
"""Of generation_config: what forbids or forces tokens. How tokens are drawn (temperature, penalties …) is the run's to say."""


@dataclass(frozen=True)
class Endings:
    """What ends a continuation.

    Attributes:
        ids: Token ids, the tokenizer's own end token first; none of them is part of the continuation.
        strings: Strings to be looked for in its text, and cut off.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...] = ()

    def with_stops(self, tokenizer: Any, stops: Sequence[str]) -> Endings:
        """These and ``stops``. One that is a special token ends by its id: in the text, special tokens are left out.

        Raises:
            UserError: a stop string holds a special token beside other text, so neither text nor id could show it.
        """
        special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        strings = tuple(stop for stop in stops if stop not in special)
        for stop in strings:
            for token in special:
                if token in stop:
                    raise UserError(
                        f"--sampling.stop {stop!r} holds the special token {token}, which is no part of a text, "
                        f"beside other characters; give {token} alone"
                    )
        ids = dict.fromkeys([*self.ids, *(special[stop] for stop in stops if stop in special)])
        return replace(self, ids=tuple(ids), strings=tuple(dict.fromkeys([*self.strings, *strings])))


def read_endings(tokenizer: Any, model: str | Path) -> Endings:
    """The end tokens and stop strings that a model is opened with.

    Args:
        tokenizer: Its tokenizer.
        model: Its folder; ``config.json`` and ``generation_config.json`` are read.

    Raises:
        UserError: an end token is no token id, a stop string no text, or generation_config asks for what no engine does.
    """
    ids, strings = [end_token(tokenizer)], Endings(())
    for name in (GENERATION, "config.json"):
        file = Path(model) / name
        settings = read_json_object(file, "a Hugging Face model folder has one") if file.exists() else {}
        ids += _several(settings.get("eos_token_id"), int, f"{file}: eos_token_id", "a token id, or a list of them")
        if name == GENERATION:
            for asked in _CHANGES_TOKENS:
                if settings.get(asked):
                    raise UserError(f"{file}: {asked} forbids or forces tokens, which no engine here does; take it out")
            stops = _several(settings.get("stop_strings"), str, f"{file}: stop_strings", "a string, or a list of them")
            strings = strings.with_stops(tokenizer, stops)
    return Endings(tuple(dict.fromkeys([*ids, *strings.ids])), strings.strings)


def _several(value: Any, kind: type, where: str, expected: str) -> list[Any]:
    """A setting that is one, several or none of a kind."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    for one in values:
        if type(one) is not kind or one in ("", -1):
            raise UserError(f"{where} is {value!r}; expected {expected}")
    return values
