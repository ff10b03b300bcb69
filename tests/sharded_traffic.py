"""What a CPT step of :mod:`tests.sharded_training` has to send over a mesh: from shapes, mesh axes and rules, on paper.

Weights are stored over ``tensor``, ``fsdp`` and ``sequence``, and used whole along the last two, which hold rows and positions.
A gather or a scatter among n devices sends (n - 1) / n of the whole, an all-reduce twice that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.sharded_training import CONFIG

ROWS, LENGTH, RANK = 8, 32, 4
LAYERS, WIDTH, MLP, KV = CONFIG.num_layers, CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.kv_width
PASSES = 2
"""Forward, and backward with what it computes anew."""
COLUMN = ((WIDTH, WIDTH), (KV, WIDTH), (KV, WIDTH), (MLP, WIDTH), (MLP, WIDTH))
"""Outputs and inputs of the layers that ``tensor`` cuts by their outputs: q, k, v, gate, up."""
ROW = ((WIDTH, WIDTH), (WIDTH, MLP))
"""Of those that it cuts by their inputs: o and down."""
FLOAT, BLOCK = 4, 64


@dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends over a mesh with so many devices along each axis.

    ``all_reduce`` is a range: the compiler reduces over several mesh axes at once or one after the other, and may add up what
    goes the same way before it does.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    @classmethod
    def over(cls, mesh: str) -> Traffic:
        """From what a command line says."""
        return cls(**{axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))})

    @property
    def _held(self) -> int:
        return self.fsdp * self.sequence

    @property
    def _tokens(self) -> float:
        return ROWS * LENGTH / (self.data * self._held)

    @property
    def _adapters(self) -> tuple[int, float]:
        """Elements of a layer's LoRA matrices: those that are used whole, and those of which ``tensor`` has each a part."""
        whole = RANK * (sum(inputs for _, inputs in COLUMN) + sum(outputs for outputs, _ in ROW))
        split = RANK * (sum(outputs for outputs, _ in COLUMN) + sum(inputs for _, inputs in ROW))
        return whole, split / self.tensor

    @property
    def _keys_and_values(self) -> float:
        """Elements of a layer, of the rows and heads that a device has, at all positions."""
        return 2 * ROWS * LENGTH * KV / (self.data * self.fsdp * self.tensor)

    def gathered_codes(self) -> float:
        """Half a byte a weight and one for each block, in each pass. Scales that ``tensor`` does not divide stay whole."""
        codes = sum(outputs * inputs for outputs, inputs in COLUMN + ROW) / 2 / self.tensor
        scales = sum(outputs * inputs for outputs, inputs in COLUMN) / BLOCK / self.tensor
        for outputs, blocks in ((outputs, inputs // BLOCK) for outputs, inputs in ROW):
            scales += outputs * blocks / (1 if blocks % self.tensor else self.tensor)
        return LAYERS * PASSES * (codes + scales) * _others(self._held)

    def gathered_floats(self) -> float:
        """Adapters and other positions' keys and values in each pass; once the rows, and their weights, at the head."""
        whole, split = self._adapters
        layer = whole * _others(self.tensor * self._held) + split * _others(self._held)
        layer += self._keys_and_values * _others(self.sequence)
        head = ROWS * LENGTH * (WIDTH + 1) / self.data
        return FLOAT * (LAYERS * PASSES * layer + head * _others(self._held))

    def scattered(self) -> float:
        """The gradient at the head, back to the rows that each device has."""
        return FLOAT * ROWS * LENGTH * WIDTH / self.data * _others(self._held)

    def exchanged(self) -> float:
        """Embedded tokens: of all of them some columns, for all columns of some."""
        return FLOAT * self._tokens * WIDTH * (_others(self.fsdp) + _others(self.sequence))

    def permuted(self) -> float:
        """Half of a device's queries for another's, and what they gave: forward, anew, and back."""
        per_layer = 6 * self._tokens * WIDTH / self.tensor / 2
        return FLOAT * LAYERS * per_layer if self.sequence > 1 else 0.0

    def reduced(self) -> tuple[float, float]:
        """The least and the most that is added up over devices."""
        whole, split = self._adapters
        batch, head = (self.data, self.fsdp, self.sequence), (self.tensor, self.fsdp, self.sequence)
        parts = [
            (1, batch),  # the loss
            (LAYERS * (whole + split), batch),  # gradients of the adapters
            (LAYERS * self._keys_and_values, (self.sequence,)),  # theirs
            (3 * ROWS * LENGTH / self.data, head),  # a token's largest logit, sum and target
            (ROWS * LENGTH * WIDTH / self.data, head),  # the gradient of its hidden state
        ]
        # A layer: o and down, o once more in the backward pass, then the gradients of two inputs, or of each of five. The
        # products with A and B are as wide as the rank. Beside the layers rows of the embedding and the head are looked up.
        least, most = (
            2 * _others(self.tensor) * self._tokens * (WIDTH * (beside + LAYERS * wide) + RANK * LAYERS * 9)
            for beside, wide in ((1, 2 + 1 + 2), (2, 2 + 2 + 5))
        )
        least += sum(elements * 2 * _others(math.prod(axes)) for elements, axes in parts)
        most += sum(elements * 2 * sum(map(_others, axes)) for elements, axes in parts)
        return FLOAT * least, FLOAT * most


def _others(devices: int) -> float:
    """The share that is not a device's own."""
    return (devices - 1) / devices
