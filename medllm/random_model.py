"""A small Qwen2.5 with random weights: lets a pipeline be tried on real text before anything large is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
    config = qwen2_config(
        width=hidden_size,
        mlp=3 * hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=heads // 2,
        vocabulary=vocab_size,
        tied=True,
    ) | {"eos_token_id": loaded.eos_token_id, "pad_token_id": loaded.pad_token_id}
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    write_model(out, config, random_tensors(config, normal), companions_from=tokenizer)


def qwen2_config(
    *,
    width: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Contents of a ``config.json``: a Qwen2.5 of these sizes, everything else as published."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "torch_dtype": dtype,
    }


def random_tensors(config: Mapping[str, Any], draw: Callable[..., np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a Qwen2 with this ``config.json``, one at a time: matrices and biases from ``draw(*shape)``, norms one."""
    vocabulary, width, mlp = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    kv_width = width * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    embedding = draw(vocabulary, width)
    ones = np.ones(width, embedding.dtype)
    yield "model.embed_tokens.weight", embedding
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, shape in shapes.items():
            yield f"{prefix}.{name}.weight", draw(*shape)
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                yield f"{prefix}.{name}.bias", draw(shape[0])
        yield f"{prefix}.input_layernorm.weight", ones
        yield f"{prefix}.post_attention_layernorm.weight", ones
    yield "model.norm.weight", ones
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", draw(vocabulary, width)
