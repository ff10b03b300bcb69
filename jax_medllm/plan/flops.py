"""Operations of a traced function: its matrix products, counted with the trip counts of its loops."""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def matrix_flops(jaxpr: Jaxpr | ClosedJaxpr, while_trips: int = 1) -> int:
    """Floating-point operations of all matrix products, two for each multiply and add, over all devices.

    XLA's own analysis counts the body of a scanned layer once. Here a scan counts as often as it is run, the kernel of a
    Pallas call once for each point of its grid, what runs on each device of a mesh as often as there are devices, and the
    branches of a choice that have products as if each were taken equally often: they are, where devices share a row's queries.

    Args:
        jaxpr: What was traced.
        while_trips: Rounds of a loop whose end depends on what is computed.
    """
    return sum(_equation(equation, while_trips) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation(equation: Any, while_trips: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if "dot_product_attention" in name:
        return _attention(equation, backward="bwd" in name)
    inner = [matrix_flops(value, while_trips) for value in _jaxprs(params)]
    if name == "cond":
        products = [count for count in inner if count]
        return sum(products) // max(1, len(products))
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "while":
        times = while_trips
    elif name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    return times * sum(inner)


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """The functions an equation calls; not those that say how to differentiate it."""
    found = []
    for key, value in params.items():
        if "fwd" in key or "bwd" in key or "jvp" in key:
            continue
        found += [
            one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, Jaxpr | ClosedJaxpr)
        ]
    return found


def _attention(equation: Any, backward: bool) -> int:
    """cuDNN's fused attention: two products forward, five backward, of queries [b, s, h, x] with keys [b, t, k, x]."""
    batch, queries, heads, width = equation.invars[0].aval.shape
    keys = equation.invars[1].aval.shape[1]
    return (5 if backward else 2) * 2 * batch * heads * queries * keys * width
