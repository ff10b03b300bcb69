"""What follows from what ``scripts/gpu_bench.sh`` measured: rates, shares of the device's own, whether they meet the goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medllm.bench.arithmetic import cpt_step, decode_bytes, grouped_step, paired_step, training_flops
from medllm.bench.device_result import Target
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


def judged(
    found: Mapping[str, Any], shape: DeviceShape, device: Mapping[str, Any], *, strict: bool = True
) -> Mapping[str, Any]:
    """What a part measured, and what follows from it: the step at the model's own depth, its rate, its share of the device.

    The share of a training step is of operations that it needs, none of them computed again: two engines that recompute
    differently are compared by it. Where this is not ``strict``, noise may make a deeper model the faster one.
    """
    if found["part"] == "calibrate":
        return found
    if found["part"] != "decode":
        found = {**found, **at_depth(found["depths"], shape.model.layers, strict)}
    found = {**found, "rate": found["units"] / found["step_s"], "unit": UNITS[found["part"]]}
    if found["part"] == "decode":
        moved = decode_bytes(shape.model, shape.decode_rows, shape.decode_tokens)
        return {**found, "bytes": moved, "share": moved / found["step_s"] / device["copy_bytes"]}
    if found["part"] == "cpt":
        step = cpt_step(shape.rows, shape.length)
    elif found["engine"] == "jax":
        step = grouped_step(shape.prompt, shape.response, RESPONSES)
    else:
        step = paired_step(shape.prompt, shape.response, round(found["units"] * len(PAIRS)))
        step = replace(step, reference=found.get("reference", True))
    flops = training_flops(shape.model, step, "none")
    return {**found, "flops": flops, "share": flops / found["step_s"] / device["matrix_flops"]}


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


def beside_plans(parts: Sequence[Mapping[str, Any]], on_host: bool) -> tuple[Mapping[str, Any], ...]:
    """The parts, with what each JAX training step took beside what its plan said: ``plan`` has ``memory_error``, and where its
    layers were calibrated, ``step_s``, ``measured_s`` and ``time_error``; errors relative to what was measured.

    Args:
        parts: All that ran.
        on_host: The peak is of a process and no device's, and is not compared.
    """
    probed = {found["model"]: found for found in parts if found["part"] == "calibrate" and found["ok"]}
    planned = (found["ok"] and found.get("plan") for found in parts)
    return tuple(
        {**found, "plan": {**plan, **_memory(found, on_host), **_time(found, probed)}} if plan else found
        for found, plan in zip(parts, planned, strict=True)
    )


def _memory(found: Mapping[str, Any], on_host: bool) -> dict[str, Any]:
    return {} if on_host else {"memory_error": found["plan"]["gib"] * _GIB / found["peak_bytes"] - 1}


def _time(found: Mapping[str, Any], probed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The step that a calibrated plan predicts and the one that was measured, or why there is no prediction."""
    plan = found["plan"]
    if found["part"] != "cpt" or found["model"] not in probed or plan["bytes"] is None:
        return {}
    try:
        step = _predicted(probed[found["model"]], plan)
    except UserError as error:
        return {"not_predicted": str(error)}
    measured = found["depths"][-1]["step_s"]
    return {"step_s": step, "measured_s": measured, "time_error": step / measured - 1}


def _predicted(probed: Mapping[str, Any], plan: Mapping[str, Any]) -> float:
    calibration = Calibration.of_probe(
        probed, device="here", hardware="here", stage="cpt", model=probed["model"], settings={"quantization": ""}
    )
    one = Work(plan["layers"], plan["flops"], plan["bytes"])
    shallow, deep = calibration.shallow.work, calibration.deep.work
    return calibration.predict(one, deep if one.layers == shallow.layers else shallow).step_s


def targets(parts: Sequence[Mapping[str, Any]], device: Mapping[str, Any]) -> tuple[Target, ...]:
    """Each goal of the parts that were tried, with what was found (None where it was not measured) and whether that meets it.

    A goal of another device than this one is not judged, and says so.
    """
    tried = {(found["model"], found["part"], found["engine"]): found for found in parts if found["model"]}
    ran = {key: found for key, found in tried.items() if found["ok"]}
    lines: list[Target] = []

    def add(text: str, name: str, found: float | None) -> None:
        goal = GOALS[name]
        elsewhere = bool(goal.device) and goal.device not in device["name"]
        met = None if found is None or elsewhere else (found <= goal.bound if goal.at_most else found >= goal.bound)
        note = f"a goal of an {goal.device}: not judged" if elsewhere else ""
        lines.append(Target(text, goal.at_most, goal.bound, found, met, goal.anchor, note))

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
    return tuple(lines)


def _size(error: float | None) -> float | None:
    return None if error is None else abs(error)
