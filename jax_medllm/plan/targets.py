"""Devices to compile for that are not there: libtpu's topologies, XLA's description of a GPU, the CPU's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from medllm.errors import UserError

READABLE: Mapping[str, dict[str, Any]] = {"tpu": {"xla_tpu_offload_gather_to_sparsecore": False}}
"""Options of a platform's compiler under which jaxlib can read what it has compiled. The sparse core of a v5p or v6e looks
the embedding up in a way that jaxlib 0.10.2 has no text for; it is planned for the main core, as on chips that have no other.
Memory is the same."""

_CUDNN = 91000


def devices_of(target: Mapping[str, Any]) -> list[Any]:
    """The devices of a target, in the order of a mesh.

    Args:
        target: ``kind`` (``tpu``, ``cuda`` or ``cpu``), ``topology`` and ``count``; of a GPU also ``description``, XLA's
            ``GpuTargetConfigProto`` as text.

    Raises:
        UserError: the compiler knows no such topology.
    """
    kind, topology = target["kind"], target["topology"]
    if kind == "cpu":
        return list(jax.devices("cpu"))
    arguments = {"platform": kind, "topology_name": topology}
    if topology.startswith("v4:"):
        arguments["chip_config_name"] = "megacore"  # a chip's two cores are one device there, as on those that came after
    if kind == "cuda":
        # JAX asks the cuDNN that is loaded for its version before it calls its attention; the one planned for is in its place.
        fused_attention_stablehlo.check_cudnn_version = lambda: _CUDNN
        arguments |= {"topology_name": "", "target_config": target["description"], "topology": topology}
    try:
        devices = topologies.get_topology_desc(**arguments).devices
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--target {target['name']}: the compiler knows no such topology ({reason[:200]})") from error
    assert len(devices) == target["count"], (len(devices), target)
    return list(devices)
