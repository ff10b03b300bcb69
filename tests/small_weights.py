"""The model that folders are tested with: a few tensors of three types, written with what stands beside them."""

import ml_dtypes
import numpy as np
import pytest

from medllm.model.directory import write_model

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def weights():
    """Its four tensors, by name."""
    rng = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": rng.normal(size=(12, 8)).astype(np.float32),
        f"{MODULE}.weight": rng.normal(size=(6, 8)).astype(ml_dtypes.bfloat16),
        f"{MODULE}.bias": rng.normal(size=(6,)).astype(np.float16),
        "model.layers.1.self_attn.q_proj.weight": rng.normal(size=(6, 8)).astype(np.float32),
    }


@pytest.fixture
def base(tmp_path, weights):
    """Its folder."""
    write_model(tmp_path / "base", {"model_type": "qwen2"}, weights.items())
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.7}')
    return tmp_path / "base"
