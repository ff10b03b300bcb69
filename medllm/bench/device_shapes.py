"""The work of ``scripts/gpu_bench.sh``: Qwen2.5's published sizes, and tokens drawn at random, the same for both engines."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from medllm.bench.shapes import ModelShape
from medllm.config import RematPolicy
from medllm.corpus.packing import PackedRows
from medllm.preferences.pairs import Rank
from medllm.preferences.tokenization import TokenizedGroup
from medllm.published import PUBLISHED

RESPONSES = 3
PAIRS = ((0, 1), (0, 2), (1, 2))
"""The hierarchy's pairs: ground truth over chosen, ground truth over rejected, chosen over rejected."""


@dataclass(frozen=True)
class DeviceShape:
    """A model and what it works on.

    Attributes:
        name: What the model is called in the table.
        model: Its sizes.
        rows: Rows of a CPT step.
        length: Tokens of a row.
        prompt: Tokens of a problem's prompt.
        response: Tokens of each of its three responses.
        decode_rows: Continuations generated at a time.
        decode_tokens: Tokens each of them has in its cache.
        remat: What the JAX engine keeps of a training step for its backward pass.
        depths: Numbers of layers that are trained in place of the model's own, which then is extrapolated from them; none: its
            own.
    """

    name: str
    model: ModelShape
    rows: int
    length: int = 4096
    prompt: int = 1536
    response: int = 512
    decode_rows: int = 32
    decode_tokens: int = 1024
    remat: RematPolicy = "layer"
    depths: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a child process is given it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DeviceShape:
        """What :meth:`to_json` gave."""
        return cls(**{**value, "model": ModelShape(**value["model"]), "depths": tuple(value["depths"])})

    def cpt_rows(self, steps: int) -> PackedRows:
        """Rows of ``steps`` steps, one document each."""
        shape = (steps * self.rows, self.length)
        return PackedRows(
            tokens=self._tokens(*shape).astype(np.int32),
            segment_ids=np.ones(shape, np.int32),
            positions=np.broadcast_to(np.arange(self.length, dtype=np.int32), shape).copy(),
        )

    def group(self) -> TokenizedGroup:
        """A problem with its responses and pairs."""
        return TokenizedGroup(
            problem_id="generated",
            prompt=tuple(self._tokens(self.prompt).tolist()),
            responses=tuple(tuple(row) for row in self._tokens(RESPONSES, self.response).tolist()),
            ranks=(Rank.GROUND_TRUTH, Rank.CHOSEN, Rank.REJECTED),
            pairs=PAIRS,
            pair_starts=(0,) * len(PAIRS),
        )

    def _tokens(self, *shape: int) -> np.ndarray:
        # No two responses begin alike, or TRL would count what they share to the prompt.
        return np.random.default_rng(len(shape)).integers(1, self.model.vocabulary, shape)


SIZES = ("7b", "72b")
DEPTHS = (4, 12)
"""Layers of the 72B that are trained in place of its 80, which would leave little of nine minutes for anything else."""
SMOKE = DeviceShape(
    name="smoke",
    model=ModelShape(6, 128, 192, 4, 1, 512, rank=4, dtype="bfloat16", quantization="nf4"),
    rows=1,
    depths=(2, 4),  # those of the probe, which then is the same programs
    length=64,
    prompt=48,
    response=16,
    decode_rows=4,
    decode_tokens=32,
)
_LARGE = 70 * 2**30
"""What 80 layers take to generate, with something to spare: about 60 GiB."""


def device_shape(size: str, part: str, memory: float) -> DeviceShape:
    """What a part (``cpt``, ``rpo``, ``decode``, ``calibrate``) runs of a model size on a device with ``memory`` bytes.

    CPT of the 7B is LoRA on dense bf16 weights, two rows a step; everything else is from NF4. The 72B is trained by depth.
    Below 70 GiB the 7B's CPT keeps each layer's input alone, and half of the 72B's layers generate.
    """
    model = ModelShape.of(PUBLISHED[f"qwen2.5-{size}"], rank=16, dtype="bfloat16")
    small = memory < _LARGE
    if size == "7b" and part in ("cpt", "calibrate"):
        return DeviceShape("7B", model, rows=2, remat="layer" if small else "projections")
    packed = replace(model, quantization="nf4")
    if size == "7b":
        return DeviceShape("7B NF4", packed, rows=2)
    if part == "decode" and small:
        half = packed.layers // 2
        return DeviceShape(f"72B NF4, {half} of {packed.layers} layers", replace(packed, layers=half), rows=1)
    if part == "decode":
        return DeviceShape("72B NF4", packed, rows=1)
    return DeviceShape("72B NF4", packed, rows=1, depths=DEPTHS, remat="layer" if small else "attention")
