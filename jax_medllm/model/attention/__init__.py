"""Attention within a row: one contract, whatever computes it.

Which key a query may see is said with small integer arrays, not with a dense mask, so that a backend which needs segment ids
and one which needs a mask are called alike.

==========  =============================  =======================================================================
backend     taken for                      what it is
==========  =============================  =======================================================================
``pallas``  TPU, but for float64           our flash kernel: :mod:`jax_medllm.model.attention.pallas`
``cudnn``   NVIDIA from Ampere on, bf16    cuDNN's flash kernel: :mod:`jax_medllm.model.attention.cudnn`
            and fp16
``xla``     everything else                tiles of the scores, in plain XLA: :mod:`jax_medllm.model.attention.xla`
==========  =============================  =======================================================================

The backend is taken when a function is traced: for the devices of the layout in use (:mod:`jax_medllm.mesh.layout`) or of the
mesh (``jax.set_mesh``), which need not be there, else for the default device. A sliding window that is shorter than the row is
known to ``xla`` alone. ``with using("xla"):`` takes one by name; compiled functions know under which they were traced.

On a mesh every device attends its own rows and heads, and of a row that several hold an equal share, to keys and values that
come from all of them (:mod:`jax_medllm.model.attention.shares`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, get_args

import jax
from jaxtyping import Array, Float

from jax_medllm.mesh.layout import Layout, in_use
from jax_medllm.mesh.pytree import Leaf
from jax_medllm.model.attention import cudnn, pallas, xla
from jax_medllm.model.attention.shares import attend_share
from jax_medllm.model.attention.visibility import Visibility, Window
from jax_medllm.model.attention.xla import matmul_precision
from medllm.errors import UserError

__all__ = ["Backend", "Visibility", "Window", "attend", "backend_for", "matmul_precision", "using"]

Backend = Literal["xla", "cudnn", "pallas"]
_BACKENDS = {"xla": xla, "cudnn": cudnn, "pallas": pallas}
_ASKED_FOR = jax.make_user_context(default_value=None)


def attend(
    q: Float[Array, "b s h x"], k: Float[Array, "b s k x"], v: Float[Array, "b s k x"], visible: Visibility
) -> Float[Array, "b s h x"]:
    """Scaled dot-product attention with grouped key/value heads; softmax in fp32 (float64 for float64 inputs).

    Query head i reads key/value head ``i // (h / k)``; keys and values are never repeated in memory, nor do all scores of a
    row exist at a time. What padding sees, and with it its output, is finite and means nothing.

    Raises:
        UserError: the backend that :func:`using` asks for cannot take these queries.
    """
    layout = in_use()
    if layout is None:
        return _BACKENDS[backend_for(q, visible)].attend(q, k, v, visible)
    return _attend_on_mesh(layout, q, k, v, visible)


def _attend_on_mesh(layout: Layout, q: Array, k: Array, v: Array, visible: Visibility) -> Array:
    queries = layout.activation(q.shape, ("batch", "sequence", "heads", None))
    keys = layout.activation(k.shape, ("batch", None, "kv_heads", None))
    rows = layout.activation(visible.segments.shape, ("batch", None))

    def local(q: Array, k: Array, v: Array, visible: Visibility) -> Array:
        backend = _BACKENDS[backend_for(q, visible)]
        if queries[1] is None:
            return backend.attend(q, k, v, visible)
        return attend_share(backend.attend, q, k, v, visible, queries[1])

    specs = (queries, keys, keys, jax.tree.map(lambda _: rows, visible))
    # Kernels do not say over which mesh axes their results vary.
    return jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, visible)


def using(backend: Backend | None) -> AbstractContextManager[None]:
    """Attention by ``backend`` in what is traced within; None chooses by device, as without.

    Raises:
        UserError: no backend has that name.
    """
    if backend not in (None, *get_args(Backend)):
        raise UserError(f"no attention backend is called {backend!r}; there are {', '.join(get_args(Backend))}")
    return _ASKED_FOR(backend)


def backend_for(q: Float[Leaf, "b s h x"], visible: Visibility | None = None) -> Backend:
    """The backend that attends these queries, or what has their shape and type, to what is visible (None: no window).

    Raises:
        UserError: it is the one that :func:`using` asks for, and it cannot.
    """
    asked_for: Backend | None = _ASKED_FOR.value
    if asked_for is None:
        fastest = _fastest()
        return "xla" if _refusal(fastest, q, visible) else fastest
    if reason := _refusal(asked_for, q, visible):
        raise UserError(f"the attention backend {asked_for} was asked for and cannot: {reason}; leave the choice to the device")
    return asked_for


def _refusal(backend: Backend, q: Float[Leaf, "b s h x"], visible: Visibility | None) -> str | None:
    if backend != "xla" and visible is not None and visible.window is not None:
        return "the row is longer than the model's sliding window, which it does not know"
    return _BACKENDS[backend].refusal(q)


def _fastest() -> Backend:
    """The fastest backend on the device that is traced for."""
    mesh = jax.sharding.get_abstract_mesh()
    device = jax.devices()[0] if mesh.empty or mesh.abstract_device is None else mesh.abstract_device
    if device.platform == "tpu":
        return "pallas"
    ampere = float(getattr(device, "compute_capability", 8)) >= 8
    return "cudnn" if "NVIDIA" in device.device_kind and ampere else "xla"
