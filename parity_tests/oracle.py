"""The float64 truth for whole models: opened with all roundings lifted, and run on packed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from medllm_parity.oracle import lift, row_mask, window_of


def float64_model(path: Path, adapter: Path | None = None, *, trainable: bool = False) -> torch.nn.Module:
    """Open a model, and a PEFT adapter on it, with all weights and all arithmetic in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return _lifted(model, adapter, trainable)


def float64_copy(model: PreTrainedModel, adapter: Path | None = None, *, trainable: bool = False) -> torch.nn.Module:
    """The same for an opened model: its weights as they are, 4-bit ones dequantized to the model's type.

    The truth for a quantized model is exact arithmetic on the weights its codes stand for.
    """
    settings = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    copy: Any = type(model)(type(model.config)(**settings)).requires_grad_(False).double()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            module = modules[name.rpartition(".")[0]]
            packed = isinstance(module, Linear4bit) and name.endswith(".weight")
            value = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state) if packed else model.get_parameter(name)
            parameter.copy_(value)
    return _lifted(copy, adapter, trainable)


def _lifted(model: Any, adapter: Path | None, trainable: bool) -> torch.nn.Module:
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    return lift(model.double())


def row_logits(model: Any, tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """Logits [b, s, v] of packed rows."""
    embedding = _decoder(model).embed_tokens.weight
    window = window_of(_decoder(model).config)
    return model(
        input_ids=torch.from_numpy(np.asarray(tokens)).long().to(embedding.device),
        attention_mask=row_mask(segment_ids, embedding.dtype, window).to(embedding.device),
        position_ids=torch.from_numpy(np.asarray(positions)).long().to(embedding.device),
        use_cache=False,
    ).logits


def row_states_and_logits(
    model: Any, tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream [l+1, b, s, d] after the embedding and after every layer, and the logits."""
    states: list[torch.Tensor] = []
    modules = [_decoder(model).embed_tokens, *_decoder(model).layers]
    hooks = [module.register_forward_hook(lambda _, __, output: states.append(output.detach())) for module in modules]
    try:
        logits = row_logits(model, tokens, segment_ids, positions)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(states), logits


def row_logprobs(logits: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
    """Log-probability [b, s-1] of each token but the first of a row, given what is before it."""
    targets = torch.from_numpy(np.asarray(tokens)).long()[:, 1:].to(logits.device)
    return torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, targets[..., None])[..., 0]


def row_loss(logits: torch.Tensor, tokens: np.ndarray, segment_ids: np.ndarray) -> torch.Tensor:
    """Mean negative log-likelihood of the tokens that follow one of their own document."""
    segments = torch.from_numpy(np.asarray(segment_ids)).to(logits.device)
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return -row_logprobs(logits, tokens)[counted].mean()


def _decoder(model: Any) -> Any:
    """transformers' decoder inside a causal model, or inside a PeftModel around one."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).model
