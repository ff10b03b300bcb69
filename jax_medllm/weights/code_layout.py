"""How the codes of NF4 weights lie in a TPU's memory while a model is trained.

A TPU multiplies by weights whose outputs lie along the 128 lanes of its registers, and what is gathered lies as it was stored.
Codes are read with their inputs along the lanes, as bitsandbytes writes them, so the compiler turns them round: layer by layer,
or, where a device's outputs fill whole tiles, the whole stack at once, in a copy that stays beside the model for the length of
a step (.3 GiB for 72B over 16 chips). Such stacks are turned round once, before training.

Generation takes them as they are read: turned round, they would move through memory once more for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.experimental.layout import Format, Layout

LANES = 128
_CODES = "packed"
"""Name of the codes in every :class:`jax_medllm.model.quantized_weight.QuantizedWeight`."""


def lay_codes(model: nnx.Module, platform: str | None = None) -> None:
    """Lay the codes of a model's weights out for training on ``platform``, that of its devices when unset.

    One stack at a time is in memory twice.
    """
    nnx.update(model, laid_codes(nnx.state(model), lambda codes, form: jax.device_put(codes, form, donate=True), platform))


def laid_codes(state: nnx.State, turned: Callable[[Any, Format], Any], platform: str | None = None) -> nnx.State:
    """``state`` with its codes as they lie while a model is trained.

    Args:
        state: Arrays with a sharding, or their shapes.
        turned: Gives what one of them is in another format.
        platform: As in :func:`lay_codes`.
    """

    def laid(codes: Any) -> Any:
        device = next(iter(codes.sharding.device_set))
        if (platform or device.platform) != "tpu" or codes.sharding.shard_shape(codes.shape)[1] % LANES:
            return codes
        return turned(codes, Format(Layout((0, 2, 1)), codes.sharding))

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        {path: variable.replace(laid(variable.get_value())) if path[-1] == _CODES else variable for path, variable in flat}
    )
