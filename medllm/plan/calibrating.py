"""``medllm plan --calibrate FILE``: runs the probe on the device that is here, and writes what it found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from medllm.architecture import Architecture
from medllm.engines import module_of, require_engine
from medllm.errors import UserError
from medllm.host.child import run_in_child
from medllm.plan.calibration import Calibration
from medllm.plan.models import planned_model
from medllm.plan.planning import check_context
from medllm.plan.request import Request
from medllm.plan.targets import DEVICES, Target
from medllm.run import this_machine, write_json

LIMIT = 180.0
"""Seconds a probe may take."""
_SHARE_TIMED = 0.4
_TPUS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}


def calibrate(request: Request, file: Path) -> dict[str, Any]:
    """Measure two layers and four of the request's model, in a process of its own, and write ``file``.

    Returns:
        What was written.

    Raises:
        UserError: the stage is none that trains, there is no such device here, the probe was not done in time, or ``file``
            cannot be written.
    """
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UserError(f"--calibrate {file}: no file can be written there; name a file in a folder that exists")
    if request.stage == "generate":
        raise UserError("--calibrate runs training steps, and --stage generate is none; calibrate cpt or rpo")
    require_engine("jax", "medllm plan --calibrate")
    target = Target.parse(request.target) if request.target else None
    if target is not None and target.count > 1:
        raise UserError(f"--calibrate runs on one device, and --target {target.name} has {target.count}; name one")
    model, settings = planned_model(request.model), request.settings()
    check_context(request, model)
    found = _probed(request, target, model)
    device = device_name(found["device"])
    if device is None or (target is not None and device != target.device.name):
        asked = target.device.name if target else "a device that can be planned for"
        raise UserError(f"{asked} is asked for, and here is {found['device']['name']}; there are {', '.join(DEVICES)}")
    calibration = Calibration.of_probe(
        found,
        device=device,
        hardware=hardware_name(found["device"]),
        stage=request.stage,
        model=request.model,
        settings=settings,
    )
    written = {**calibration.to_json(), "products": found["products"], "probes": found["probes"]}
    write_json(file, written)
    return {"ok": True, **written}


def device_name(found: dict[str, Any]) -> str | None:
    """What ``--target`` calls a device of this ``kind`` and ``name``; None where it does not know it."""
    if found["kind"] == "cpu":
        return "cpu"
    gpus = {device.gpu.description: name for name, device in DEVICES.items() if device.gpu}
    return gpus.get(found["name"]) or _TPUS.get(found["name"])


def hardware_name(found: dict[str, Any]) -> str:
    """What a device calls itself; of a CPU its processor and how many cores this process has."""
    return this_machine() if found["kind"] == "cpu" else found["name"]


def calibration_lines(written: dict[str, Any], file: Path) -> Iterator[str]:
    """What was found, as text."""
    derived, probes = written["derived"], written["probes"]
    settings = ", ".join(f"{name} {value}" for name, value in written["settings"].items())
    yield f"calibrated {written['device']} ({written['hardware']}): {written['model']} {written['stage']}: {settings}"
    yield (
        f"  products in a step's layouts {written['matrix_flops'] / 1e12:.3g} TFLOP/s, "
        f"copy {written['copy_bytes'] / 1e9:.3g} GB/s"
    )
    for probe in probes:
        roofline = max(probe["flops"] / written["matrix_flops"], probe["bytes"] / written["copy_bytes"])
        yield f"  {probe['layers']} layers   {probe['step_s']:8.4f} s a step, roofline at these rates {roofline:.4f} s"
    for what, of in (("a layer", "layer"), ("the rest", "rest")):
        yield f"  {what:<10} {derived[f'{of}_s']:8.4f} s, {derived[f'{of}_factor']:.3g} x its roofline"
    yield f"calibration: {file}; medllm plan --target {written['device']} --calibration {file} predicts with it"


def _probed(request: Request, target: Target | None, model: Architecture) -> dict[str, Any]:
    variables = dict(os.environ)
    if target is not None and target.device.kind == "cpu":
        variables["JAX_PLATFORMS"] = "cpu"
    settings = {
        "stage": request.stage,
        "settings": {**replace(request, accumulation=1).settings(), "model": model.to_hf()},
        "kind": target.device.kind if target else None,
        "seconds": LIMIT * _SHARE_TIMED,
    }
    try:
        return run_in_child(module_of("jax", "plan"), "probe", settings, timeout=LIMIT, environment=variables)
    except RuntimeError as error:
        if "not done after" not in str(error):
            raise
        raise UserError(f"the probe was {error}; give it less to do: --rows, --length, or a smaller --model") from None
