"""Published models by name, for plans and measurements: sizes, as their ``config.json`` files give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medllm.architecture import Architecture
from medllm.families import FAMILIES
from medllm.rotary import Llama3, RotaryRule


def decoder(
    family: str, layers: int, width: int, mlp: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> Architecture:
    """A decoder of these sizes, with heads that share the width, and everything else as its family has it unless ``more`` says
    otherwise."""
    settings: dict[str, Any] = {
        "head_dim": width // heads,
        "max_positions": 32768,
        "rotary": RotaryRule(theta=1e6),
        "rms_norm_eps": 1e-6,
        "tie_embeddings": False,
        "biased": FAMILIES[family].biased,
    }
    sizes: dict[str, Any] = {"num_layers": layers, "hidden_size": width, "intermediate_size": mlp, "vocab_size": vocabulary}
    return Architecture(family=family, num_heads=heads, num_kv_heads=kv_heads, **sizes, **settings | more)


def qwen2(layers: int, width: int, mlp: int, heads: int, kv_heads: int, vocabulary: int, **more: Any) -> Architecture:
    """A Qwen2.5 of these sizes."""
    return decoder("qwen2", layers, width, mlp, heads, kv_heads, vocabulary, **more)


def _qwen3(layers: int, width: int, mlp: int, heads: int, *, tied: bool = False) -> Architecture:
    return decoder("qwen3", layers, width, mlp, heads, 8, 151936, head_dim=128, max_positions=40960, tie_embeddings=tied)


def _llama2(layers: int, width: int, mlp: int, heads: int, kv_heads: int, vocabulary: int = 32000, **more: Any) -> Architecture:
    settings = {"max_positions": 4096, "rotary": RotaryRule(1e4), "rms_norm_eps": 1e-5}
    return decoder("llama", layers, width, mlp, heads, kv_heads, vocabulary, **settings | more)


def _llama3(layers: int, width: int, mlp: int, heads: int, *, stretched: float = 8.0, tied: bool = False) -> Architecture:
    scaling = Llama3(stretched, 1.0, 4.0, 8192) if stretched > 1 else None
    settings = {"max_positions": 131072 if scaling else 8192, "rotary": RotaryRule(5e5, scaling)}
    return _llama2(layers, width, mlp, heads, 8, 128256, tie_embeddings=tied, **settings)


def _mistral(layers: int, width: int, mlp: int, vocabulary: int, theta: float, **more: Any) -> Architecture:
    return decoder("mistral", layers, width, mlp, 32, 8, vocabulary, rotary=RotaryRule(theta), rms_norm_eps=1e-5, **more)


_LONG = {"max_positions": 131072, "rms_norm_eps": 1e-5}

PUBLISHED: Mapping[str, Architecture] = {
    "qwen2.5-0.5b": qwen2(24, 896, 4864, 14, 2, 151936, tie_embeddings=True),
    "qwen2.5-1.5b": qwen2(28, 1536, 8960, 12, 2, 151936, tie_embeddings=True),
    "qwen2.5-3b": qwen2(36, 2048, 11008, 16, 2, 151936, tie_embeddings=True),
    "qwen2.5-7b": qwen2(28, 3584, 18944, 28, 4, 152064, max_positions=131072),
    "qwen2.5-14b": qwen2(48, 5120, 13824, 40, 8, 152064, **_LONG),
    "qwen2.5-32b": qwen2(64, 5120, 27648, 40, 8, 152064, **_LONG),
    "qwen2.5-72b": qwen2(80, 8192, 29568, 64, 8, 152064, **_LONG),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64),
    "llama-2-7b": _llama2(32, 4096, 11008, 32, 32),
    "llama-2-13b": _llama2(40, 5120, 13824, 40, 40),
    "llama-2-70b": _llama2(80, 8192, 28672, 64, 8),
    "llama-3-8b": _llama3(32, 4096, 14336, 32, stretched=1.0),
    "llama-3-70b": _llama3(80, 8192, 28672, 64, stretched=1.0),
    "llama-3.1-8b": _llama3(32, 4096, 14336, 32),
    "llama-3.1-70b": _llama3(80, 8192, 28672, 64),
    "llama-3.2-1b": _llama3(16, 2048, 8192, 32, stretched=32.0, tied=True),
    "llama-3.2-3b": _llama3(28, 3072, 8192, 24, stretched=32.0, tied=True),
    "llama-3.3-70b": _llama3(80, 8192, 28672, 64),
    "sarashina2-7b": _llama2(32, 4096, 11008, 32, 32, 102400),
    "sarashina2-13b": _llama2(40, 5120, 13824, 40, 40, 102400),
    "sarashina2-70b": _llama2(80, 8192, 28672, 64, 8, 102400, max_positions=8192),
    "mistral-7b-v0.1": _mistral(32, 4096, 14336, 32000, 1e4, window=4096),
    "mistral-7b-v0.3": _mistral(32, 4096, 14336, 32768, 1e6),
    "mistral-small-24b": _mistral(40, 5120, 32768, 131072, 1e8, head_dim=128),
}
"""Published models, by name."""
