"""A small tokenizer of each family, in the files its published models have: what splits, begins and ends a text, and the chat.

The vocabularies are made here; normalizers, splitting, post-processors, special tokens and templates are the published ones'
(templates without their tools).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_WORDS = ("the", "fever", "問題", "答え")
_SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

_CHATML = """{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- elif not enable_thinking is defined %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{%- if not (loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
_THINKING = "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
_LLAMA3 = """{{- bos_token }}{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
_LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{%- else %}{% set rest = messages %}{% set system = '' %}{% endif %}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if message['role'] == 'user' %}{{- bos_token + '[INST] ' }}
{{- (system if loop.first else '') + message['content'] + ' [/INST]' }}
{%- else %}{{- ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"""
_MISTRAL = """{{- bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{- message['content'] + eos_token }}{% endif %}{% endfor %}"""


@dataclass(frozen=True)
class Family:
    """What a family's published folders say of their tokens."""

    bytes: bool
    template: str
    special: tuple[str, ...]
    settings: dict[str, Any]
    begins: str = ""
    digits: str = ""
    eos: tuple[str, ...] = ()


_QWEN = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>"}
_QWEN |= {"pad_token": "<|endoftext|>", "split_special_tokens": False}
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

FAMILIES = {
    "qwen2": Family(True, _CHATML, _QWEN_SPECIAL, {**_QWEN, "add_bos_token": False}, eos=("<|im_end|>", "<|endoftext|>")),
    "qwen3": Family(
        True, _CHATML + _THINKING, (*_QWEN_SPECIAL, "<think>", "</think>"), _QWEN, eos=("<|im_end|>", "<|endoftext|>")
    ),
    "llama 2": Family(False, _LLAMA2, (), {**_LLAMA, "add_bos_token": True, "add_eos_token": False}, "<s>", eos=("</s>",)),
    "llama 3": Family(
        True,
        _LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "<|begin_of_text|>",
        "{1,3}",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "mistral": Family(False, _MISTRAL, (), {**_LLAMA, "add_bos_token": True, "add_eos_token": False}, "<s>", eos=("</s>",)),
}


def write_family(folder: Path, name: str) -> Path:
    """The tokenizer of a family below ``folder``, with config.json and generation_config.json; its directory."""
    family = FAMILIES[name]
    out = folder / name.replace(" ", "")
    out.mkdir()
    core = _byte_level(family.digits) if family.bytes else _sentencepiece()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    if family.begins:
        special = [(family.begins, core.token_to_id(family.begins))]
        core.post_processor = processors.TemplateProcessing(single=f"{family.begins} $A", special_tokens=special)
    core.save(str(out / "tokenizer.json"))
    eos = [core.token_to_id(token) for token in family.eos]
    model = {"model_type": name.split()[0], "eos_token_id": eos[0]}
    generation = {"eos_token_id": eos if len(eos) > 1 else eos[0]}
    files = {"config": model, "generation_config": generation, "tokenizer_config": family.settings}
    for file, content in files.items():
        (out / f"{file}.json").write_text(json.dumps(content))
    (out / "chat_template.jinja").write_text(family.template)
    return out


def _merged(letters: list[str]) -> list[tuple[str, str]]:
    return [("".join(letters[:index]), letters[index]) for index in range(1, len(letters))]


def _byte_level(digits: str) -> Tokenizer:
    """As Qwen2's and Llama 3's tokenizer.json: bytes, words split by a pattern; Qwen composes characters first."""
    splitting = pre_tokenizers.Split(Regex(_SPLIT % digits), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = ["".join(piece for piece, _ in level.pre_tokenize_str(word)) for word in (*_WORDS, " the", "é", "12", "123")]
    merges = list(dict.fromkeys(merge for word in spelled for merge in _merged(list(word))))
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(vocab)}, merges, ignore_merges=bool(digits)))
    core.normalizer = None if digits else normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence([splitting, level])
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece() -> Tokenizer:
    """As Llama 2's tokenizer.json, and Mistral 7B's: pieces with ▁ for a space, characters not in it as bytes."""
    characters = ["▁", *"abcdefghijklmnopqrstuvwxyz:.[]/<>INSTYS問題答え"]
    merges = list(dict.fromkeys(merge for word in (*_WORDS, "▁the", "▁fever") for merge in _merged(list(word))))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *(a + b for a, b in merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return core
