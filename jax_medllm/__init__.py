"""The JAX engine: a Qwen2.5 in Flax NNX, QLoRA training, preference losses and generation.

The parts a notebook uses::

    from jax_medllm.model import Qwen2, LoraParam                   # the model and what of it is trained
    from jax_medllm.weights import load_model                       # Hugging Face directories in
    from jax_medllm.adapters import adapter_tensors                 # PEFT adapters out
    from jax_medllm.train import cpt_loss_fn, preference_loss_fn, make_step, train
    from jax_medllm.losses import cpt_loss, dpo_loss, nll_loss, rpo
    from jax_medllm.logprobs import token_logprobs, response_logprobs
    from jax_medllm.optimizer import make_optimizer, learning_rate
    from jax_medllm.generate import generate
    from jax_medllm.sharding import Layout                          # a mesh, and what lies where on it
    from jax_medllm.engine import JaxEngine                         # all of it behind medllm.engine.Engine

The names in ``__all__`` are the same objects, imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from jax_medllm.accelerators import leave_out_absent

leave_out_absent()

_HOME = {
    "Decoder": "decoder",
    "JaxEngine": "engine",
    "Layout": "sharding",
    "LoraParam": "model",
    "Qwen2": "model",
    "adapter_tensors": "adapters",
    "cpt_loss": "losses",
    "cpt_loss_fn": "train",
    "dpo_loss": "losses",
    "learning_rate": "optimizer",
    "load_model": "weights",
    "make_optimizer": "optimizer",
    "make_step": "train",
    "nll_loss": "losses",
    "preference_loss_fn": "train",
    "response_logprobs": "logprobs",
    "rpo": "losses",
    "token_logprobs": "logprobs",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jax_medllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jax_medllm.{_HOME[name]}"), name)
