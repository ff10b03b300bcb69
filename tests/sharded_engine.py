"""Child process of the mesh tests: what the engine does on a mesh of forced devices, against the same on one of them.

``python -m tests.sharded_engine`` prints, for each of ``CASES``, how far apart is what comes out, and under ``families`` what
:mod:`tests.sharded_families` finds.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_medllm.engine import JaxEngine
from medllm.bench.shapes import CptShape, GenerateShape, ModelShape, RpoShape
from medllm.config import LoraConfig, MeshConfig, ModelConfig, OptimizerConfig, Sampling, TrainingConfig
from medllm.engine import Continuation
from medllm.model.adapter import read_adapter
from medllm.preferences.tokenization import tokenize_preferences
from medllm.run import Run
from medllm.stage_config import CptConfig, RpoConfig
from tests import sharded_families

CASES = {"nf4": "data=2,tensor=2,fsdp=2", "none": "sequence=2,fsdp=4"}
"""A mesh for each quantization."""

SHAPE = ModelShape(layers=2, width=128, mlp=192, heads=8, kv_heads=4, vocabulary=64, rank=4)
TRAINING = TrainingConfig(epochs=1, batch_size=6, accumulation=1)
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, warmup_ratio=0.0)
LORA = LoraConfig(rank=4, alpha=8)


class Work:
    """One model, and everything the engine can do with it."""

    def __init__(self, folder: Path, model: ModelConfig):
        self.folder, self.model = folder, model
        self.rows = CptShape(SHAPE, rows=6, length=32, steps=4).data()
        self.preferences = RpoShape(SHAPE, problems=6, prompt=12, response=6, steps=2).data()
        self.prompts = GenerateShape(SHAPE, problems=5, header=24, question=12).data()

    def cpt(self, name: str, mesh: str, steps: int = 0, resume: bool = False) -> dict[str, np.ndarray]:
        """The adapter of a continued pretraining."""
        training = dataclasses.replace(TRAINING, max_steps=steps)
        run = str(self.folder / name)
        config = CptConfig(self.model, run, lora=LORA, optimizer=OPTIMIZER, training=training, resume=resume, mesh=mesh)
        with Run(run, config, engine="jax", resume=resume) as opened:
            return read_adapter(JaxEngine(self.model, config).train_cpt(self.rows, config, opened).adapter).tensors

    def rpo(self, name: str, mesh: str) -> dict[str, np.ndarray]:
        """The adapter of preference training, the reference's log-probabilities computed beforehand."""
        run = str(self.folder / name)
        config = RpoConfig(self.model, run, "unused", lora=LORA, optimizer=OPTIMIZER, training=TRAINING, mesh=mesh)
        config = dataclasses.replace(config, reference_cache=str(self.folder / f"{name}-reference"))
        with Run(run, config, engine="jax") as opened:
            engine = JaxEngine(self.model, config)
            preferences = tokenize_preferences(engine.tokenizer, self.preferences, config.pairs)
            return read_adapter(engine.train_preferences(preferences, config, opened).adapter).tensors

    def opened(self, mesh: str) -> JaxEngine:
        """The model, for answers."""
        return JaxEngine(self.model, MeshConfig(mesh=mesh) if mesh else None)

    def answers(self, engine: JaxEngine) -> tuple[list[Any], list[np.ndarray]]:
        """Greedy and sampled texts, and log-probabilities of given ones."""
        texts = [
            engine.generate(self.prompts, Sampling(max_new_tokens=12, samples=samples, temperature=temperature), 8)
            for samples, temperature in ((1, 0.0), (2, 1.0))
        ]
        asked = [Continuation((3, 4, 5), (6, 7)), Continuation((3, 4, 5), (8,)), Continuation((9, 10), (11, 12, 13))]
        return texts, engine.logprobs(asked, 4)


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest norm of the difference of two adapters' matrices, relative to the matrix."""
    assert one.keys() == other.keys()
    return max(float(np.linalg.norm(other[name] - value) / np.linalg.norm(value)) for name, value in one.items())


def compared(folder: Path, model: ModelConfig, mesh: str) -> dict[str, Any]:
    """What the engine does on ``mesh``, held against what it does on one device."""
    work = Work(folder, model)
    cpt, rpo, (texts, logprobs) = work.cpt("cpt", ""), work.rpo("rpo", ""), work.answers(work.opened(""))
    spread = work.opened(mesh)
    other_texts, other_logprobs = work.answers(spread)
    work.cpt("resumed", mesh, steps=2)
    weights = nnx.state(spread.model)
    return {
        "cpt": apart(cpt, work.cpt("cpt-on-mesh", mesh)),
        "resumed on one device": apart(cpt, work.cpt("resumed", "", resume=True)),
        "rpo": apart(rpo, work.rpo("rpo-on-mesh", mesh)),
        "logprobs": max(float(np.abs(a - b).max()) for a, b in zip(logprobs, other_logprobs, strict=True)),
        "same texts": texts == other_texts,
        "bytes on a device": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(weights)),
        "bytes in all": sum(leaf.nbytes for leaf in jax.tree.leaves(weights)),
    }


def main() -> None:
    """Compare in each case."""
    found: dict[str, Any] = {}
    for quantization, mesh in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            model = dataclasses.replace(SHAPE.write(Path(scratch)), quantization=quantization)
            found[quantization] = compared(Path(scratch), model, mesh)
    with tempfile.TemporaryDirectory() as scratch:
        found["families"] = sharded_families.compared(Path(scratch))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
