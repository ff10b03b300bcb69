"""Loss and gradient of an optimizer step, one layer in memory at a time: in float64, or as rough as a run computed.

transformers' own modules on the weights as the run held them, for float64 lifted (:mod:`medllm_parity.oracle`). A layer is read
twice: on the way forward, and on the way back from the states before it, which wait in a temporary folder (8 bytes · tokens ·
width a layer). The vocabulary's tables are read in slices of rows. The layers of a small model stay.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medllm.architecture import EMBEDDING, layer_path
from medllm.config import ModelConfig
from medllm.model.adapter import Adapter, tensor_name
from medllm.model.directory import ModelDirectory
from medllm_parity.directories import read_hf_config
from medllm_parity.ends import hf_table_name, torch_norm
from medllm_parity.gradients import KeptStates
from medllm_parity.micro_batches import MicroBatch
from medllm_parity.tables import TorchTable
from medllm_parity.torch_layer import TorchLayer
from torch_ref.model import DTYPES

_KEPT_BYTES = 2**30
"""Models up to this size are read once."""
_VALUES = 2**23
"""Numbers of a slice of a table, and of the logits it gives, that are held at a time."""


@dataclass(frozen=True)
class StepNumbers:
    """What a step comes to.

    Attributes:
        terms: What is logged of the loss.
        gradients: Of each trained matrix, under PEFT's name.
        reference: Of each micro-batch the reference's log-probabilities where they count; None where the loss has none.
        logprobs: The model's own.
        weights: The derivative of the loss at each of those.
    """

    terms: dict[str, float]
    gradients: dict[str, np.ndarray]
    reference: list[torch.Tensor] | None
    logprobs: list[torch.Tensor]
    weights: list[torch.Tensor]


class LayeredModel:
    """The model that a run trained.

    Args:
        model: Its weights, as the run held them; its adapters are not put on here.
        frozen: Adapters under the trained one.
        reference: Those of the reference, where the loss has one.
        exact: Compute in float64; else in the run's own type, as transformers rounds.
    """

    def __init__(
        self, model: ModelConfig, frozen: Sequence[Adapter], reference: Sequence[Adapter] | None, *, exact: bool = True
    ):
        self._model = model
        self._directory = ModelDirectory(model.path)
        self._config = read_hf_config(self._directory.path)
        self._dtype = DTYPES[model.dtype]
        self._exact = exact
        self.computes = torch.float64 if exact else self._dtype
        self._frozen = list(frozen)
        self._reference = reference
        self._layers = self._directory.architecture.num_layers
        names = self._directory.names()
        size = sum(math.prod(self._directory.shape(name)) * self._directory.dtype(name).itemsize for name in names)
        self._keeps = size <= _KEPT_BYTES
        self._kept: dict[tuple[int, bool], TorchLayer] = {}

    def step(self, trained: Adapter, batches: Sequence[MicroBatch]) -> StepNumbers:
        """A step of these micro-batches, with the adapter as it is before it."""
        adapters = [*self._frozen, trained]
        with tempfile.TemporaryDirectory() as folder:
            kept = KeptStates(folder)
            before = None
            if self._reference is not None:
                before = _Head(self, batches, self._forward(self._reference, batches)).logprobs
            head = _Head(self, batches, self._forward(adapters, batches, kept))
            terms, weights = _terms(batches, head.logprobs, before)
            upstream = head.gradient(weights)
            gradients = self._backward(adapters, batches, kept, upstream)
        return StepNumbers(terms, gradients, before, head.logprobs, weights)

    def norm(self) -> torch.nn.Module:
        """The last norm."""
        return torch_norm(self._directory, self._config, self._dtype, lifted=self._exact)

    def table(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The output table: the first row of a slice, and the slice, small enough for the logits of ``rows``."""
        return self._slices(hf_table_name(self._directory.path), rows)

    def _slices(self, name: str, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        table = TorchTable(self._directory, name, self._dtype)
        vocabulary, width = table.shape
        step = max(1, _VALUES // max(width, rows))
        for start in range(0, vocabulary, step):
            yield start, table.rows(start, min(vocabulary, start + step)).to(self.computes)

    def _embed(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        width = self._directory.shape(EMBEDDING)[1]
        tokens = [torch.from_numpy(batch.rows.tokens).long() for batch in batches]
        states = [torch.zeros(*some.shape, width, dtype=self.computes) for some in tokens]
        for start, part in self._slices(EMBEDDING, 1):
            for some, state in zip(tokens, states, strict=True):
                here = (some >= start) & (some < start + len(part))
                state[here] = part[some[here] - start]
        return states

    def _forward(
        self, adapters: Sequence[Adapter], batches: Sequence[MicroBatch], kept: KeptStates | None = None
    ) -> list[torch.Tensor]:
        states = self._embed(batches)
        for index in range(self._layers):
            layer = self._layer(index, adapters)
            for number, (state, batch) in enumerate(zip(states, batches, strict=True)):
                if kept is not None:
                    kept.keep(index * len(batches) + number, state)
                with torch.no_grad():
                    states[number] = layer.forward(state, batch.rows)
            self._drop(layer)
        return states

    def _backward(
        self, adapters: Sequence[Adapter], batches: Sequence[MicroBatch], kept: KeptStates, upstream: list[torch.Tensor]
    ) -> dict[str, np.ndarray]:
        gradients: dict[str, np.ndarray] = {}
        mine = f".{len(adapters) - 1}"
        for index in reversed(range(self._layers)):
            layer = self._layer(index, adapters)
            matrices = {name: matrix for name, matrix in layer.lora_matrices().items() if name.endswith(mine)}
            for number, batch in enumerate(batches):
                inputs = kept.take(index * len(batches) + number).to(self.computes).requires_grad_()
                out = layer.forward(inputs, batch.rows)
                found = torch.autograd.grad(out, [inputs, *matrices.values()], upstream[number])
                upstream[number] = found[0]
                for name, gradient in zip(matrices, found[1:], strict=True):
                    key = _peft_name(index, name)
                    gradients[key] = gradients.get(key, 0) + gradient.double().numpy()
            self._drop(layer)
            del layer, matrices
        return gradients

    def _layer(self, index: int, adapters: Sequence[Adapter]) -> TorchLayer:
        """A layer, with the last of the adapters as it is now."""
        place = (index, adapters is self._reference)
        layer = self._kept.get(place)
        if layer is None:
            quantization = self._model.quantization
            layer = TorchLayer(self._directory, self._config, index, self._dtype, quantization, adapters=adapters)
            if self._exact:
                layer.lift()
            if self._keeps:
                self._kept[place] = layer
        for name, matrix in layer.lora_matrices().items():
            if name.endswith(f".{len(adapters) - 1}"):
                matrix.data.copy_(torch.from_numpy(adapters[-1].tensors[_peft_name(index, name)]))
        return layer

    def _drop(self, layer: TorchLayer) -> None:
        """Modules refer to themselves in circles: what is not kept waits for the collector."""
        if not self._keeps:
            layer.__dict__.clear()
            gc.collect()


class _Head:
    """Log-probabilities of a step's tokens that count, and the gradient at the last states, a slice of the vocabulary at a
    time."""

    def __init__(self, model: LayeredModel, batches: Sequence[MicroBatch], states: Sequence[torch.Tensor]):
        self._model, self._states = model, states
        self._counted = [torch.from_numpy(np.pad(batch.counted, ((0, 0), (0, 1)))) for batch in batches]
        norm = model.norm()
        with torch.no_grad():
            self._hidden = torch.cat([norm(state[some]) for state, some in zip(states, self._counted, strict=True)])
        following = [np.roll(batch.rows.tokens, -1, axis=1) for batch in batches]
        targets = [tokens[some.numpy()] for tokens, some in zip(following, self._counted, strict=True)]
        self._targets = torch.from_numpy(np.concatenate(targets)).long()
        self._sizes = [int(some.sum()) for some in self._counted]
        self._total = torch.full((len(self._hidden),), -torch.inf, dtype=torch.float64)
        picked = torch.zeros(len(self._hidden), dtype=torch.float64)
        for start, table in model.table(len(self._hidden)):
            logits = (self._hidden @ table.T).double()
            self._total = torch.logaddexp(self._total, torch.logsumexp(logits, dim=1))
            here = self._here(start, table)
            picked[here] = logits[here, self._targets[here] - start]
        self.logprobs = list((picked - self._total).split(self._sizes))

    def gradient(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of Σ weight · log-probability, at each micro-batch's last state: d log p / d h = W[target] − Σᵥ pᵥ W[v]."""
        weight = torch.cat(list(weights))[:, None]
        found = torch.zeros(self._hidden.shape, dtype=torch.float64)
        for start, table in self._model.table(len(self._hidden)):
            upstream = -weight * torch.exp((self._hidden @ table.T).double() - self._total[:, None])
            here = self._here(start, table).nonzero()[:, 0]
            upstream[here, self._targets[here] - start] += weight[here, 0]
            found += (upstream.to(table.dtype) @ table).double()
        norm, gradients = self._model.norm(), []
        for state, some, part in zip(
            self._states, self._counted, found.to(self._model.computes).split(self._sizes), strict=True
        ):
            inputs = state.detach().requires_grad_()
            gradients += torch.autograd.grad(norm(inputs[some]), inputs, part)
        return gradients

    def _here(self, start: int, table: torch.Tensor) -> torch.Tensor:
        return (self._targets >= start) & (self._targets < start + len(table))


def _terms(
    batches: Sequence[MicroBatch], policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor] | None
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The step's terms, and the derivative of its loss at every log-probability."""
    terms: dict[str, float] = {}
    weights = []
    for number, batch in enumerate(batches):
        inputs = policy[number].detach().requires_grad_()
        found = batch.terms(inputs, None if reference is None else reference[number])
        weights += torch.autograd.grad(found["loss"], inputs)
        for name, value in found.items():
            terms[name] = terms.get(name, 0.0) + float(value.detach())
    return terms, weights


def _peft_name(layer: int, name: str) -> str:
    """``mlp.up_proj.lora_A.0`` → PEFT's name of the tensor."""
    module, matrix, _ = name.rsplit(".", 2)
    return tensor_name(f"{layer_path(layer)}.{module}", matrix.removeprefix("lora_"))
