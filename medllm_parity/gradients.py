"""Gradients of the loss with respect to every adapter matrix, one layer at a time, from the last to the first.

The truth is walked back in float64 from the states it had on the way forward, kept in files. At each layer both stacks are
given the truth's input and the truth's gradient at the output, rounded: a verdict is on this layer's backward pass alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import PreTrainedConfig as HfConfig

from jax_medllm.model.decoder import RMSNorm
from jax_medllm.model.logprobs import token_logprobs
from medllm.architecture import NORM, Architecture
from medllm.model.directory import ModelDirectory
from medllm_parity.ends import as_numpy, hf_table_name, read_table, torch_norm
from medllm_parity.jax_layer import JaxLayer
from medllm_parity.measure import Values
from medllm_parity.rows import Rows
from medllm_parity.tables import TorchTable
from medllm_parity.torch_layer import TorchLayer


@dataclass(frozen=True)
class LayerGradients:
    """Gradients of one layer: matrix (``mlp.up_proj.lora_A.0``) → its three values, and the truth's at the layer's input."""

    matrices: dict[str, Values]
    inputs: torch.Tensor


class KeptStates:
    """The truth's state before each layer and after the last, in files of a folder."""

    def __init__(self, folder: str):
        self._folder = Path(folder)

    def keep(self, index: int, state: torch.Tensor) -> None:
        """State before layer ``index``; bfloat16, which numpy has not, as float32."""
        np.save(self._folder / f"{index}.npy", state.to(torch.promote_types(state.dtype, torch.float32)).numpy())

    def take(self, index: int) -> torch.Tensor:
        """The same, read back."""
        return torch.from_numpy(np.load(self._folder / f"{index}.npy"))


def of_last_state(
    ours: ModelDirectory,
    theirs: ModelDirectory,
    state: torch.Tensor,
    rows: Rows,
    configs: tuple[Architecture, HfConfig],
    dtype: torch.dtype,
) -> tuple[Values, torch.Tensor]:
    """Gradient of the mean loss at the state after the last layer, in each stack and, apart, the truth's as it is walked on.

    Norm, head and log-probabilities are the stacks' own.
    """
    rounded = state.to(dtype)
    counted = torch.from_numpy(rows.predicted)
    weights = counted / counted.sum()
    targets = torch.from_numpy(rows.tokens[:, 1:]).long()
    held = TorchTable(theirs, hf_table_name(theirs.path), dtype)
    table = held.rows(0, held.shape[0])
    reference = _torch_gradient(torch_norm(theirs, configs[1], dtype), table, rounded, targets, weights)
    norm = torch_norm(theirs, configs[1], dtype, lifted=True)
    truth = _torch_gradient(norm, table, rounded.double(), targets, weights.double())
    walked = _torch_gradient(norm, table, state, targets, weights.double())
    del table, held
    found = _jax_gradient(ours, rounded, rows, weights.numpy(), configs[0])
    real = rows.real
    return Values(found[real], as_numpy(reference)[real].astype(np.float64), truth.numpy()[real]), walked


def of_layer(jax_layer: Any, torch_layer: Any, state: torch.Tensor, gradient: torch.Tensor, rows: Rows) -> LayerGradients:
    """Gradients of a layer's adapter matrices.

    Args:
        jax_layer: Makes the :class:`JaxLayer`; called when the other is gone.
        torch_layer: Makes the :class:`TorchLayer`.
        state: The truth's input of the layer, float64.
        gradient: The truth's gradient at its output.
        rows: The tokens.
    """
    made: TorchLayer = torch_layer()
    low, cotangent = state.to(made.dtype), gradient.to(made.dtype)
    theirs, _ = _walk_back(made, low, cotangent, rows)
    made.lift()
    truth, _ = _walk_back(made, low.double(), cotangent.double(), rows)
    _, inputs = _walk_back(made, state, gradient, rows)
    del made
    layer: JaxLayer = jax_layer()
    given, upstream = (jnp.asarray(as_numpy(x), layer.dtype) for x in (low, cotangent))
    ours = layer.backward(given, upstream, rows)
    values = {name: Values(ours[name], theirs[name], truth[name]) for name in truth if name in ours}
    return LayerGradients(values, inputs)


def _walk_back(
    layer: TorchLayer, state: torch.Tensor, gradient: torch.Tensor, rows: Rows
) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    inputs = state.detach().clone().requires_grad_()
    matrices = layer.lora_matrices()
    found = torch.autograd.grad(layer.forward(inputs, rows), [inputs, *matrices.values()], gradient)
    return {name: as_numpy(g).astype(np.float64) for name, g in zip(matrices, found[1:], strict=True)}, found[0]


def _torch_gradient(
    norm: torch.nn.Module, table: torch.Tensor, state: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """One row at a time, so that no more logits than a row's are held."""
    parts = []
    for row in range(state.shape[0]):
        inputs = state[row].detach().clone().requires_grad_()
        logits = norm(inputs)[:-1] @ table.to(state.dtype).T
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = torch.nn.functional.cross_entropy(wide, targets[row], reduction="none")
        parts += torch.autograd.grad((nll * weights[row]).sum(), inputs)
    return torch.stack(parts)


def _jax_gradient(
    ours: ModelDirectory, state: torch.Tensor, rows: Rows, weights: np.ndarray, config: Architecture
) -> np.ndarray:
    hidden = jnp.asarray(as_numpy(state), "bfloat16" if state.dtype == torch.bfloat16 else "float32")
    norm = RMSNorm(nnx.Param(jnp.asarray(ours.read(NORM)).astype(hidden.dtype)), config.rms_norm_eps)
    table = read_table(ours, hidden.dtype)

    def loss(hidden: jax.Array) -> jax.Array:
        return -(token_logprobs(norm(hidden)[:, :-1], table, jnp.asarray(rows.tokens[:, 1:])) * weights).sum()

    return np.asarray(jax.grad(loss)(hidden), np.float64)


def matrix_place(name: str) -> tuple[str, str]:
    """``mlp.up_proj.lora_A.1`` → the module, and what of it."""
    module, matrix, number = name.rsplit(".", 2)
    return module, f"gradient of {matrix}" + (f" of adapter {number}" if number != "0" else "")


def names(gradients: LayerGradients) -> Iterator[tuple[str, str, Values]]:
    """Module, quantity and values of each matrix, in the order they are walked back."""
    for name, values in reversed(list(gradients.matrices.items())):
        yield *matrix_place(name), values
