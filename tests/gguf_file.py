"""A model folder as a GGUF file, for llama.cpp.

It holds what ``convert_hf_to_gguf.py`` would write, which knows tokenizers by what they make of one text, and not a small one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from medllm.model.directory import ModelDirectory

# The first split of Qwen2's tokenizer, which llama.cpp has under its name.
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_gguf(file: Path, folder: Path, **contract: Any) -> Path:
    """Write a Qwen2 folder in fp32.

    Args:
        file: The file to write.
        folder: The model, whose byte-level tokenizer splits as Qwen2's does.
        contract: What the file says otherwise than the folder: ``end`` (a token id), ``bos`` (a token id before each text),
            ``template``.
    """
    model, tokenizer = ModelDirectory(folder), json.loads((folder / "tokenizer.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(file, "qwen2")
    _write_sizes(writer, model)
    _write_tokens(writer, tokenizer, model.architecture.vocab_size)
    config = model.config
    writer.add_eos_token_id(contract.get("end", config["eos_token_id"]))
    writer.add_pad_token_id(config["eos_token_id"])
    bos = contract.get("bos")
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_add_bos_token(bos is not None)
    writer.add_chat_template(contract.get("template", (folder / "chat_template.jinja").read_text("utf-8")))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, model.architecture.num_layers)
    for name in model.names():
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(called, np.asarray(model.read(name), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def split_as_qwen2(folder: Path) -> None:
    """Give a folder's tokenizer the first split of Qwen2's, in place of its own."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    *_, split, to_bytes = tokenizer["pre_tokenizer"]["pretokenizers"]
    tokenizer["pre_tokenizer"]["pretokenizers"] = [{**split, "pattern": {"Regex": QWEN2_SPLIT}}, to_bytes]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def _write_sizes(writer: gguf.GGUFWriter, model: ModelDirectory) -> None:
    sizes = model.architecture
    writer.add_context_length(sizes.max_positions)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_heads)
    writer.add_head_count_kv(sizes.num_kv_heads)
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    writer.add_rope_freq_base(sizes.rotary.theta)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _write_tokens(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], rows: int) -> None:
    """The vocabulary, filled up to the rows of the embedding, as the converter does."""
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    by_id = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    by_id |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    kind = gguf.TokenType
    kinds = [kind.CONTROL if n in special else kind.NORMAL if n in by_id else kind.UNUSED for n in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([by_id.get(n, f"[PAD{n}]") for n in range(rows)])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
