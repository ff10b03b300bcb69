"""The JAX engine's half of the pre-flight of ``scripts/gpu_bench.sh``: what can go wrong on a device.

Each attention backend against float64 with numpy, NF4 against bytes that bitsandbytes made, and one tiny training step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_medllm.bench.device import cpt
from jax_medllm.model.attention import Backend, Visibility, attend, using
from jax_medllm.model.linear import nf4_matmul
from jax_medllm.model.quantized_weight import QuantizedWeight
from jax_medllm.weights.bnb_files import read_packed
from medllm.errors import UserError
from medllm.host.child import serve
from medllm.model.directory import ModelDirectory

TOLERANCE = 0.02
"""Largest error, relative to the largest value, of what is computed in bf16: five of its roundings."""


def check(*, shape: dict[str, Any], smoke: bool, attention: Backend | None = None, nf4: str | None = None) -> dict[str, Any]:
    """All of it.

    Args:
        shape: Of the tiny step.
        smoke: On the CPU.
        attention: The only backend that will be used; None: all that are there.
        nf4: Folder in which :mod:`torch_ref.preflight` left a weight; None leaves that out.

    Raises:
        UserError: says what is wrong.
    """
    backends: tuple[Backend, ...] = (attention,) if attention else ("xla",) if smoke else ("xla", "cudnn")
    errors = {f"attention by {backend}": check_attention(backend) for backend in backends}
    if nf4 is not None:
        errors["NF4 product"] = check_nf4(nf4)
    found = cpt(shape=shape, seconds=0.0, smoke=smoke, attention=attention)
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {"errors": errors, "loss": found["loss"], "device": jax.devices()[0].device_kind, "versions": versions}


def check_attention(backend: Backend) -> float:
    """The largest error of a backend's output and gradients, on a problem with two responses and on two documents.

    Raises:
        UserError: the backend cannot be had, or is off.
    """
    rng = np.random.default_rng(0)
    q, k, v, slope = (jnp.asarray(rng.standard_normal((2, 96, heads, 64)), jnp.bfloat16) for heads in (4, 2, 2, 4))
    segments = np.stack([np.repeat([1, 2, 3], [48, 24, 24]), np.repeat([1, 2], [40, 56])]).astype(np.int32)
    parents = np.stack([np.repeat([0, 1, 1], [48, 24, 24]), np.zeros(96, int)]).astype(np.int32)
    visible = Visibility(jnp.asarray(segments), jnp.asarray(parents))

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, slope: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, visible), q, k, v)
        return out, *pull(slope)

    try:
        with using(backend):
            found = [np.asarray(part, np.float64) for part in run(q, k, v, slope)]
    except (UserError, RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"attention by {backend} does not run: {str(error).strip().splitlines()[0][:200]}") from error
    exact = [np.asarray(part, np.float64) for part in (q, k, v, slope)]
    expected = _attended(exact, _sees(segments, parents))
    worst = 0.0
    for name, ours, truth in zip(("output", "gradient of q", "gradient of k", "gradient of v"), found, expected, strict=True):
        off = _off(ours, truth)
        if not off <= TOLERANCE:
            raise UserError(f"attention by {backend}: its {name} is off float64 by {off:.3g}; {TOLERANCE} is allowed")
        worst = max(worst, off)
    return worst


def check_nf4(folder: str) -> float:
    """Bytes, dequantized weight and product of a weight that bitsandbytes quantized; the product's error.

    Raises:
        UserError: one of them is another.
    """
    left = ModelDirectory(folder)
    theirs, device = read_packed(left, "packed"), left.config["device"]
    weight, x = (jnp.asarray(left.read(name), jnp.bfloat16) for name in ("weight", "x"))
    packed = np.asarray(jax.jit(type(theirs).quantize)(weight).packed)
    if differ := int((packed != theirs.packed).sum()):
        raise UserError(f"NF4: {differ} of {packed.size} bytes are not bitsandbytes' ({device}); none may differ")
    dense = np.asarray(jax.jit(QuantizedWeight.dequantize, static_argnums=1)(theirs, jnp.bfloat16), np.float32)
    if differ := int((dense != left.read("dequantized")).sum()):
        raise UserError(f"NF4: {differ} of {dense.size} dequantized weights are not bitsandbytes' ({device})")
    truth = left.read("x").astype(np.float64) @ dense.astype(np.float64).T
    ours = np.asarray(jax.jit(nf4_matmul)(x, theirs), np.float64)
    for who, product in (("JAX", ours), ("bitsandbytes", left.read("product"))):
        off = _off(product, truth)
        if not off <= TOLERANCE:
            raise UserError(f"NF4: the product of {who} is off float64 by {off:.3g}; {TOLERANCE} is allowed")
    return _off(ours, truth)


def _off(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest error, relative to the largest value."""
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def _sees(segments: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """[b, s, s]: a token's own segment and its parent's, up to itself."""
    keys = segments[:, None, :]
    seen = (segments[:, :, None] == keys) | ((parents[:, :, None] == keys) & (parents[:, :, None] != 0))
    return seen & np.tri(segments.shape[1], dtype=bool)


def _attended(given: Sequence[np.ndarray], sees: np.ndarray) -> tuple[np.ndarray, ...]:
    """Output and gradients, of q, k, v and the slope of the output.

    P = softmax(QKᵀ/√x), O = PV; dV = PᵀdO, dS = P ∘ (dOVᵀ − rowsum(dO ∘ O)), dQ = dS K/√x, dK = dSᵀ Q/√x.
    """
    q, k, v, slope = (np.moveaxis(part, 2, 1) for part in given)
    share, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    k, v = k.repeat(share, 1), v.repeat(share, 1)
    scores = np.where(sees[:, None], q @ k.swapaxes(-1, -2) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    ds = weights * (slope @ v.swapaxes(-1, -2) - (slope * out).sum(-1, keepdims=True)) * scale
    of_k, of_v = (
        part.reshape(len(q), -1, share, *part.shape[2:]).sum(2)
        for part in (ds.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ slope)
    )
    return tuple(np.moveaxis(part, 1, 2) for part in (out, ds @ k, of_k, of_v))


if __name__ == "__main__":
    sys.exit(serve({"check": check}, sys.argv[1:]))
