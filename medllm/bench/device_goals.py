"""What follows from what ``scripts/gpu_bench.sh`` measured: rates, shares of the device's own, whether they meet the goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medllm.bench.arithmetic import cpt_step, decode_bytes, grouped_step, paired_step, training_flops
from medllm.bench.device_shapes import PAIRS, RESPONSES, DeviceShape
from medllm.errors import UserError
from medllm.plan.calibration import Calibration, Work

UNITS = {"cpt": "tokens/s", "rpo": "problems/s", "decode": "tokens/s"}
_GIB = 2**30


@dataclass(frozen=True)
class Goal:
    """What is aimed at.

    Attributes:
        bound: The figure.
        at_most: It is a ceiling; else a floor.
        device: What the name of the device must have in it for the goal to be one; any where empty.
        anchor: What others publish.
    """

    bound: float
    at_most: bool = False
    device: str = ""
    anchor: str = ""


GOALS: Mapping[str, Goal] = {
    "7B cpt": Goal(14_500, device="H100", anchor="NeMo Automodel publishes 14,110 (423 TFLOP/s)"),
    "72B NF4 cpt": Goal(
        1_150, device="H100", anchor="1,092 a GPU for a 70B bf16 LoRA on 8 x H100; 505 on an A100 for QLoRA-70B, fused kernels"
    ),
    "rpo": Goal(3.0, anchor="prefix sharing in torch gives 1.1-1.6"),
    "decode": Goal(0.6),
    "peak": Goal(0.9, at_most=True),
    "plan memory": Goal(0.03, at_most=True),
    "plan time": Goal(0.10, at_most=True),
}


def judge(found: dict[str, Any], shape: DeviceShape, device: Mapping[str, Any], *, strict: bool = True) -> None:
    """Add to what a part measured what follows from it: the step at the model's own depth, its rate, its share of the device.

    The share of a training step is of operations that it needs, none of them computed again: two engines that recompute
    differently are compared by it. Where this is not ``strict``, noise may make a deeper model the faster one.
    """
    if found["part"] == "calibrate":
        return
    if found["part"] != "decode":
        found |= at_depth(found["depths"], shape.model.layers, strict)
    found["rate"], found["unit"] = found["units"] / found["step_s"], UNITS[found["part"]]
    if found["part"] == "decode":
        found["bytes"] = decode_bytes(shape.model, shape.decode_rows, shape.decode_tokens)
        found["share"] = found["bytes"] / found["step_s"] / device["copy_bytes"]
        return
    if found["part"] == "cpt":
        step = cpt_step(shape.rows, shape.length)
    elif found["engine"] == "jax":
        step = grouped_step(shape.prompt, shape.response, RESPONSES)
    else:
        step = paired_step(shape.prompt, shape.response, round(found["units"] * len(PAIRS)))
        step = replace(step, reference=found.get("reference", True))
    found["flops"] = training_flops(shape.model, step, "none")
    found["share"] = found["flops"] / found["step_s"] / device["matrix_flops"]


def at_depth(depths: Sequence[Mapping[str, Any]], layers: int, strict: bool = True) -> dict[str, Any]:
    """Seconds of a step with so many layers, on the straight line through what was measured; ``extrapolated`` where it was not
    itself.

    Raises:
        RuntimeError: the deeper model was no slower, so that there is nothing to go by.
    """
    last = depths[-1]
    if last["layers"] == layers:
        return {"step_s": last["step_s"], "steps_s": last["steps_s"], "extrapolated": False}
    first = depths[0]
    slope = (last["step_s"] - first["step_s"]) / (last["layers"] - first["layers"])
    if strict and slope <= 0:
        raise RuntimeError(f"{last['layers']} layers took no longer than {first['layers']}: nothing to extrapolate from")
    step = last["step_s"] + max(0.0, slope) * (layers - last["layers"])
    return {"step_s": step, "steps_s": last["steps_s"], "extrapolated": True}


def hold_plans(parts: Sequence[dict[str, Any]], on_host: bool) -> None:
    """Set beside what each JAX training step took what its plan said: ``plan`` gets ``memory_error``, and where its layers were
    calibrated, ``step_s``, ``measured_s`` and ``time_error``; errors relative to what was measured.

    Args:
        parts: All that ran.
        on_host: The peak is of a process and no device's, and is not compared.
    """
    probed = {found["model"]: found for found in parts if found["part"] == "calibrate" and found["ok"]}
    for found in parts:
        if not (found["ok"] and found.get("plan")):
            continue
        plan = found["plan"]
        if not on_host:
            plan["memory_error"] = plan["gib"] * _GIB / found["peak_bytes"] - 1
        if found["part"] != "cpt" or found["model"] not in probed or plan["bytes"] is None:
            continue
        try:
            plan["step_s"] = _predicted(probed[found["model"]], plan)
        except UserError as error:
            plan["not_predicted"] = str(error)
            continue
        plan["measured_s"] = found["depths"][-1]["step_s"]
        plan["time_error"] = plan["step_s"] / plan["measured_s"] - 1


def _predicted(probed: Mapping[str, Any], plan: Mapping[str, Any]) -> float:
    calibration = Calibration.of_probe(
        probed, device="here", hardware="here", stage="cpt", model=probed["model"], settings={"quantization": ""}
    )
    one = Work(plan["layers"], plan["flops"], plan["bytes"])
    shallow, deep = calibration.shallow.work, calibration.deep.work
    return calibration.predict(one, deep if one.layers == shallow.layers else shallow).step_s


def targets(parts: Sequence[dict[str, Any]], device: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal of the parts that were tried, with what was found (None where it was not measured) and whether that meets it.

    A goal of another device than this one is not judged, and says so.
    """
    tried = {(found["model"], found["part"], found["engine"]): found for found in parts if found["model"]}
    ran = {key: found for key, found in tried.items() if found["ok"]}
    lines: list[dict[str, Any]] = []

    def add(text: str, name: str, found: float | None) -> None:
        goal = GOALS[name]
        elsewhere = bool(goal.device) and goal.device not in device["name"]
        met = None if found is None or elsewhere else (found <= goal.bound if goal.at_most else found >= goal.bound)
        note = f"a goal of an {goal.device}: not judged" if elsewhere else ""
        figures = {"at_most": goal.at_most, "bound": goal.bound, "found": found, "met": met}
        lines.append({"target": text, **figures, "anchor": goal.anchor, "note": note})

    def ratio(model: str, part: str, figure: str) -> float | None:
        ours, theirs = (ran.get((model, part, engine)) for engine in ("jax", "torch"))
        return ours[figure] / theirs[figure] if ours and theirs else None

    for model, part in dict.fromkeys((model, part) for model, part, _ in tried):
        ours = ran.get((model, part, "jax"), {})
        if part == "decode":
            add(f"{model} decode: share of the copy bandwidth", "decode", ours.get("share"))
        if part not in ("cpt", "rpo"):
            continue
        if f"{model} {part}" in GOALS:
            by_depth = " by depth" if ours.get("extrapolated") else ""
            add(f"{model} {part}: tokens/s{by_depth}", f"{model} {part}", ours.get("rate"))
        if part == "rpo":
            add(f"{model} rpo: problems/s, JAX over the best torch", "rpo", ratio(model, part, "rate"))
        add(f"{model} {part}: peak memory, JAX over torch", "peak", ratio(model, part, "peak_bytes"))
        plan = ours.get("plan") or {}
        add(f"{model} {part}: memory, plan against run, off by", "plan memory", _size(plan.get("memory_error")))
        if (model, "calibrate", "jax") in tried and part == "cpt":
            add(f"{model} {part}: time, plan after calibration against run, off by", "plan time", _size(plan.get("time_error")))
    return lines


def _size(error: float | None) -> float | None:
    return None if error is None else abs(error)
