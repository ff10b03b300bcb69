"""The table that ``scripts/gpu_bench.sh`` ends with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medllm.bench.device_result import DeviceResult, Target
from medllm.bench.device_shapes import PAIRS, RESPONSES, DeviceShape

_OTHERS = ("preflight", "rates", "parity", "calibrate")


def table(result: DeviceResult) -> list[str]:
    """The result of a device that was measured, as lines of text."""
    device = result.device
    assert device is not None
    memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if device["memory_bytes"] else ""
    lines = [
        f"{device['name']}{memory}: bf16 matrix rate {device['matrix_flops'] / 1e12:.4g} TFLOP/s "
        f"({device['matrix_flops_by']}), copy {device['copy_bytes'] / 1e9:.4g} GB/s ({device['copy_bytes_by']})"
    ]
    lines += [_work(part, shape) for part, shape in result.shapes]
    lines.append("Share: of the matrix rate, by the operations a step needs, none counted twice; of decode, of the copy rate.")
    rows = [("model", "part", "engine", "rate", "step", "share", "peak GiB", "compile", "steps")]
    lines += _aligned(rows + [_row(found) for found in result.parts if found["part"] not in _OTHERS])
    for found in result.parts:
        lines += _ways(found)
    lines += [line for found in result.parts if found.get("plan") for line in _plan(found)]
    for part in ("parity", "calibrate", "rates"):
        lines += [
            f"{' '.join(filter(None, (found['model'], part, found['engine'])))}: {outcome(found)}"
            for found in result.parts
            if found["part"] == part
        ]
    lines += [_goal(one) for one in result.targets]
    remarks = [", tiny shapes on the CPU"] * result.smoke + [", stopped early"] * result.stopped
    return [*lines, f"gpu_bench: {result.seconds:.0f} s{''.join(remarks)}"]


def outcome(found: Mapping[str, Any]) -> str:
    """What came of a part, in a few words."""
    if not found["ok"]:
        return f"failed: {found['error']}"
    if found["part"] == "parity":
        return found["tests"]
    if found["part"] == "rates":
        return f"{found['matrix_flops'] / 1e12:.4g} TFLOP/s, {found['copy_bytes'] / 1e9:.4g} GB/s, {found['device']}"
    if found["part"] == "calibrate":
        steps = ", ".join(f"{probe['layers']} layers {probe['step_s']:.4g} s" for probe in found["probes"])
        return f"{steps}; {found['matrix_flops'] / 1e12:.4g} TFLOP/s in the products of a layer"
    return f"{_rate(found)}, {_share(found)}, compiled in {found['compile_s']:.0f} s"


def _goal(one: Target) -> str:
    """A goal, and what came of it."""
    found = "not measured" if one.found is None else f"{one.found:,.{0 if one.found >= 100 else 3}f}"
    verdict = {True: "met", False: "MISSED", None: one.note or "-"}[one.met]
    anchor = f"; {one.anchor}" if one.anchor else ""
    return f"{one.target}: {found} (goal {'<=' if one.at_most else '>='} {one.bound:,g}{anchor}) {verdict}"


def _work(part: str, work: DeviceShape) -> str:
    """A line on what was run."""
    model = work.model
    by_depth = f" extrapolated from {' and '.join(map(str, work.depths))} to" if work.depths and part in ("cpt", "rpo") else ""
    does = {
        "cpt": f"{work.rows} x {work.length} tokens",
        "calibrate": f"{work.rows} x {work.length} tokens, a few layers",
        "rpo": f"prompt {work.prompt}, {RESPONSES} responses of {work.response}, {len(PAIRS)} pairs",
        "decode": f"{work.decode_rows} rows at {work.decode_tokens} tokens",
    }[part]
    held = model.dtype if model.quantization == "none" else model.quantization.upper()
    keeps = "" if part == "decode" else f", LoRA r={model.rank}, remat {work.remat} (JAX)"
    return f"{work.name} {part}:{by_depth} {model.layers} layers of width {model.width}, {held}{keeps}; {does}"


def _row(found: Mapping[str, Any]) -> tuple[str, ...]:
    head = (str(found["model"]), found["part"], found["engine"] or "")
    if not found["ok"]:
        return (*head, f"failed: {found['error']}")
    figures = (_rate(found), f"{found['step_s']:.4g} s", _share(found))
    return (*head, *figures, f"{found['peak_bytes'] / 2**30:.1f}", f"{found['compile_s']:.0f} s", str(len(found["steps_s"])))


def _rate(found: Mapping[str, Any]) -> str:
    return f"{found['rate']:.4g} {found['unit']}{' (extrapolated)' if found.get('extrapolated') else ''}"


def _share(found: Mapping[str, Any]) -> str:
    return f"{100 * found['share']:.1f} % of {'copy' if found['part'] == 'decode' else 'matrix'}"


def _ways(found: Mapping[str, Any]) -> Iterator[str]:
    """The ways the reference was set, the fastest marked."""
    for one in found.get("tried", ()):
        chosen = " (in the table)" if one["variant"] == found.get("variant") else ""
        took = one["error"] if "error" in one else f"{one['step_s']:.4g} s a step, peak {one['peak_bytes'] / 2**30:.1f} GiB"
        yield f"{found['model']} {found['part']} torch, {one['variant']}: {took}{chosen}"


def _plan(found: Mapping[str, Any]) -> Iterator[str]:
    """What the plan said of the deepest step that ran."""
    plan = found["plan"]
    said = [f"{plan['gib']:.2f} GiB"]
    if "memory_error" in plan:
        said[0] += f" against {found['peak_bytes'] / 2**30:.2f} seen ({100 * plan['memory_error']:+.1f} %)"
    if "time_error" in plan:
        said.append(f"{plan['step_s']:.4g} s against {plan['measured_s']:.4g} s ({100 * plan['time_error']:+.1f} %)")
    if "not_predicted" in plan:
        said.append(plan["not_predicted"])
    yield f"{found['model']} {found['part']} jax, planned for {plan['layers']} layers: {'; '.join(said)}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their cells; a row that ends early (a failure) does not widen them."""
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in whole) for column in range(len(rows[0]))]
    for row in rows:
        widths[:3] = [max(width, len(cell)) for width, cell in zip(widths, row[:3], strict=False)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
