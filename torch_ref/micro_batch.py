"""A micro-batch computed as the Trainer computes it, and what of it is not finite: hooks on the modules of the decoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medllm.architecture import PROJECTIONS
from medllm.errors import UserError
from medllm.model.quantities import LAYER
from medllm.replay import Arrays, Batch, Part, Reading, Replay

_ITEMS = "num_items_in_batch"
"""Targets of the whole step, where the Trainer counts them."""
_IN_LAYER = re.compile(r".*\blayers\.(\d+)(?:\.(.*))?")
_AROUND = {"embed_tokens": "embedding", "norm": "last norm", "lm_head": "logits"}


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch: what the Trainer was given, the targets of the whole step, whether it was finite, and its loss."""

    inputs: Mapping[str, Any]
    items: Any
    finite: torch.Tensor
    loss: torch.Tensor

    def arrays(self) -> Arrays:
        """What is kept of it."""
        tensors = {name: one for name, one in self.inputs.items() if isinstance(one, torch.Tensor)}
        counted = {} if self.items is None else {_ITEMS: torch.as_tensor(self.items)}
        return {name: _plain(one).numpy() for name, one in {**tensors, **counted}.items()}


def micro_batch(batch: Batch, arrays: Arrays, device: torch.device) -> MicroBatch:
    """That of which these are the arrays.

    Raises:
        UserError: they are of none.
    """
    if "input_ids" not in arrays:
        raise UserError(f"the batch of step {batch.step} has no input_ids, so it is not of this engine")
    tensors = {name: torch.from_numpy(np.array(one)).to(device) for name, one in arrays.items()}
    items = tensors.pop(_ITEMS, None)
    return MicroBatch(tensors, items, torch.tensor(True), torch.tensor(0.0))


def replay(model: torch.nn.Module, compute: Callable[..., torch.Tensor], one: MicroBatch, part: Part) -> Replay:
    """Loss and gradient of a micro-batch, and every tensor on the way.

    Args:
        model: With the adapter that is trained. Its gradients are gone afterwards.
        compute: The Trainer's ``training_step`` of it: inputs and targets of the step → the loss, its gradient taken.
        one: The micro-batch.
        part: What it is.
    """
    for parameter in model.parameters():
        parameter.grad = None
    sizes: dict[tuple[int | None, str], tuple[torch.Tensor, torch.Tensor]] = {}
    with _listening(model, sizes):
        loss = compute(dict(one.inputs), one.items)
    forward, backward = ({key: size for key, size in sizes.items() if ("gradient" in key[1]) == back} for back in (0, 1))
    forward[None, "loss"] = _size(loss)
    gradients = list(_gradients(model))
    for layer in sorted({layer for layer, *_ in gradients}, reverse=True):
        if (size := backward.pop((layer, "gradient of layer output"), None)) is not None:
            backward[layer, "gradient of layer output"] = size
        backward |= {(layer, f"gradient of {name}"): _size(one) for of, name, one in gradients if of == layer}
    norm = torch.nn.utils.get_total_norm([gradient for *_, gradient in gradients])
    for parameter in model.parameters():
        parameter.grad = None
    found = [
        Reading(what, layer, float(most), int(wrong)) for (layer, what), (most, wrong) in [*forward.items(), *backward.items()]
    ]
    return Replay(part, float(loss.detach()), float(norm), found)


@contextmanager
def _listening(model: torch.nn.Module, sizes: dict[tuple[int | None, str], Any]) -> Iterator[None]:
    """Hooks that note the size of what passes, the first time it does: the reference of preference training, which has no
    gradient, and what is computed anew in the backward pass are not looked at."""

    def note(key: tuple[int | None, str], value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, torch.Tensor) and torch.is_grad_enabled() and key not in sizes:
            sizes[key] = _size(value)
            if value.requires_grad and key[1] in ("layer output", "last norm"):
                layer, what = key
                value.register_hook(lambda slope: sizes.setdefault((layer, f"gradient of {what}"), _size(slope)) and None)

    hooks = []
    for name, module in model.named_modules():
        for key, side in _read_at(name):
            if side == "in":
                hooks.append(module.register_forward_pre_hook(lambda _, given, key=key: note(key, given[0]) if given else None))
            else:
                hooks.append(module.register_forward_hook(lambda _, __, out, key=key: note(key, out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read_at(name: str) -> Sequence[tuple[tuple[int | None, str], str]]:
    """What is read at a module of that name: layer and quantity, and whether it goes in or comes out."""
    if found := _IN_LAYER.fullmatch(name):
        layer, inside = int(found[1]), found[2] or ""
        return [((layer, one.name), one.side) for one in LAYER if one.tap == inside]
    around = _AROUND.get(name.rpartition(".")[2])
    return [((None, around), "out")] if around else []


def _gradients(model: torch.nn.Module) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Layer, name and gradient of each matrix of the adapter, in the order in which gradients come to a layer's."""
    order = list(PROJECTIONS.values())
    found = []
    for name, parameter in model.named_parameters():
        inside = _IN_LAYER.fullmatch(name)
        if parameter.grad is not None and inside and inside[2]:
            path, _, matrix = inside[2].partition(".lora_")
            found.append((int(inside[1]), path, matrix[:1], parameter.grad))
    for layer, path, matrix, gradient in sorted(found, key=lambda one: -order.index(one[1])):
        yield layer, f"{path}.lora_{matrix}", gradient


def _size(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest magnitude among a tensor's finite numbers, and how many of its numbers are not finite."""
    value = value.detach()
    finite = torch.isfinite(value)
    return torch.where(finite, value.abs(), 0).amax() if value.numel() else torch.tensor(0.0), (~finite).sum()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """On the host, in a type that NumPy has."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
