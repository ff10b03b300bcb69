"""The codes :mod:`jax_medllm.nf4` finds for a dense layer, beside those bitsandbytes finds on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_medllm.nf4 import BLOCK, quantize
from medllm.architecture import PROJECTIONS
from medllm_parity.ends import as_numpy
from medllm_parity.layer_view import LayerView
from medllm_parity.measure import Check
from medllm_parity.tolerances import NF4_CODES, NF4_SCALE_CODES

_quantize = jax.jit(quantize)


def compare(view: LayerView, index: int) -> Iterator[Check]:
    """Shares of differing bytes over the dense linear weights of a layer; nothing where the directory is in 4 bits already.

    A block of zeros is left out: bitsandbytes stores it as code 7 on a CPU and as code 0 on CUDA, and both mean zeros.
    """
    differ: dict[str, list[np.ndarray]] = {"nf4 codes": [], "nf4 scale codes": []}
    for name in (f"model.layers.0.{path}.weight" for path in PROJECTIONS.values()):
        dense = view.dense(name)
        if dense is None:
            continue
        ours = _quantize(jnp.asarray(as_numpy(dense)))
        counted = (dense.reshape(-1, BLOCK) != 0).any(dim=1).numpy()
        packed = np.asarray(ours.packed).reshape(-1, BLOCK // 2) != view.read(name).reshape(-1, BLOCK // 2)
        differ["nf4 codes"].append(packed[counted].ravel())
        differ["nf4 scale codes"].append(np.asarray(ours.absmax_codes).ravel() != view.read(f"{name}.absmax").ravel())
    for (quantity, parts), tolerance in zip(differ.items(), (NF4_CODES, NF4_SCALE_CODES), strict=True):
        if parts:
            share = float(np.concatenate(parts).mean())
            module = f"model.layers.{index}"
            ok = share <= tolerance.relative
            stack = "" if ok else "jax"
            yield Check(
                f"{module}: {quantity}", share, tolerance.relative, ok, index, module, quantity, difference=share, stack=stack
            )
