"""Models that can be planned for by name, without a file: the sizes in their published ``config.json``."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from medllm.errors import UserError
from medllm.model_directory import ModelDirectory

# layers, width, MLP, heads, key/value heads, rows of the embedding, tied
_SIZES = {
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "qwen2.5-3b": (36, 2048, 11008, 16, 2, 151936, True),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 152064, False),
    "qwen2.5-14b": (48, 5120, 13824, 40, 8, 152064, False),
    "qwen2.5-32b": (64, 5120, 27648, 40, 8, 152064, False),
    "qwen2.5-72b": (80, 8192, 29568, 64, 8, 152064, False),
}
NAMES = tuple(_SIZES)
_NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def model_config(name: str) -> dict[str, Any]:
    """The contents of a ``config.json``: of a model known by name, or of a folder, of which nothing else is read.

    Raises:
        UserError: neither a known name nor a model folder, or its config lacks a size.
    """
    if name not in _SIZES:
        if not Path(name).is_dir():
            near = difflib.get_close_matches(name.lower(), _SIZES, 1)
            hint = f"did you mean {near[0]}?" if near else f"known by name are {', '.join(NAMES)}"
            raise UserError(f"--model {name}: neither a known name nor a folder; {hint}")
        config = ModelDirectory(name).config
        if missing := [size for size in _NEEDED if size not in config]:
            raise UserError(f"{Path(name) / 'config.json'}: has no {missing[0]}; a Qwen2 config has it")
        return config
    layers, width, mlp, heads, kv_heads, vocabulary, tied = _SIZES[name]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
    }
