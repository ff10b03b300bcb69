"""A plan: what a stage takes on devices that need not be there."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from medllm.architecture import Architecture
from medllm.engines import module_of
from medllm.errors import UserError
from medllm.host.child import run_in_child
from medllm.host.installation import require
from medllm.host.progress import Progress
from medllm.plan.calibration import Calibration, Work
from medllm.plan.models import dense_layers, planned_model
from medllm.plan.plan import Plan, Predicted
from medllm.plan.request import Request
from medllm.plan.targets import Target
from medllm.run import this_machine

_COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax_plugins.xla_cuda12", "jax_cuda12_plugin", "nvidia.cuda_nvcc"), "cpu": ()}
_SHALLOW = (2, 3)
"""Layers of the model that a plan is held against to see what a layer takes; the second where it has as many as the first."""


def make_plan(request: Request, calibration: Calibration | None = None, progress: Progress | None = None) -> Plan:
    """Compile the stage's programs for the target and say what they take.

    Args:
        request: What is planned.
        calibration: Of the target's device: the plan then has ``predicted``, the time that a step takes.
        progress: Called with (programs compiled, programs in all, the one that is compiled next).

    Raises:
        UserError: an unknown model, device or mesh, arrays that the mesh does not divide, a compiler is not installed, or the
            calibration is of something else.
        RuntimeError: the compiler failed.
    """
    target, model = Target.parse(request.planned_for), planned_model(request.model)
    check_installed(target)
    check_context(request, model)
    if calibration is not None:
        hardware = this_machine() if target.device.kind == "cpu" else None
        calibration.check(target.device.name, target.count, request.stage, request.quantization, hardware)
    plan = Plan(request, target, model, _compiled(request, target, model, progress))
    if calibration is None or plan.refused:
        return plan
    return replace(plan, predicted=_predicted(plan, calibration, progress))


def _compiled(request: Request, target: Target, model: Architecture, progress: Progress | None) -> dict[str, Any]:
    def told(done: int, total: int, doing: str = "") -> None:
        if progress:
            progress(done, total, f"compiling {doing} ({done + 1} of {total}) for {target.name}")

    layers = range(model.num_layers)
    dense = {kind: [one for one in numbers if one in layers] for kind, numbers in dense_layers(request.model).items()}
    return run_in_child(
        module_of("jax", "plan"),
        "compile",
        {
            "target": target.to_json(),
            "mesh": request.mesh or default_mesh(request, target, model),
            "rules": request.rules,
            "stage": request.stage,
            "settings": {**request.settings(), "model": model.to_hf(), "dense": dense},
        },
        environment=compiling_environment(target),
        progress=told,
    )


def _predicted(plan: Plan, calibration: Calibration, progress: Progress | None) -> Predicted:
    """The time of a step by a calibration: its work at two depths says what is a layer's and what is not."""
    layers, found = plan.model.num_layers, plan.compiled
    shallow = next(depth for depth in _SHALLOW if depth != layers)
    other = _compiled(plan.request, plan.target, replace(plan.model, num_layers=shallow), progress)
    if not other.get("by_kind") or "bytes" not in other or "bytes" not in found:
        raise UserError("a calibration needs the memory traffic of a step, and this JAX cannot read the compiled program")
    step = calibration.predict(
        Work(layers, found["flops"], found["bytes"]),
        Work(shallow, other["flops"], other["bytes"]),
        plan.seconds["interconnect"],
    )
    return Predicted(step, calibration)


def default_mesh(request: Request, target: Target, model: Architecture) -> str:
    """``fsdp`` over all devices for training; for generation ``tensor`` as far as there are key/value heads."""
    if request.stage != "generate":
        return f"fsdp={target.count}"
    tensor = math.gcd(target.count, model.num_kv_heads)
    return f"tensor={tensor},fsdp={target.count // tensor}"


def check_context(request: Request, model: Architecture) -> None:
    """Refuse texts that the model has no positions for, as the stages do.

    Raises:
        UserError: says how many it has.
    """
    longest, most = request.text_length(), model.max_positions
    if longest > most:
        raise UserError(f"a text of {longest} tokens is asked for, and {request.model} has a context of {most}; shorten it")


def check_installed(target: Target) -> None:
    """Refuse a target whose compiler is missing.

    Raises:
        UserError: with the install command.
    """
    require(f"medllm plan --target {target.name}", "jax", "plan")
    for package in _COMPILERS[target.device.kind]:
        require(f"medllm plan --target {target.name}", package, "plan")


def compiling_environment(target: Target, partitioned: Path | None = None) -> dict[str, str]:
    """Of the compiling process. It runs nothing on a device, so it must not look for one.

    With ``partitioned``, partitioned programs are written to that folder, and the process has as many CPU devices as the
    target.
    """
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    kind, flags = target.device.kind, []
    if kind == "tpu":
        variables |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if kind == "cuda":
        spec = importlib.util.find_spec("nvidia.cuda_nvcc")
        assert spec is not None  # as check_installed found
        folder = next(iter(spec.submodule_search_locations or ()))
        variables["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        flags.append(f"--xla_gpu_cuda_data_dir={folder}")
    if kind == "cpu" or partitioned is not None:
        flags.append(f"--xla_force_host_platform_device_count={target.count}")
    if partitioned is not None:
        dumped = {"to": partitioned, "hlo_pass_re": ".*spmd-partitioning", "hlo_as_text": "true", "large_constants": "true"}
        flags += [f"--xla_dump_{name}={value}" for name, value in dumped.items()]
    return variables | ({"XLA_FLAGS": " ".join(flags)} if flags else {})
