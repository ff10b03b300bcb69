"""Compiles attention, and a training step through the model, for a TPU that is not there; prints their kernels as JSON.

``python -m tests.tpu_programs v5e:2x2 bfloat16 float32 step``: a process of its own, because libtpu talks on stderr.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}
# Which kernels there are, and that no scores are written out, is settled before a TPU's compiler orders a program anew, which
# takes half of its time.
os.environ["JAX_OPTIMIZATION_LEVEL"] = "O1"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_medllm.model.attention import Visibility, attend
from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.train.batches import CptBatch
from jax_medllm.train.loop import cpt_loss_fn
from medllm.architecture import Architecture
from medllm.config import LoraConfig, RematPolicy
from tests.small_model import small_config

LENGTH, HEADS, KV_HEADS, WIDTH = 4096, 64, 8, 128


def attention(dtype: str) -> jax.stages.Lowered:
    """Forward and backward pass of one row of groups, at the sizes of Qwen2.5-72B."""

    def run(q, k, v, segments, parents, cotangent):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, Visibility(segments, parents)), q, k, v)
        return out, *pull(cotangent)

    q, k = (on_tpu((1, LENGTH, heads, WIDTH), dtype) for heads in (HEADS, KV_HEADS))
    ids = on_tpu((1, LENGTH), jnp.int32)
    return jax.jit(run).lower(q, k, k, ids, ids, q)


QWEN_HALF_B = small_config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_heads=14, num_kv_heads=2, head_dim=64, max_positions=LENGTH
)


def step(remat: RematPolicy, config: Architecture, length: int) -> jax.stages.Lowered:
    """The gradients of a CPT step: LoRA on bf16."""
    model = nnx.eval_shape(lambda: DenseDecoder(config, lora=LoraConfig(rank=8), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graph, trainable, rest = nnx.split(model, LoraParam, ...)
    trainable, rest = jax.tree.map(lambda leaf: on_tpu(leaf.shape, leaf.dtype), (trainable, rest))
    tokens = on_tpu((1, length), jnp.int32)
    batch = CptBatch(tokens, tokens, tokens, on_tpu((), jnp.float32))

    def loss(lora, rest, batch):
        return cpt_loss_fn(nnx.merge(graph, lora, rest), batch, remat=remat)[0]

    return jax.jit(jax.grad(loss)).lower(trainable, rest, batch)


PROGRAMS: dict[str, Callable[[], jax.stages.Lowered]] = {
    "bfloat16": lambda: attention("bfloat16"),
    "float32": lambda: attention("float32"),
    "step": lambda: step("layer", QWEN_HALF_B, LENGTH),
    "step that keeps attention": lambda: step("attention", small_config(), 128),
}


def on_tpu(shape: tuple[int, ...], dtype: object) -> jax.ShapeDtypeStruct:
    """An array of the mesh in use, whole on each of its devices."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))


def main() -> None:
    """Compile what the arguments name."""
    topology, *programs = sys.argv[1:]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    found = {}
    with jax.set_mesh(Mesh(np.array(devices[:1]), ("one",))):
        for name in programs:
            compiled = PROGRAMS[name]().compile()
            kernels = re.findall(r'custom_call_target="tpu_custom_call"', compiled.as_text())
            found[name] = {"kernels": len(kernels), "temporary": compiled.memory_analysis().temp_size_in_bytes}
    print(json.dumps({"device": devices[0].device_kind, "programs": found}))


if __name__ == "__main__":
    main()
