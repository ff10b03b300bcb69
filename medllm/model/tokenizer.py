"""Text → tokens: the one way that text takes, of documents, prompts, responses and options, in training and in use.

A text begins with what its tokenizer begins a text with (Llama's and Gemma's put a BOS token there, Qwen's nothing), once: what
follows in the same text, a response or an option, is tokenized together with what it follows. A conversation's chat template
writes the beginning itself. Nothing is put at the end but the end-of-text token, where a document or a response is over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class Message:
    """One turn of a chat prompt. ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str

    def to_json(self) -> dict[str, str]:
        """As chat templates and servers take it."""
        return {"role": self.role, "content": self.content}


Prompt = str | tuple[Message, ...]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer saved in a Hugging Face directory.

    Raises:
        UserError: no tokenizer there, or one without an end-of-text token, or one that ends every text by itself.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such tokenizer folder; give a Hugging Face directory (--model.tokenizer)")
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise UserError(f"{folder}: no tokenizer here (expected tokenizer.json, or vocab.json with merges.txt)")
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: the tokenizer cannot be read: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not _continues(tokenizer):
        raise UserError(
            f"{folder}: the tokenizer puts a token behind every text, so no prompt could be continued; "
            "set add_eos_token to false in tokenizer_config.json"
        )
    return tokenizer


def _continues(tokenizer: Any) -> bool:
    """Whether the special tokens the tokenizer adds to a text all stand before it."""
    plain, begun = _ids(tokenizer, ["a"], begins=False)[0], _ids(tokenizer, ["a"])[0]
    return begun[len(begun) - len(plain) :] == plain


def _tokenizer_class(folder: Path) -> Any:
    """What ``AutoTokenizer`` would choose, which takes 200 MB and two seconds to import because it imports torch."""
    named = _setting(folder / "tokenizer_config.json", "tokenizer_class")
    unnamed = named in (None, "TokenizersBackend", "PreTrainedTokenizerFast")
    qwen2 = _setting(folder / "config.json", "model_type") == "qwen2"
    if named in ("Qwen2Tokenizer", "Qwen2TokenizerFast") or (unnamed and qwen2):
        from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

        return Qwen2Tokenizer
    if unnamed and not (folder / "config.json").exists() and (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _setting(file: Path, name: str) -> Any:
    """One setting of a JSON file; None where it, or the file, is absent or unreadable."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        return None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text``, from its beginning."""
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, from its beginning."""
    return _ids(tokenizer, texts)


def encode_continuation(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, and of what comes after as many of prompt and completion together.

    Tokens may merge across the boundary until nothing is left after the prompt; the completion is then tokenized by itself.
    """
    before, whole = _ids(tokenizer, [prompt, prompt + completion])
    return before, whole[len(before) :] or _ids(tokenizer, [completion], begins=False)[0]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: text as it is, a conversation through the chat template with the assistant's turn opened.

    Raises:
        UserError: a conversation for a tokenizer without chat template, or an empty prompt.
    """
    if isinstance(prompt, str):
        ids = encode(tokenizer, prompt)
    else:
        if not tokenizer.chat_template:
            raise UserError("this tokenizer has no chat template: use --format completion, or an instruct model")
        turns = [message.to_json() for message in prompt]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        (ids,) = _ids(tokenizer, [text], begins=False)
    if not ids:
        raise UserError("a prompt is empty: generation needs at least one token")
    return ids


def _ids(tokenizer: Any, texts: Sequence[str], *, begins: bool = True) -> list[list[int]]:
    """Token ids of each text; the tokenizer's special tokens before it where it ``begins`` here."""
    return tokenizer(list(texts), add_special_tokens=begins, verbose=False)["input_ids"]


def end_token(tokenizer: Any) -> int:
    """Id of the token that ends a text."""
    return tokenizer.eos_token_id


def check_vocabulary(tokenizer: Any, vocab_size: int, where: str | Path) -> None:
    """Refuse a tokenizer that can produce ids the model's embedding does not have.

    Raises:
        UserError: the largest token id does not fit ``vocab_size``.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"{where}: the tokenizer has ids up to {largest}, the model's vocabulary ends at {vocab_size - 1}; "
            "use the tokenizer the model was trained with (--model.tokenizer)"
        )
