"""``scripts/gpu_bench.sh``: parity on a GPU, then Qwen2.5's own sizes on both engines, side by side on one device.

Every part is a process of its own with a limit of its own, so that peaks are its own and nothing that goes wrong takes the rest
with it. The table comes last; the JSON is written anew after every part. Work is counted by :mod:`medllm.bench.arithmetic`, and
held against what the same run measured the device to be capable of: a bf16 matrix product and a copy, whichever framework's is
faster.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from medllm.bench.arithmetic import cpt_step, decode_bytes, grouped_step, paired_step, training_flops
from medllm.bench.device_shapes import PAIRS, RESPONSES, SIZES, SMOKE, DeviceShape, device_shape
from medllm.child import run_in_child, run_process
from medllm.engine import require
from medllm.errors import UserError
from medllm.run import environment, write_json

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 525.0
"""Seconds for everything; nine minutes less what starting and printing take."""
PARTS = ("parity", "cpt", "rpo", "decode")
_MODULES = {"jax": "jax_medllm.device_bench", "torch": "torch_ref.device_bench"}
_LIMITS = {"rates": 60.0, "parity": 90.0, "cpt": 110.0, "rpo": 110.0, "decode": 90.0}
"""Longest a part may take, in seconds. Most take half; what they leave is there for the others."""
_SHARE_TIMED = 0.3
_LEAST = 10.0
"""Seconds below which a part is not begun."""
_DEVICE_RATES = {"side": 8192, "copied": 2**32}
_SMOKE_RATES = {"side": 256, "copied": 2**20}
_UNITS = {"cpt": "tokens/s", "rpo": "problems/s", "decode": "tokens/s"}
_OWN_TESTS = ("test_gpu.py",)
_TESTS = (
    *_OWN_TESTS,
    "test_precision.py",
    "test_model.py::test_positions_up_to_32k_give_the_float64_truth",
    "test_model.py::test_a_4_bit_model_equals_float64_arithmetic_on_its_dequantized_weights",
    "test_model.py::test_rotary_angles_keep_hugging_faces_precision_to_the_last_position_of_the_72b",
)
"""Those of the parity suite that compute on whatever device the two frameworks have."""
_BOUNDS = {"matrix": 0.6, "cpt": 1.5, "rpo": 4.0, "peak": 1.0, "decode": 0.5}


@dataclass(frozen=True)
class Part:
    """One line of the table.

    Attributes:
        name: ``rates``, ``parity``, ``cpt``, ``rpo`` or ``decode``.
        engine: Who does it; None for the parity suite.
        run: Does it within so many seconds; answers with what was found.
        shape: The model and its work, where there is one.
    """

    name: str
    engine: str | None
    run: Callable[[float], dict[str, Any]]
    shape: DeviceShape | None = None

    @property
    def title(self) -> str:
        """What it is called on the screen."""
        return " ".join(word for word in (self.shape.name if self.shape else "", self.name, self.engine or "") if word)


def bench_device(
    *,
    smoke: bool,
    sizes: Sequence[str] = SIZES,
    parts: Sequence[str] = PARTS,
    limit: float = LIMIT,
    attention: str | None = None,
    log: TextIO | None = None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure, and hold what was found against the targets.

    Args:
        smoke: Tiny shapes on the CPU.
        sizes: Which models, of :data:`medllm.bench.device_shapes.SIZES`.
        parts: Which of :data:`PARTS`.
        limit: Seconds for everything.
        attention: The JAX engine's attention backend in training; by device when unset.
        log: Gets what the processes wrote to their standard error.
        save: Given the result so far, after every part.
        say: Told what was measured, as it comes.

    Returns:
        ``parts``, ``targets``, the ``device`` and ``environment``; ``stopped`` where an interrupt ended it early.

    Raises:
        UserError: there is no GPU, and tiny shapes were not asked for.
    """
    ends = time.monotonic() + limit
    child = partial(_child, smoke=smoke, log=log)
    result: dict[str, Any] = {"smoke": smoke, "parts": [], "targets": [], "environment": environment()}

    def run(part: Part) -> dict[str, Any]:
        found = _run(part, min(_LIMITS[part.name], ends - time.monotonic()))
        if part.shape is not None and found["ok"]:
            _judge(found, part.shape, result["device"])
        result["parts"].append(found)
        result["seconds"] = limit - (ends - time.monotonic())
        save(result)
        say(f"{part.title}: {_outcome(found)}")
        return found

    given = _SMOKE_RATES if smoke else _DEVICE_RATES
    rates = [run(Part("rates", engine, partial(child, engine, "rates", given))) for engine in _MODULES]
    measured = [found for found in rates if found["ok"]]
    if not measured:
        reasons = "; ".join(f"{found['engine']}: {found['error']}" for found in rates)
        raise UserError(f"no device could be measured ({reasons}); --smoke runs tiny shapes on the CPU")
    result["device"] = _best(measured)
    memory = result["device"]["memory_bytes"] or 0
    shapes = [SMOKE] if smoke else [device_shape(size, memory) for size in sizes]
    result["shapes"] = [shape.to_json() for shape in shapes]
    try:
        for part in _planned(parts, shapes, attention, child, partial(_parity, smoke=smoke, log=log)):
            run(part)
    except KeyboardInterrupt:
        result["stopped"] = True
    result["targets"] = [] if smoke else _targets(result["parts"], shapes)
    save(result)
    return result


def _planned(
    parts: Sequence[str],
    shapes: Sequence[DeviceShape],
    attention: str | None,
    child: Callable[..., dict[str, Any]],
    parity: Callable[..., dict[str, Any]],
) -> list[Part]:
    """Everything but the rates, in order."""
    planned = [Part("parity", None, parity)] if "parity" in parts else []
    for shape in shapes:
        for name in ("cpt", "rpo", "decode"):
            engines = ("jax",) if name == "decode" else tuple(_MODULES)
            for engine in engines if name in parts else ():
                settings: dict[str, Any] = {"shape": shape.to_json()}
                if engine == "jax" and name != "decode":
                    settings["attention"] = attention
                planned.append(Part(name, engine, partial(child, engine, name, settings), shape))
    return planned


def _run(part: Part, seconds: float) -> dict[str, Any]:
    """What a part found, or the line that says why it did not."""
    line = {"part": part.name, "engine": part.engine, "model": part.shape.name if part.shape else None}
    begun = time.monotonic()
    try:
        if seconds < _LEAST:
            raise RuntimeError("not begun: the time for everything is up")
        found = {**line, "ok": True, **part.run(seconds)}
    except (UserError, RuntimeError, OSError, ValueError, IndexError) as error:
        found = {**line, "ok": False, "error": str(error).strip().split("\n")[0]}
    return {**found, "seconds": time.monotonic() - begun}


def _child(
    engine: str, name: str, settings: Mapping[str, Any], seconds: float, *, smoke: bool, log: TextIO | None
) -> dict[str, Any]:
    require(f"engine '{engine}'", engine, engine)
    timed = {} if name == "rates" else {"seconds": _SHARE_TIMED * seconds}
    given = {**settings, **timed, "smoke": smoke}
    return run_in_child(_MODULES[engine], name, given, timeout=seconds, environment=_environment(smoke), log=log)


def _parity(seconds: float, *, smoke: bool, log: TextIO | None) -> dict[str, Any]:
    """The part of the parity suite that makes sense on a GPU; without one its own tests say why they are skipped."""
    tests = [str(ROOT / "parity_tests" / test) for test in (_OWN_TESTS if smoke else _TESTS)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rf", "--tb=short", *tests]
    variables = {**_environment(smoke), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # both frameworks share the device
    done = run_process(command, timeout=seconds, environment=variables, log=log)
    if log is not None:
        log.write(done.stdout)
    said = [line for line in done.stdout.splitlines() if line.strip()]
    summary = said[-1].strip("= ") if said else ""
    if done.returncode == 0:
        return {"tests": summary}
    failed = [line.removeprefix("FAILED ").split(" - ")[0].split("::")[-1] for line in said if line.startswith("FAILED ")]
    errors = [line for line in [*said, *done.stderr.splitlines()] if line.startswith(("E  ", "ERROR", "INTERNAL"))]
    raise RuntimeError(": ".join([summary or "the parity suite did not run", ", ".join(failed) or " ".join(errors[-1:])]))


def _environment(smoke: bool) -> dict[str, str]:
    """For a child process: the working tree in place of an installation, one device, and nothing fetched."""
    variables = dict(os.environ)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if smoke:
        return variables | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # An earlier name of the same setting; JAX refuses to be given both.
    fraction = variables.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    variables.setdefault("XLA_CLIENT_MEM_FRACTION", fraction)
    # With CUDA asked for by name, JAX says why it cannot have it instead of going on with the CPU.
    variables["JAX_PLATFORMS"] = "cuda,cpu"
    variables["CUDA_VISIBLE_DEVICES"] = variables.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return variables


def _best(rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The device: its name and memory, and the higher of what the frameworks measured."""
    best = {key: max(rates, key=lambda found: found[key]) for key in ("matrix_flops", "copy_bytes")}
    return {
        "name": rates[-1]["device"],
        "memory_bytes": max((found["memory_bytes"] or 0 for found in rates), default=0) or None,
        **{key: found[key] for key, found in best.items()},
        **{f"{key}_by": found["engine"] for key, found in best.items()},
    }


def _judge(found: dict[str, Any], shape: DeviceShape, device: Mapping[str, Any]) -> None:
    """Add to what a part measured what follows from it: its rate, and the share of what the device can do."""
    found["rate"], found["unit"] = found["units"] / found["step_s"], _UNITS[found["part"]]
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
    found["flops"] = training_flops(shape.model, step)
    found["share"] = found["flops"] / found["step_s"] / device["matrix_flops"]


def _targets(parts: Sequence[dict[str, Any]], shapes: Sequence[DeviceShape]) -> list[dict[str, Any]]:
    """Each target with its bound, what was found (None where it was not measured) and whether that meets it."""
    ran = {(found["model"], found["part"], found["engine"]): found for found in parts if found["ok"]}
    targets: list[dict[str, Any]] = []

    def target(text: str, bound: float, found: float | None, *, at_most: bool = False) -> None:
        met = None if found is None else (found <= bound if at_most else found >= bound)
        targets.append({"target": text, "at_most": at_most, "bound": bound, "found": found, "met": met})

    def ratio(name: str, part: str, figure: str) -> float | None:
        ours, theirs = (ran.get((name, part, engine)) for engine in _MODULES)
        return ours[figure] / theirs[figure] if ours and theirs else None

    def share(name: str, part: str) -> float | None:
        ours = ran.get((name, part, "jax"))
        return ours["share"] if ours else None

    for name in (shape.name for shape in shapes):
        for part in ("cpt", "rpo"):
            target(f"{name} {part}: share of the matrix rate", _BOUNDS["matrix"], share(name, part))
            target(f"{name} {part}: rate, JAX over torch", _BOUNDS[part], ratio(name, part, "rate"))
            target(
                f"{name} {part}: peak memory, JAX over torch", _BOUNDS["peak"], ratio(name, part, "peak_bytes"), at_most=True
            )
        target(f"{name} decode: share of the copy bandwidth", _BOUNDS["decode"], share(name, "decode"))
    return targets


def table(result: Mapping[str, Any]) -> list[str]:
    """The result as lines of text."""
    device = result["device"]
    memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if device["memory_bytes"] else ""
    lines = [
        f"{device['name']}{memory}: bf16 matrix rate {device['matrix_flops'] / 1e12:.4g} TFLOP/s "
        f"({device['matrix_flops_by']}), copy {device['copy_bytes'] / 1e9:.4g} GB/s ({device['copy_bytes_by']})"
    ]
    for shape in result["shapes"]:
        work = DeviceShape.from_json(shape)
        lines.append(
            f"{work.name}: {work.model.layers} layers of width {work.model.width}, NF4, LoRA r={work.model.rank}; "
            f"cpt {work.rows} x {work.length} tokens; rpo prompt {work.prompt}, {RESPONSES} responses of {work.response}, "
            f"{len(PAIRS)} pairs; decode {work.decode_rows} rows at {work.decode_tokens} tokens"
        )
    lines.append("rpo torch: TRL's DPOTrainer, one pair a step; a problem is its pairs' steps. Every layer is recomputed.")
    rows = [("model", "part", "engine", "rate", "step", "share", "peak GiB", "compile", "steps")]
    lines += _aligned(rows + [_row(found) for found in result["parts"] if found["part"] not in ("rates", "parity")])
    lines += [f"parity: {_outcome(found)}" for found in result["parts"] if found["part"] == "parity"]
    lines += [f"rates {found['engine']}: {_outcome(found)}" for found in result["parts"] if found["part"] == "rates"]
    for one in result["targets"]:
        found = "not measured" if one["found"] is None else f"{one['found']:.3g}"
        verdict = {True: "met", False: "MISSED", None: "-"}[one["met"]]
        lines.append(f"{one['target']}: {found} (target {'<=' if one['at_most'] else '>='} {one['bound']:g}) {verdict}")
    remarks = [", tiny shapes on the CPU"] * result["smoke"] + [", stopped early"] * result.get("stopped", False)
    lines.append(f"gpu_bench: {result['seconds']:.0f} s{''.join(remarks)}")
    return lines


def _row(found: Mapping[str, Any]) -> tuple[str, ...]:
    head = (str(found["model"]), found["part"], found["engine"] or "")
    if not found["ok"]:
        return (*head, f"failed: {found['error']}")
    figures = (f"{found['rate']:.4g} {found['unit']}", f"{found['step_s']:.4g} s", _share(found))
    return (*head, *figures, f"{found['peak_bytes'] / 2**30:.1f}", f"{found['compile_s']:.0f} s", str(len(found["steps_s"])))


def _share(found: Mapping[str, Any]) -> str:
    return f"{100 * found['share']:.1f} % of {'copy' if found['part'] == 'decode' else 'matrix'}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their cells; a row that ends early (a failure) does not widen them."""
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in whole) for column in range(len(rows[0]))]
    for row in rows:
        widths[:3] = [max(width, len(cell)) for width, cell in zip(widths, row[:3], strict=False)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def _outcome(found: Mapping[str, Any]) -> str:
    if not found["ok"]:
        return f"failed: {found['error']}"
    if found["part"] == "parity":
        return found["tests"]
    if found["part"] == "rates":
        return f"{found['matrix_flops'] / 1e12:.4g} TFLOP/s, {found['copy_bytes'] / 1e9:.4g} GB/s, {found['device']}"
    return f"{found['rate']:.4g} {found['unit']}, {_share(found)}, compiled in {found['compile_s']:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 done, 1 some part failed, 2 it could not begin."""
    parser = argparse.ArgumentParser(prog="gpu_bench.sh", description="Parity and speed of both engines on one NVIDIA GPU.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON, and beside it FILE.log")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: does it all run?")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="which models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured, beside the device's rates")
    parser.add_argument(
        "--attention", metavar="BACKEND", help="the JAX engine's in training, xla or cudnn; by device otherwise"
    )
    parser.add_argument("--seconds", type=float, default=LIMIT, metavar="N", help="limit for everything (%(default)g)")
    values = parser.parse_args(arguments)
    say = partial(print, flush=True)
    out = values.out
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what `timeout` sends: print what there is
    try:
        with ExitStack() as files:
            log = None
            if out is not None:
                if not out.absolute().parent.is_dir():
                    raise UserError(f"--out {out}: its folder does not exist; make it, or name another")
                log = files.enter_context(out.with_name(f"{out.name}.log").open("w", encoding="utf-8"))
            result = bench_device(
                smoke=values.smoke,
                sizes=values.sizes,
                parts=values.parts,
                limit=values.seconds,
                attention=values.attention,
                log=log,
                save=lambda result: None if out is None else write_json(out, result),
                say=say,
            )
    except UserError as error:
        print(f"gpu_bench: {error}", file=sys.stderr)
        return 2
    say("\n".join(["", *table(result)]))
    return 0 if all(found["ok"] for found in result["parts"]) and "stopped" not in result else 1


if __name__ == "__main__":
    sys.exit(main())
