"""Text → tokens: the one place both engines and the study go through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllm.engine import Prompt
from medllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer saved in a Hugging Face directory.

    Raises:
        UserError: no tokenizer there, or one without an end-of-text token.
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
    return tokenizer


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
    """Token ids of ``text``; no special token is added."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


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
        turns = [{"role": message.role, "content": message.content} for message in prompt]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = encode(tokenizer, text)
    if not ids:
        raise UserError("a prompt is empty: generation needs at least one token")
    return ids


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
