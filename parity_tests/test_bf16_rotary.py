"""The rotary angles of a bf16 model: computed in fp32, as transformers does, since bf16 counts only to 256 without gaps."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import torch
from transformers import Qwen2Config as HfConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from jax_medllm.model.decoder import Rotary
from medllm.architecture import Architecture


def test_a_bf16_model_turns_its_heads_as_transformers_does_up_to_the_last_position():
    sizes = {"vocab_size": 9, "hidden_size": 256, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = HfConfig(**sizes, num_key_value_heads=2, rope_parameters=rope, max_position_embeddings=32768)
    positions = np.arange(0, 32768, 37)[None]
    theirs = Qwen2RotaryEmbedding(config)(torch.zeros(1, dtype=torch.bfloat16), torch.from_numpy(positions))
    rotary = Rotary.at(jnp.asarray(positions), Architecture.from_hf(config.to_dict()), jnp.dtype(jnp.bfloat16))
    for ours, expected in zip((rotary.cos, rotary.sin), theirs, strict=True):
        assert expected.dtype == torch.bfloat16
        # transformers rounds cosines and sines to bf16 (2⁻⁹ at most), we the rotated heads; fp32 angles are multiples of 0.002.
        assert np.abs(np.asarray(ours, np.float64) - expected.double().numpy()).max() <= 2**-9 + 0.002
