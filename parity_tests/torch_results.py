"""What transformers and PEFT compute on packed rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from parity_tests.jax_results import Results
from parity_tests.oracle import row_logprobs, row_loss, row_states_and_logits
from parity_tests.packed_rows import Rows


def forward_and_backward(model: Any, rows: Rows) -> Results:
    """As :func:`parity_tests.jax_results.forward_and_backward`, for an oracle or a stock model.

    A bf16 model runs under autocast, as the Trainer runs it; its logits are widened before the loss, as transformers does.
    """
    parameters = list(model.parameters())
    half = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=half):
        states, logits = row_states_and_logits(model, *rows)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = row_loss(wide, *rows[:2])
    loss.backward()
    arrays = [states, logits, row_logprobs(wide, rows[0]), loss]
    return Results(*(array.detach().double().cpu().numpy() for array in arrays), adapter_gradients(model))


def adapter_gradients(model: Any) -> dict[str, np.ndarray]:
    """Gradients of a PeftModel's trained adapter under the names of its file."""
    return {
        name.replace(".default", ""): parameter.grad.double().cpu().numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
