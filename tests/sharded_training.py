"""Child process of the sharding tests: a training step over forced devices, against the same step on one of them.

``python -m tests.sharded_training`` prints, for each of ``STEPS`` and each of its meshes, the largest difference of the loss
and of the gradients, relative to the largest gradient, every collective of the compiled program, and what a device sends by
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_medllm.mesh.layout import Layout, laid_out, place_rows, shardings
from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.plan.hlo import Program
from jax_medllm.train.batches import CptBatch, PreferenceData
from jax_medllm.train.loop import cpt_loss_fn, preference_loss_fn
from medllm.architecture import PROJECTIONS, Architecture
from medllm.config import LoraConfig, PreferenceLoss, TrainingConfig
from medllm.preferences.tokenization import TokenizedGroup
from tests.small_model import small_config

# 192 inputs of down_proj are three blocks of 64: over two or four devices a block is cut.
CONFIG = small_config(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=192,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    tie_embeddings=False,
)


MESHES = (
    "fsdp=8",
    "fsdp=8@reversed",
    "data=8",
    "data=2,fsdp=4",
    "data=2,fsdp=2,tensor=2",
    "tensor=4,fsdp=2",
    "sequence=8",
    "sequence=2,fsdp=4",
    "tensor=2,sequence=2,fsdp=2",
)
FEW = ("fsdp=8", "data=2,fsdp=2,tensor=2", "sequence=2,fsdp=4")
STEPS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("cpt", "nf4"): MESHES,
    ("cpt", "llama"): FEW,
    ("cpt", "tied"): FEW,
    ("cpt", "nf4-single"): FEW,
    ("rpo", "nf4"): FEW,
    ("rpo", "qwen3"): FEW,
}
"""Meshes by stage and kind: a quantization, or one of ``OTHERS``."""

OTHERS: Mapping[str, Architecture] = {
    "tied": replace(CONFIG, tie_embeddings=True),
    "qwen3": replace(CONFIG, family="qwen3", head_dim=32, biased=()),
    "llama": replace(CONFIG, family="llama", biased=tuple(PROJECTIONS), window=11),
}
"""Dense models of other kinds: head norms; biases everywhere and a window shorter than a row."""


@partial(jax.jit, static_argnames="scale")
def waves(state: Any, scale: float) -> Any:
    """``state`` and a little that differs from number to number."""
    return jax.tree.map(lambda leaf: leaf + scale * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), state)


def build(kind: str) -> DenseDecoder:
    config, quantization = (OTHERS[kind], "none") if kind in OTHERS else (CONFIG, kind)
    model = DenseDecoder(config, lora=LoraConfig(rank=4, alpha=8), quantization=quantization, rngs=nnx.Rngs(0))
    if kind in OTHERS:  # biases start at zero and norms at one
        nnx.update(model, waves(nnx.state(model, nnx.Param), 0.01))
    return model


def cpt_batch() -> CptBatch:
    random = np.random.default_rng(0)
    segment_ids = np.ones((8, 32), np.int32)
    segment_ids[:, 9:] = 2
    segment_ids[::2, 27:] = 0
    positions = np.tile(np.r_[np.arange(9), np.arange(23)].astype(np.int32), (8, 1))
    return CptBatch(random.integers(1, 512, (8, 32)).astype(np.int32), segment_ids, positions, np.float32(1 / 100))


def preference_batch() -> Any:
    """Six problems: two rows of zeros are added on eight devices. One has a single pair."""
    random = np.random.default_rng(0)

    def text(longest: int) -> tuple[int, ...]:
        return tuple(random.integers(1, 512, random.integers(2, longest)).tolist())

    pairs = ((0, 1), (0, 2), (1, 2))
    groups = [TokenizedGroup(f"p{i}", text(12), (text(9), text(9), text(9)), (2, 1, 0), pairs, (0, 0, 0)) for i in range(5)]
    groups.append(TokenizedGroup("p5", text(12), (text(9), text(5)), (1, 0), ((0, 1),), (0,)))
    data = PreferenceData(groups, TrainingConfig(epochs=1, batch_size=6, accumulation=1))
    (batch,) = data.batches(data.steps[0])
    return batch


LOSSES = {
    "cpt": (partial(cpt_loss_fn, remat="layer"), cpt_batch),
    "rpo": (partial(preference_loss_fn, loss_config=PreferenceLoss(beta=0.3, alpha=2.0), remat="layer"), preference_batch),
}


def collectives(text: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Kind, type and shape of each array that a collective of the program hands out."""
    pattern = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    for shapes, kind in re.findall(pattern, text):
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            yield kind, dtype, tuple(int(size) for size in sizes.split(",") if size)


def gradients_of(stage: str, model: DenseDecoder, devices: Any = None) -> tuple[Any, Any, str]:
    """Loss, gradients and the compiled program of one step, under the layout in use."""
    loss_fn, make = LOSSES[stage]
    graph, trainable, frozen = nnx.split(model, LoraParam, ...)
    trainable = waves(trainable, 0.05)  # B starts at zero, and with it most gradients

    def run(trainable: Any, frozen: Any, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda lora: loss_fn(nnx.merge(graph, lora, frozen), batch)[0])(trainable)
        return loss, laid_out(gradients)

    if devices is not None:
        trainable, frozen = (jax.device_put(state, shardings(state)) for state in (trainable, frozen))
    batch = place_rows(make())
    compiled = jax.jit(run).lower(trainable, frozen, batch).compile()
    loss, gradients = jax.device_get(compiled(trainable, frozen, batch))
    return loss, gradients, compiled.as_text()


def compared(stage: str, kind: str, meshes: tuple[str, ...]) -> dict[str, Any]:
    """One step over each mesh against the same on one device."""
    model = build(kind)
    loss, gradients, _ = gradients_of(stage, model)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    found = {}
    for mesh in meshes:
        devices = jax.devices()
        name, _, order = mesh.partition("@")
        with Layout.of(name, devices=devices[::-1] if order == "reversed" else devices).in_use():
            other_loss, other, text = gradients_of(stage, model, devices)
        error = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (gradients, other)), strict=True))
        found[mesh] = {
            "loss": abs(float(other_loss - loss)) / abs(float(loss)),
            "gradient": error / largest,
            "collectives": sorted(set(collectives(text))),
            "sent": sorted((one.kind, one.dtype, one.devices, one.bytes) for one in Program(text).collectives()),
        }
    return found


def main() -> None:
    """Compare every step."""
    print(json.dumps({" ".join(step): compared(*step, meshes) for step, meshes in STEPS.items()}))


if __name__ == "__main__":
    main()
