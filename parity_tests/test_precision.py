"""Rounding: in fp32 and in bf16, dense and NF4, the JAX engine is no further from the float64 truth than the reference.

The truth is exact arithmetic on the very weights both hold: rounded to bf16, or the ones the 4-bit codes stand for. The
reference is torch_ref's model, adapter in fp32, under the Trainer's autocast where the model is bf16. Compared is the RMS error
over all elements; single numbers (the loss itself) scatter too much for a ratio, so the loss is compared token by token. Widths
stay below 256: from there on MKL adds up a product in two halves and Eigen, under XLA on a CPU, does not, which says something
about the two matrix libraries and nothing about the models.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel

from medllm.config import ModelConfig
from parity_tests import jax_results, torch_results
from parity_tests.jax_results import Results, open_trainable
from parity_tests.oracle import float64_copy
from parity_tests.packed_rows import rows, target_mask
from parity_tests.tolerances import BFLOAT16_EXCESS, FLOAT32_EXCESS
from torch_ref.model import open_model

SEEDS = range(5)
DOCUMENTS = ((32,), (10, 8, 11), (16,))
EXCESS = {"float32": FLOAT32_EXCESS, "bfloat16": BFLOAT16_EXCESS}
CASES = [
    *(("qwen2", dtype, quantization) for dtype in EXCESS for quantization in ("none", "nf4")),
    ("qwen3", "float32", "none"),
    ("qwen3", "bfloat16", "nf4"),
    ("llama 3", "float32", "nf4"),
    ("llama 3", "bfloat16", "none"),
]


def rms(errors: list[np.ndarray]) -> float:
    return float(np.sqrt(np.mean(np.concatenate([np.square(error).ravel() for error in errors]))))


def errors(found: Results, truth: Results, segment_ids: np.ndarray) -> Iterator[tuple[str, float]]:
    """Quantity → RMS error. A gradient tensor counts relative to its own size, so that the largest do not stand for all."""
    real, targets = segment_ids != 0, target_mask(segment_ids)
    for layer in range(1, len(truth.states)):
        yield f"residual stream after {layer} layers", rms([(found.states[layer] - truth.states[layer])[real]])
    yield "logits", rms([(found.logits - truth.logits)[real]])
    yield "log-probabilities", rms([(found.logprobs - truth.logprobs)[targets]])
    sizes = {name: rms([value]) for name, value in truth.gradients.items()}
    yield "gradients", rms([(found.gradients[name] - truth.gradients[name]) / size for name, size in sizes.items()])


@pytest.mark.parametrize(("kind", "dtype", "quantization"), CASES)
def test_the_error_is_no_larger_than_the_references(tiny_model, nf4_model, tiny_adapter, kind, dtype, quantization):
    ratios: dict[str, list[float]] = {}
    for seed in SEEDS:
        torch_type = getattr(torch, dtype)
        if quantization == "nf4":
            path, dense = nf4_model(torch_type, kind=kind, seed=seed)
        else:
            path = dense = tiny_model(torch_type, kind=kind, seed=seed)
        adapter, inputs = tiny_adapter(dense, seed=seed + 50), rows(seed, DOCUMENTS)
        stock = open_model(ModelConfig(str(path), quantization=quantization, dtype=dtype))
        truth = torch_results.forward_and_backward(float64_copy(stock, adapter, trainable=True), inputs)
        theirs = torch_results.forward_and_backward(PeftModel.from_pretrained(stock, adapter, is_trainable=True), inputs)
        ours = jax_results.forward_and_backward(open_trainable(path, adapter, getattr(jnp, dtype), quantization), inputs)
        reference = dict(errors(theirs, truth, inputs[1]))
        for name, error in errors(ours, truth, inputs[1]):
            assert reference[name] > 0, name
            ratios.setdefault(name, []).append(error / reference[name])
    for name, found in ratios.items():
        assert np.median(found) <= EXCESS[dtype].relative, f"{name}: {np.round(found, 3)} ({EXCESS[dtype].reason})"
