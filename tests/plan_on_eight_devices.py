"""Child process of the planner's tests, on eight forced devices: what it reads in programs that are compiled and run here.

``python -m tests.plan_on_eight_devices`` prints, as JSON, the collectives of small programs, and a training step's memory as
planned, as the engine's own arrays take it, and as the step that the engine ran was compiled with.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jax_medllm.engine import JaxEngine
from jax_medllm.mesh.layout import Layout
from jax_medllm.plan.compiled import measure
from jax_medllm.plan.hlo import Program
from jax_medllm.plan.programs import trace
from jax_medllm.train.loop import TrainingStep
from medllm.bench.shapes import CptShape, ModelShape
from medllm.config import LoraConfig, ModelConfig, OptimizerConfig, TrainingConfig
from medllm.run import Run
from medllm.stage_config import CptConfig

ROUNDS = 5
Body = Callable[[jax.Array], jax.Array]
GATHER = partial(jax.lax.all_gather, axis_name="b")
COLLECTIVES: dict[str, tuple[tuple[int, ...], Body]] = {
    "all-gather": ((16, 32), lambda x: GATHER(x).sum(0)),
    "two all-gathers": ((16, 32), lambda x: GATHER(jnp.sin(GATHER(x).sum(0))).sum(0)),
    "reduce-scatter": ((8, 6), lambda x: jnp.tile(jax.lax.psum_scatter(x, "b", tiled=True), (4, 1))),
    "all-reduce": ((24,), lambda x: jax.lax.psum(x, "a")),
    "all-to-all": ((8, 8), lambda x: jax.lax.all_to_all(x, "b", 0, 1, tiled=True).reshape(8, 8)),
    "collective-permute": ((10,), lambda x: jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)])),
}
"""What each of eight devices, two along ``a`` and four along ``b``, does in each round with an array of this shape."""

SHAPE = ModelShape(
    layers=2, width=128, mlp=192, heads=8, kv_heads=4, vocabulary=512, rank=4, dtype="bfloat16", quantization="nf4"
)
LENGTH = 32
MEMORY = {"": 2, "data=2,fsdp=2,tensor=2": 3}
"""Rows of each group of devices that hold rows, by mesh."""


def collectives(shape: tuple[int, ...], body: Body) -> list[dict[str, Any]]:
    """What the planner reads in the rounds of a loop over the devices."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    def run(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.cos(body(x)), None), x, length=ROUNDS)[0]

    spread = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    text = jax.jit(spread).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()
    return [dataclasses.asdict(one) for one in Program(text).collectives()]


def planned(mesh: str, rows: int) -> dict[str, Any]:
    """What the planner says of the step."""
    layout = Layout.of(mesh, devices=jax.devices() if mesh else jax.devices()[:1])
    settings = {"quantization": "nf4", "rank": SHAPE.rank, "rows": rows, "remat": "layer", "accumulation": 1, "length": LENGTH}
    return measure(trace("cpt", {**settings, "model": SHAPE.architecture.to_hf()}, layout), layout)


def on_a_device(arrays: Any) -> int:
    """Bytes of arrays on the first device."""
    shards = (shard for leaf in jax.tree.leaves(arrays) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


def ran(folder: Path, model: ModelConfig, mesh: str, rows: int) -> dict[str, Any]:
    """What a step that the engine runs takes: its arguments' bytes on a device, and the memory of its compiled parts."""
    found: dict[str, Any] = {}
    call = TrainingStep.__call__

    def observed(step: TrainingStep, trainable: Any, moments: Any, index: Any, frozen: Any, batches: Any) -> Any:
        found.update(alive=on_a_device(jax.live_arrays()), base=on_a_device(frozen), batch=on_a_device(batches))
        found.update(adapters=on_a_device(trainable), moments=on_a_device(moments))
        result = call(step, trainable, moments, index, frozen, batches)
        for (part, *_), program in step.programs.items():
            memory = program.memory_analysis()
            name = "gradients" if part is step.gradients else "update"
            found[name] = [memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes]
        return result

    TrainingStep.__call__ = observed  # type: ignore[method-assign]
    groups = int(np.prod([int(part[-1]) for part in mesh.split(",") if part.startswith(("data", "fsdp"))]))
    data = CptShape(SHAPE, rows=rows * groups, length=LENGTH, steps=2).data()
    run = str(folder / f"run-{mesh}")
    config = CptConfig(
        model,
        run,
        lora=LoraConfig(rank=SHAPE.rank),
        optimizer=OptimizerConfig(),
        training=TrainingConfig(epochs=1, batch_size=rows * groups, accumulation=1, max_steps=1),
        mesh=mesh,
    )
    try:
        with Run(run, config, engine="jax") as opened:
            JaxEngine(model, config).train_cpt(data, config, opened)
    finally:
        TrainingStep.__call__ = call  # type: ignore[method-assign]
    return found


def main() -> None:
    """Compile, run and print."""
    found: dict[str, Any] = {name: collectives(*program) for name, program in COLLECTIVES.items()}
    with tempfile.TemporaryDirectory() as scratch:
        model = SHAPE.write(Path(scratch))
        found["memory"] = {
            mesh: {"planned": planned(mesh, rows), "ran": ran(Path(scratch), model, mesh, rows)}
            for mesh, rows in MEMORY.items()
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
