"""The JAX engine: a Qwen2.5 in Flax NNX, QLoRA training, preference losses and generation.

What notebooks use is listed in ``__all__`` and described in ``docs/api.md``; each name is imported from its module when it is
first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from jax_medllm.accelerators import leave_out_absent

leave_out_absent()

_HOME = {
    "JaxEngine": "engine",
    "Layout": "sharding",
    "place_rows": "sharding",
    "load_model": "weights",
    "Qwen2": "model",
    "LoraParam": "linear",
    "adapter_tensors": "adapters",
    "plan_steps": "batches",
    "cpt_step": "batches",
    "cpt_loss_fn": "train",
    "preference_loss_fn": "train",
    "make_step": "train",
    "make_optimizer": "optimizer",
    "learning_rate": "optimizer",
    "cpt_loss": "losses",
    "dpo_loss": "losses",
    "nll_loss": "losses",
    "token_logprobs": "logprobs",
    "response_logprobs": "logprobs",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jax_medllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jax_medllm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
