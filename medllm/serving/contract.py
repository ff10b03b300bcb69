"""What a published directory promises of where a text begins and ends, held against what its training taught.

A promise that the training contradicts is kept by no server: a model that never saw an end token does not write it, an adapter
of linear layers cannot teach the embedding a new one, and a chat template that was never shown is one more question to answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medllm.architecture import EMBEDDING, HEAD
from medllm.errors import UserError
from medllm.model.directory import ModelDirectory
from medllm.model.endings import read_endings
from medllm.serving.taught import Taught, beginning

ChatTemplate = Literal["keep", "plain", "none"]

# Rows that no text can reach lie this close together; what lies no farther from their mean was not learned either.
_UNLEARNED = 1.1
_THINKS = "enable_thinking"

# A conversation as the text that a base model continues: the words of its turns, a blank line between two.
_PLAIN = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"


@dataclass(frozen=True)
class Contract:
    """What is promised.

    Attributes:
        ends: Ids of the tokens that end a text.
        begins: Ids of the tokens before a text.
        pad: Id of the padding.
        stop: Strings that end a text.
        chat_template: The chat template that is published; none where a conversation is refused.
    """

    ends: tuple[int, ...]
    begins: tuple[int, ...]
    pad: int
    stop: tuple[str, ...]
    chat_template: str | None

    def generation_config(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """``generation_config.json``, with how text is sampled: greedy where ``temperature`` is 0."""
        drawn = {name: sampling[name] for name in ("temperature", "top_p", "top_k")} if sampling["temperature"] else {}
        return {
            "eos_token_id": list(self.ends) if len(self.ends) > 1 else self.ends[0],
            "pad_token_id": self.pad,
            **({"bos_token_id": self.begins[0]} if self.begins else {}),
            **({"stop_strings": list(self.stop)} if self.stop else {}),
            "max_new_tokens": sampling["max_new_tokens"],
            "do_sample": bool(sampling["temperature"]),
            **drawn,
        }


def plain_replies(ends: Sequence[str]) -> dict[str, Any]:
    """transformers' ``response_template`` for a plain chat template: what is written up to an end token is the reply.

    Without one, its server reads a Qwen model's reply as ChatML, and returns the prompt with it where ChatML was not written.
    """
    close = "|".join(map(re.escape, ends))
    return {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": r"\Z",
        "fields": {"content": {"close_pattern": close, "content": "text"}},
    }


def contract_of(
    tokenizer: Any, folder: Path, taught: Sequence[Taught], chat_template: ChatTemplate, ends: Sequence[str] = ()
) -> Contract:
    """What would be published of a model.

    Args:
        tokenizer: Its tokenizer.
        folder: The model's folder.
        taught: What its training runs taught.
        chat_template: ``keep`` the tokenizer's, with thinking off where it knows of it; a ``plain`` one, which makes a
            conversation the text that is continued; or ``none``.
        ends: The tokens that end a text; those of the model's folder when empty.

    Raises:
        UserError: an end token that the tokenizer does not have, or the folder's cannot be read.
    """
    vocabulary = tokenizer.get_vocab()
    for token in ends:
        if token not in vocabulary:
            raise UserError(f"--end_tokens {token}: the tokenizer of {folder} has no such token")
    begins = beginning(tokenizer)
    bos = "".join(tokenizer.convert_ids_to_tokens(list(begins)))
    plain = f"{{{{ {json.dumps(bos)} }}}}{_PLAIN}" if bos else _PLAIN  # a template writes the beginning itself
    kept = tokenizer.chat_template or None
    if kept and _THINKS in kept:
        kept = f"{{%- if {_THINKS} is not defined %}}{{%- set {_THINKS} = false %}}{{%- endif %}}{kept}"
    return Contract(
        ends=tuple(vocabulary[token] for token in ends) or read_endings(tokenizer, folder).ids,
        begins=begins,
        pad=tokenizer.pad_token_id,
        stop=tuple(dict.fromkeys(stop for one in taught for stop in one.stop)),
        chat_template={"keep": kept, "plain": plain, "none": None}[chat_template],
    )


def check_contract(
    contract: Contract,
    tokenizer: Any,
    weights: ModelDirectory,
    taught: Mapping[str, Taught],
    *,
    kept_template: bool,
    sat_chats: bool,
) -> None:
    """Refuse a contract that the training contradicts.

    Args:
        contract: What would be published.
        tokenizer: The model's tokenizer.
        weights: The base model, whose embedding and head no adapter moves.
        taught: What the training runs taught, by the folder of each.
        kept_template: The tokenizer's own chat template is to be published.
        sat_chats: An exam was sat through the chat template, and no text ran on.

    Raises:
        UserError: a padding that was trained as the end, an end token never trained on or that cannot be learned, another
            beginning, or a template never shown.
    """
    for run, one in taught.items():
        if one.pad_targets and one.pad_id == one.end_id:
            raise UserError(
                f"{run}: padding and end of a text are one token, {one.end!r}, and {one.pad_targets} positions of padding were "
                "trained as targets: the model learned to write it again and again; train with the padding masked"
            )
        if one.begins != contract.begins:
            raise UserError(
                f"{run}: its texts began with the tokens {list(one.begins)}, the tokenizer to be published begins a text with "
                f"{list(contract.begins)} (BOS); publish the tokenizer of the training (--tokenizer)"
            )
    trained = {one.end_id: one.end for one in taught.values() if one.ends}
    if not trained:
        raise UserError(f"{', '.join(taught)}: no end token was ever a target, so none was trained on; no text would end")
    used = max(tokenizer.get_vocab().values()) + 1
    names = tokenizer.convert_ids_to_tokens(list(contract.ends))
    for token, end in trained.items():
        if token not in contract.ends:
            raise UserError(
                f"training ended its texts with {end!r}, but published would be {names}, which were never trained on; "
                f"give --end_tokens '{end}'"
            )
    for token, name in zip(contract.ends, names, strict=True):
        if token not in trained and not learned(weights, token, used):
            raise UserError(
                f"{name!r} is to end a text, but no run trained on it, and its row of {weights.path} is as one that no text "
                "reaches: the base never learned it, and an adapter does not move it; leave it out (--end_tokens)"
            )
    if kept_template and not sat_chats and not any(one.conversations for one in taught.values()):
        raise UserError(
            "the tokenizer's chat template was never shown in training; publish a plain one, which makes a conversation the "
            "text that is continued (--chat_template plain), or none (--chat_template none), or give in --runs a "
            "'medllm evaluate --format chat' of this model in which no text runs on"
        )


def learned(weights: ModelDirectory, token: int, used: int) -> bool:
    """Whether the model's head knows a token: its row differs from those that no text can reach.

    Rows from ``used`` on, behind the tokenizer's last id, were never a target; tokens that were never seen either lie among
    them (Land and Bartolo, arXiv 2405.05417). Without such rows, or of a head in 4 bits, nothing can be told, and the token is
    taken for learned.
    """
    name = HEAD if HEAD in weights else EMBEDDING
    rows = weights.shape(name)[0]
    if token >= used or used >= rows or weights.description(name) is not None:
        return token < used
    unreached = np.asarray(weights.read_slice(name, slice(used, rows)), np.float32)
    middle = unreached.mean(0)
    row = np.asarray(weights.read_slice(name, slice(token, token + 1)), np.float32)
    spread = np.linalg.norm(unreached - middle, axis=1).max()
    return bool(np.linalg.norm(row - middle) > _UNLEARNED * spread)
