"""The float64 truth: transformers' own model with every inner rounding to fp32 lifted.

A ``.double()`` model still rounds to fp32 in RMSNorm, in the rotary embedding (its frequencies are an fp32 buffer besides) and
in eager attention's softmax. Lifted, it computes all of it in float64; :func:`lift` applied to an fp32 model changes nothing,
which is tested. Documents packed in one row are kept apart with an explicit additive mask.
"""

from __future__ import annotations

from types import MethodType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, modeling_rope_utils
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import repeat_kv


def lift(model: Any, config: Any = None) -> Any:
    """Replace the three fp32 roundings by arithmetic in the model's own type; ``config`` is that of a part without one."""
    (config or model.config)._attn_implementation = "unrounded"
    for module in model.modules():
        if is_norm(module):
            module.forward = MethodType(_rms_norm, module)
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            module.forward = MethodType(_rotary, module)
    return model


def window_of(config: Any) -> int | None:
    """The sliding window of a model of transformers, where its family has one; a stray entry of others is not read."""
    return config.sliding_window if hasattr(type(config), "sliding_window") else None


def is_norm(module: Any) -> bool:
    """Whether it is a family's RMSNorm: every family has a class of its own, and all are the same."""
    return type(module).__name__.endswith("RMSNorm")


def row_mask(segment_ids: np.ndarray, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
    """Additive mask [b, 1, s, s]: causal within equal segments, not further back than the model's window. Padding (segment 0)
    sees padding, so no row is empty."""
    segments = torch.from_numpy(np.asarray(segment_ids))
    near = torch.ones(segments.shape[1], segments.shape[1]).tril()
    if window is not None:
        near = near.triu(1 - window)
    seen = (segments[:, :, None] == segments[:, None, :]) & near.bool()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def _rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with patch.object(modeling_rope_utils, "torch", _TorchIn(x.dtype)):
        frequencies, scale = _frequencies(self, x.dtype)
    angles = position_ids[..., None].to(x.dtype) * frequencies
    both = torch.cat([angles, angles], dim=-1)
    return both.cos() * scale, both.sin() * scale


class _TorchIn:
    """torch, where fp32 is another type: transformers' rules of scaled positions ask for fp32 by name."""

    def __init__(self, dtype: torch.dtype):
        self.float = self.float32 = dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _frequencies(rotary: Any, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    kind = rotary.config.rope_parameters["rope_type"]
    if kind != "default":
        return modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](rotary.config)
    theta = rotary.config.rope_parameters["rope_theta"]
    width = getattr(rotary.config, "head_dim", None) or rotary.config.hidden_size // rotary.config.num_attention_heads
    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=dtype) / width)), 1.0


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    scores = query @ keys.transpose(2, 3) * scaling
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    return (weights @ values).transpose(1, 2).contiguous(), weights


AttentionInterface.register("unrounded", _attention)
AttentionMaskInterface.register("unrounded", eager_mask)
