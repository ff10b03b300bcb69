"""The float64 truth: transformers' Qwen2 with every inner rounding to fp32 lifted.

A ``.double()`` Qwen2 still rounds to fp32 in RMSNorm, in the rotary embedding (its frequencies are an fp32 buffer besides) and
in eager attention's softmax. Lifted, it computes all of it in float64; :func:`lift` applied to an fp32 model changes nothing,
which is tested. Documents packed in one row are kept apart with an explicit additive mask.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding, repeat_kv


def lift(model: Any) -> Any:
    """Replace the three fp32 roundings by arithmetic in the model's own type."""
    model.config._attn_implementation = "unrounded"
    for module in model.modules():
        if isinstance(module, Qwen2RMSNorm):
            module.forward = MethodType(_rms_norm, module)
        if isinstance(module, Qwen2RotaryEmbedding):
            module.forward = MethodType(_rotary, module)
    return model


def row_mask(segment_ids: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [b, 1, s, s]: causal within equal segments. Padding (segment 0) sees padding, so no row is empty."""
    segments = torch.from_numpy(np.asarray(segment_ids))
    seen = (segments[:, :, None] == segments[:, None, :]) & torch.ones(segments.shape[1], segments.shape[1]).tril().bool()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def _rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    theta = self.config.rope_parameters["rope_theta"]
    width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
    frequencies = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=x.dtype) / width))
    angles = position_ids[..., None].to(x.dtype) * frequencies
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    scores = query @ keys.transpose(2, 3) * scaling
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    return (weights @ values).transpose(1, 2).contiguous(), weights


AttentionInterface.register("unrounded", _attention)
AttentionMaskInterface.register("unrounded", eager_mask)
