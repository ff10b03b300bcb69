"""The bytes the JAX engine packs a dense layer into, beside those bitsandbytes makes of it on this machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_medllm.model.quantized_weight import QuantizedWeight
from jax_medllm.weights.bnb_files import read_packed
from medllm.architecture import PROJECTIONS, layer_path
from medllm.quantization import BLOCK
from medllm_parity.ends import as_numpy
from medllm_parity.layer_view import LayerView
from medllm_parity.measure import Check
from medllm_parity.tolerances import NF4_CODES, NF4_SCALE_CODES, NF4_SCALES

_ALLOWED = {"codes": NF4_CODES, "scales": NF4_SCALES, "scale codes": NF4_SCALE_CODES}
"""By what a part of a packed weight holds (:attr:`jax_medllm.model.quantized_weight.Part.values`)."""


@partial(jax.jit, static_argnums=1)
def _quantized(weight: jax.Array, kind: type[QuantizedWeight]) -> QuantizedWeight:
    return kind.quantize(weight)


def compare(view: LayerView, index: int) -> Iterator[Check]:
    """Shares of differing numbers over the dense linear weights of a layer; nothing where the directory is packed already.

    The codes of a block of zeros are left out: bitsandbytes stores them as 7 on a CPU and as 0 on CUDA, and both mean zeros.
    """
    differ: dict[str, list[np.ndarray]] = defaultdict(list)
    for name in (f"{layer_path(0)}.{path}.weight" for path in PROJECTIONS.values()):
        dense = view.dense(name)
        if dense is None:
            continue
        theirs = read_packed(view, name)
        ours = _quantized(jnp.asarray(as_numpy(dense)), type(theirs))
        counted = (dense.reshape(-1, BLOCK) != 0).any(dim=1).numpy()
        for part, declared in theirs.parts.items():
            if declared.values:
                apart = np.asarray(getattr(ours, part)) != getattr(theirs, part)
                one = apart.reshape(len(counted), -1)
                differ[declared.values].append((one[counted] if declared.values == "codes" else one).ravel())
    for values, shares in differ.items():
        share, tolerance = float(np.concatenate(shares).mean()), _ALLOWED[values]
        quantity, module = f"nf4 {values}", layer_path(index)
        ok = share <= tolerance.relative
        yield Check(
            f"{module}: {quantity}",
            share,
            tolerance.relative,
            ok,
            index,
            module,
            quantity,
            difference=share,
            stack="" if ok else "jax",
        )
