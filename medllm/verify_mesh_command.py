"""``medllm verify-mesh``: its arguments, and what it prints."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentParser

from medllm.command import Command, say
from medllm.config import RematPolicy
from medllm.host.progress import progress_bar
from medllm.plan.request import Held

_SHOWN = 10


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=str, required=True, help="a name (qwen2.5-72b), or a model folder; it is made narrow")
    parser.add_argument("--stage", type=Literal["cpt", "rpo"], default="cpt", help="whose step")
    parser.add_argument("--target", type=str, required=True, help="whose compiler: a100-80g:4, v5e:4x4, cpu:8")
    parser.add_argument("--mesh", type=str, default="", help="devices along each axis: fsdp=8,tensor=2; unset: fsdp over all")
    parser.add_argument("--rules", type=str, default="", help="mesh axes that an axis of the arrays is spread over, if others")
    parser.add_argument("--quantization", type=Held, default="nf4", help="how the base weights are held")
    parser.add_argument("--remat", type=RematPolicy, default="layer", help="what is kept for the backward pass")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")


def _verify(values: Any) -> dict[str, Any]:
    from medllm.plan.mesh_check import request_of, verify_mesh
    from medllm.plan.wording import mesh_words

    with progress_bar("verify-mesh") as progress:
        certificate = verify_mesh(request_of(values), progress)
    found = certificate.to_json()
    refuted, count = certificate.refuted, len(certificate.arrays)
    say(
        f"a narrow {values.model} {certificate.stage} step on {certificate.target}, mesh {mesh_words(certificate.mesh)}, as "
        f"its compiler cuts it: {sum(certificate.reductions.values())} reductions, on {certificate.devices} parts of this CPU"
    )
    for one in refuted[:_SHOWN]:
        say(f"  {one.program} {one.name}: {one.error:.1e} from one device, {one.apart:.1e} between devices that hold the same")
    if refuted:
        say(f"verify-mesh: REFUTED: {len(refuted)} of {count} results are not those of one device")
    else:
        say(f"verify-mesh: proved: all {count} results are those of one device to {found['worst']:.1e} of their largest value")
    return found


VERIFY_MESH = Command("run a step over a mesh, as the target's compiler cuts it, against one device", _arguments, _verify)
