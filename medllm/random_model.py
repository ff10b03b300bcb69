"""A small Qwen2.5 with random weights: lets a pipeline be tried on real text before anything large is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medllm.errors import UserError
from medllm.model_directory import write_model
from medllm.tokenizer import check_vocabulary, load_tokenizer

_HEAD = 16  # head dimension; two query heads share a key/value head


def write_random_model(
    out: str | Path, *, tokenizer: str | Path, vocab_size: int = 152064, hidden_size: int = 64, layers: int = 2, seed: int = 0
) -> None:
    """Write a Qwen2 model directory with N(0, 0.02²) weights and the tokenizer of another folder.

    Raises:
        UserError: the width is no multiple of 32, the tokenizer does not fit the vocabulary, or ``out`` exists.
    """
    if hidden_size % (2 * _HEAD) or hidden_size <= 0:
        raise UserError(f"--hidden_size {hidden_size}: a multiple of {2 * _HEAD} is needed")
    if Path(out).exists():
        raise UserError(f"{out}: already exists; give another --out, or remove it")
    loaded = load_tokenizer(tokenizer)
    check_vocabulary(loaded, vocab_size, tokenizer)
    heads = hidden_size // _HEAD
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "eos_token_id": loaded.eos_token_id,
        "pad_token_id": loaded.pad_token_id,
    }
    write_model(out, config, _tensors(vocab_size, hidden_size, layers, seed), companions_from=tokenizer)


def _tensors(vocab_size: int, width: int, layers: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    ones = np.ones(width, np.float32)
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 2, width),
        "self_attn.v_proj": (width // 2, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (3 * width, width),
        "mlp.up_proj": (3 * width, width),
        "mlp.down_proj": (width, 3 * width),
    }
    yield "model.embed_tokens.weight", normal(vocab_size, width)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, shape in shapes.items():
            yield f"{prefix}.{name}.weight", normal(*shape)
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                yield f"{prefix}.{name}.bias", normal(shape[0])
        yield f"{prefix}.input_layernorm.weight", ones
        yield f"{prefix}.post_attention_layernorm.weight", ones
    yield "model.norm.weight", ones
