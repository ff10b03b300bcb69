"""The JAX engine: a dense decoder in Flax NNX, QLoRA training, preference losses and generation.

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
    "Layout": "mesh.layout",
    "place_rows": "mesh.layout",
    "load_model": "weights.read",
    "DenseDecoder": "model.decoder",
    "LoraParam": "model.linear",
    "adapter_tensors": "weights.adapters",
    "plan_steps": "train.batches",
    "cpt_step": "train.batches",
    "cpt_loss_fn": "train.loop",
    "preference_loss_fn": "train.loop",
    "make_step": "train.loop",
    "make_optimizer": "train.optimizer",
    "learning_rate": "train.optimizer",
    "cpt_loss": "train.losses",
    "dpo_loss": "train.losses",
    "nll_loss": "train.losses",
    "token_logprobs": "model.logprobs",
    "response_logprobs": "model.logprobs",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jax_medllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jax_medllm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
