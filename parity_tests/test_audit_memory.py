"""``medllm parity`` holds one layer of one stack at a time: its memory, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medllm.model.directory import write_model

WIDTH, MLP, VOCAB = 512, 3584, 2048
LAYER_BYTES = 4 * (2 * WIDTH * WIDTH + 2 * 64 * WIDTH + 3 * WIDTH * MLP + 3 * WIDTH + 128)
CONSTANT = 32 << 20
"""Every quantity of a layer for 48 tokens in three types (12 MB), and copies of a tensor on its way from file to device: 64 MiB
are read at a time, which is all of a 7 MB tensor here and a fraction of a large model's."""


def _tensor(index: int, module: str, leaf: str = "weight") -> str:
    return f"model.layers.{index}.{module}.{leaf}"


def write_large_model(out: Path, layers: int) -> Path:
    """A model whose layers are 25 MB each, all in one file."""
    rng = np.random.default_rng(0)
    config = {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": WIDTH // 64,
        "num_key_value_heads": 1,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    shapes = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (64, WIDTH), "self_attn.v_proj": (64, WIDTH)}
    shapes |= {"self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH)}
    shapes |= {"mlp.down_proj": (WIDTH, MLP)}

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield "model.embed_tokens.weight", normal(VOCAB, WIDTH)
        for index in range(layers):
            for module, shape in shapes.items():
                yield _tensor(index, module), normal(*shape)
                if module.endswith(("q_proj", "k_proj", "v_proj")):
                    yield _tensor(index, module, "bias"), normal(shape[0])
            yield _tensor(index, "input_layernorm"), np.ones(WIDTH, np.float32)
            yield _tensor(index, "post_attention_layernorm"), np.ones(WIDTH, np.float32)
        yield "model.norm.weight", np.ones(WIDTH, np.float32)

    write_model(out, config, tensors())
    return out


def test_memory_is_that_of_two_layers_and_the_embeddings(tmp_path):
    one, twenty = (write_large_model(tmp_path / f"{layers}", layers) for layers in (1, 20))
    child = [sys.executable, str(Path(__file__).with_name("audit_memory.py")), str(one), str(twenty)]
    # glibc keeps freed blocks below its threshold for reuse, which it raises to 32 MB by itself: a tensor of a large model is
    # beyond that and given back to the system, and so must be the ones of this model.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(child, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    cap = 2 * LAYER_BYTES + 4 * VOCAB * WIDTH + CONSTANT
    assert cap < 20 * LAYER_BYTES / 5  # a stack that kept its layers would not fit
    assert found["peak"] <= cap, f"{found['peak'] / 1e6:.1f} MB above the baseline, {cap / 1e6:.1f} MB allowed"
