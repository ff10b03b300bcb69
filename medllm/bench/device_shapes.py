"""The work of ``scripts/gpu_bench.sh``: Qwen2.5's published sizes, and tokens drawn at random, the same for both engines."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from medllm.bench.shapes import ModelShape
from medllm.corpus.packing import PackedRows
from medllm.preferences.pairs import Rank
from medllm.preferences.tokenization import TokenizedGroup

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
    """

    name: str
    model: ModelShape
    rows: int
    length: int = 4096
    prompt: int = 1536
    response: int = 512
    decode_rows: int = 32
    decode_tokens: int = 1024

    def to_json(self) -> dict[str, Any]:
        """As a child process is given it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DeviceShape:
        """What :meth:`to_json` gave."""
        return cls(**{**value, "model": ModelShape(**value["model"])})

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


_SIZES = {
    "72b": DeviceShape(
        name="72B",
        model=ModelShape(80, 8192, 29568, 64, 8, 152064, rank=16, dtype="bfloat16", quantization="nf4"),
        rows=1,
    ),
    "7b": DeviceShape(
        name="7B",
        model=ModelShape(28, 3584, 18944, 28, 4, 152064, rank=16, dtype="bfloat16", quantization="nf4"),
        rows=4,
    ),
}
SIZES = tuple(_SIZES)
SMOKE = DeviceShape(
    name="smoke",
    model=ModelShape(2, 128, 192, 4, 1, 512, rank=4, dtype="bfloat16", quantization="nf4"),
    rows=1,
    length=64,
    prompt=48,
    response=16,
    decode_rows=4,
    decode_tokens=32,
)
_LARGE = 70 * 2**30
"""What 80 layers take on either engine, with something to spare: about 60 GiB."""


def device_shape(size: str, memory: float) -> DeviceShape:
    """A model size and its work on a device with ``memory`` bytes; below 70 GiB half of the 72B's layers or the 7B's rows."""
    shape = _SIZES[size]
    if memory >= _LARGE:
        return shape
    if size == "72b":
        layers = shape.model.layers // 2
        return replace(shape, name=f"72B, {layers} of 80 layers", model=replace(shape.model, layers=layers))
    return replace(shape, rows=shape.rows // 2)
