"""A small Qwen2.5 with random weights: lets a pipeline be tried on real text before anything large is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from medllm.architecture import Architecture
from medllm.errors import UserError
from medllm.model.directory import write_model
from medllm.model.tokenizer import check_vocabulary, load_tokenizer
from medllm.published import qwen2

_HEAD = 16  # head dimension; two query heads share a key/value head


def write_random_model(
    out: str | Path, *, tokenizer: str | Path, vocab_size: int, hidden_size: int, layers: int, seed: int = 0
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
    architecture = qwen2(layers, hidden_size, 3 * hidden_size, heads, heads // 2, vocab_size, tie_embeddings=True)
    tokens = {"eos_token_id": loaded.eos_token_id, "pad_token_id": loaded.pad_token_id}
    config = architecture.to_hf() | {"torch_dtype": "float32"} | tokens
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    write_model(out, config, random_tensors(architecture, normal), companions_from=tokenizer)


def random_tensors(architecture: Architecture, draw: Callable[..., np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model, one at a time: matrices and biases from ``draw(*shape)``, norms one."""
    dtype = None
    for name, tensor in architecture.tensors.items():
        value = np.ones(tensor.shape, dtype) if tensor.kind == "norm" else draw(*tensor.shape)
        dtype = value.dtype  # the first is the embedding, and drawn
        yield name, value
