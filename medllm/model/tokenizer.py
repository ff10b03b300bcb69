"""Text → tokens: the one way that text takes, of documents, prompts, responses and options, in training and in use.

A text begins with what its tokenizer begins a text with (Llama's and Gemma's put a BOS token there, Qwen's nothing), once: what
follows in the same text, a response or an option, is tokenized together with what it follows. A conversation's chat template
writes the beginning itself. Nothing is put at the end but the end-of-text token, where a document or a response is over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllm.errors import UserError
from medllm.model.work_limit import limited_work
from medllm.text_files import first_line, read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FILE = "tokenizer.json"
_TOKENIZER_FILES = (_FILE, "vocab.json")
_SETTINGS = "tokenizer_config.json"
_SPACES = ("▁", "Ġ")
"""A space at the beginning of a token, as sentencepiece and byte-level vocabularies write it."""


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

    ``tokenizer.json`` is opened as it stands. (The classes of transformers 5 for Qwen2 and Llama rebuild what it says of
    normalizing and splitting text from their own defaults; its generic class does not, and imports no torch.)

    Raises:
        UserError: no tokenizer there, one without an end-of-text token, one that ends every text by itself, or settings
            that contradict the tokenizer.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such tokenizer folder; give a Hugging Face directory (--model.tokenizer)")
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{folder}: no tokenizer here (expected {_FILE}, or vocab.json with merges.txt; "
            "AutoTokenizer's save_pretrained makes them of a tokenizer.model)"
        )
    settings = read_json_object(folder / _SETTINGS, "") if (folder / _SETTINGS).exists() else {}
    if "auto_map" in settings:
        raise UserError(f"{folder}/{_SETTINGS}: asks for code of its own (auto_map); code in model folders is never run")
    try:
        tokenizer = _opened(folder)
    except Exception as error:  # tokenizers raises the bare class, transformers what Python does with a value it did not expect
        raise UserError(f"{folder}: the tokenizer cannot be read: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-text token; set eos_token in {_SETTINGS}")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(f"{folder}: model_max_length in {_SETTINGS} is no number")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check(tokenizer, folder, settings)
    return tokenizer


def _opened(folder: Path) -> Any:
    if (folder / _FILE).exists():
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        if tokenizer.eos_token_id is not None:
            return tokenizer
    from transformers import AutoTokenizer  # imports torch: two seconds and 200 MB

    by_class = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if not (folder / _FILE).exists():
        return by_class
    # Its class may name special tokens that no file names.
    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **by_class.special_tokens_map)


def _check(tokenizer: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that training and generation could not use alike, and settings that it does not follow."""
    plain, begun = _ids(tokenizer, ["a"], begins=False)[0], _ids(tokenizer, ["a"])[0]
    if begun[len(begun) - len(plain) :] != plain:
        where = f"post_processor in {_FILE}" if (folder / _FILE).exists() else f"add_eos_token in {_SETTINGS}"
        raise UserError(
            f"{folder}: the tokenizer puts a token behind every text, so no prompt could be continued, and every response "
            f"would end twice; take it out of {where}"
        )
    if _ids(tokenizer, [tokenizer.eos_token], begins=False) != [[tokenizer.eos_token_id]]:
        raise UserError(
            f"{folder}: the tokenizer does not read its end-of-text token {tokenizer.eos_token} as one token "
            f"(split_special_tokens in {_SETTINGS}?), so no response could end with it"
        )
    front = begun[: len(begun) - len(plain)]
    first = tokenizer.convert_ids_to_tokens(plain)[0] if plain else ""
    does = {"add_bos_token": tokenizer.bos_token_id in front, "add_prefix_space": first.startswith(_SPACES)}
    if tokenizer.bos_token_id is None:
        del does["add_bos_token"]
    for name, done in does.items():
        # transformers 4 went by the setting, transformers 5 goes by the file alone.
        if isinstance(settings.get(name), bool) and settings[name] != done:
            raise UserError(
                f"{folder}: {name} is {str(settings[name]).lower()} in {_SETTINGS}, which {_FILE} does not follow; "
                "nor do all versions of transformers agree which of them holds: make the two say the same"
            )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text``, from its beginning."""
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, from its beginning."""
    return _ids(tokenizer, texts)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` inside another, with nothing that begins it."""
    return _ids(tokenizer, [text], begins=False)[0]


def encode_continuation(
    tokenizer: Any, prompt: str, completion: str, others: Sequence[str] = ()
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, and of a completion after it: together those of the text that the two make.

    A prompt's last spaces go to its completion, since words are tokens with the space before them. Where tokens merge or
    characters compose across the boundary, the prompt ends before the first that does: in this completion or in one of the
    ``others`` that it is compared with, so that all of them follow the same tokens.
    """
    asked = prompt.rstrip()
    before, whole, *rest = _ids(tokenizer, [asked, *(prompt + one for one in (completion, *others))])
    shared = min(common_prefix(before, ids) for ids in (whole, *rest))
    return before[:shared], whole[shared:]


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """Number of leading tokens the two have in common."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(others)))


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: text as it is, a conversation through the chat template with the assistant's turn opened.

    Raises:
        UserError: a conversation for a tokenizer without chat template, or that its template refuses; or an empty prompt.
    """
    if isinstance(prompt, str):
        ids = encode(tokenizer, prompt)
    else:
        (ids,) = _ids(tokenizer, [written_out(tokenizer, prompt)], begins=False)
    if not ids:
        raise UserError("a prompt is empty: generation needs at least one token")
    return ids


def written_out(tokenizer: Any, turns: tuple[Message, ...]) -> str:
    """A conversation as its model's template writes it, with the assistant's turn opened, and no thinking before the answer.

    Where the template takes no system turn, or leaves it out, its text goes before that of the user's turn after it.
    """
    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template: use --format completion, or an instruct model")
    asked = turns[1:] if turns and turns[0].role == "system" else ()
    try:
        text = _by_template(tokenizer, turns)
        if not asked or turns[0].content.strip() in text:
            return text
    except UserError:
        if not asked:
            raise
    both = f"{turns[0].content}\n\n{asked[0].content}"
    return _by_template(tokenizer, (replace(asked[0], content=both), *asked[1:]))


def _by_template(tokenizer: Any, turns: tuple[Message, ...]) -> str:
    try:
        if "bos_token" in tokenizer.get_chat_template() and tokenizer.bos_token is None:
            raise ValueError(f"it writes bos_token, and {_SETTINGS} names none")
        messages = [message.to_json() for message in turns]
        with limited_work():
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    except Exception as error:  # a template is a program, and fails as programs do
        raise UserError(
            f"the tokenizer's chat template refuses the conversation: {first_line(error)}; "
            "use --format completion, or mend the template (chat_template.jinja, or chat_template in tokenizer_config.json)"
        ) from error


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text that ``tokens`` continue a text with; special tokens are left out.

    A sentencepiece decoder takes away the space that its tokenizer puts before a *text*; a continuation's own stays, so that
    prompt and continuation together are the text that was written.
    """
    core = tokenizer.backend_tokenizer
    before = core.encode("a", add_special_tokens=False).ids if core.decoder else []
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode([*before, *tokens], **settings)[len(tokenizer.decode(before, **settings)) :]


def control_tokens(tokenizer: Any, texts: Iterable[str]) -> dict[str, int]:
    """How often each special token is written out in ``texts``: a tokenizer reads it there as the token, not as its letters.

    So does TRL's preparation, and a conversation that is written out needs it; an end token inside a text that did not mean one
    ends it. What is found is counted, for whoever gave the texts to decide.
    """
    special = sorted(
        (token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len, reverse=True
    )
    if not special:
        return {}
    written = re.compile("|".join(map(re.escape, special)))
    return dict(Counter(found for text in texts for found in written.findall(text)))


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
