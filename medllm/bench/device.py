"""``scripts/gpu_bench.sh``: Qwen2.5's own sizes on both engines, side by side on one device, and parity there.

A pre-flight comes first (:mod:`medllm.bench.preflight`). Every part is a process of its own with a limit of its own, so that
peaks are its own and nothing that goes wrong takes the rest with it. The table comes last; the JSON is written anew after every
part. Work is counted by :mod:`medllm.bench.arithmetic`, and held against what the same run measured the device to be capable
of: a bf16 matrix product and a copy, whichever framework's is faster.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from medllm.bench.device_goals import beside_plans, judged, targets
from medllm.bench.device_result import DeviceResult
from medllm.bench.device_shapes import SIZES, SMOKE, DeviceShape, device_shape
from medllm.bench.device_table import outcome, table
from medllm.bench.preflight import LIMIT as PREFLIGHT_LIMIT
from medllm.bench.preflight import preflight
from medllm.engines import module_of, require_engine
from medllm.errors import UserError
from medllm.host.child import run_in_child, run_process
from medllm.host.progress import Say
from medllm.run import environment, write_json

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 525.0
"""Seconds for everything; nine minutes less what starting and printing take."""
PARTS = ("cpt", "calibrate", "rpo", "decode", "parity")
ENGINES = ("jax", "torch")
_BY_BOTH = ("cpt", "rpo")
_ORDER: tuple[tuple[str | None, str], ...] = (
    ("7b", "cpt"),
    ("72b", "cpt"),
    ("7b", "rpo"),
    ("72b", "decode"),
    ("7b", "calibrate"),
    ("7b", "decode"),
    (None, "parity"),
    ("72b", "rpo"),
)
"""What is worth most comes first: the time for everything may be up before the last."""
_SMOKE_ORDER = (("7b", "cpt"), ("7b", "calibrate"), ("7b", "rpo"), ("7b", "decode"), (None, "parity"))
_LIMITS = {"rates": 60.0, "parity": 90.0, "cpt": 110.0, "rpo": 110.0, "decode": 90.0, "calibrate": 90.0}
"""Longest a part may take, in seconds. Most take half; what they leave is there for the others."""
_PATIENCE = 4.0
"""How much longer everything may take with tiny shapes: that is for a busy CPU, and measures nothing."""
_SHARE_TIMED = 0.3
_LEAST = 10.0
"""Seconds below which a part is not begun."""
_DEVICE_RATES = {"side": 8192, "copied": 2**32}
_SMOKE_RATES = {"side": 256, "copied": 2**20}


@dataclass(frozen=True)
class Part:
    """One line of the table.

    Attributes:
        name: ``rates``, or one of :data:`PARTS`.
        engine: Who does it; None for the parity suite.
        run: Does it within so many seconds; answers with what was found.
        shape: The model and its work, where there is one.
    """

    name: str
    engine: str | None
    run: Callable[[float], Mapping[str, Any]]
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
    engines: Sequence[str] = ENGINES,
    limit: float = LIMIT,
    attention: str | None = None,
    log: TextIO | None = None,
    save: Callable[[DeviceResult], None] = lambda result: None,
    say: Say = lambda line: None,
) -> DeviceResult:
    """Check what can go wrong, measure, and hold what was found against the goals.

    Args:
        smoke: Tiny shapes on the CPU.
        sizes: Which models, of :data:`medllm.bench.device_shapes.SIZES`.
        parts: Which of :data:`PARTS`.
        engines: Which of :data:`ENGINES`.
        limit: Seconds for everything.
        attention: The JAX engine's attention backend in training; by device when unset.
        log: Gets what the processes wrote to their standard error.
        save: Given the result so far, after every part.
        say: Told what was measured, as it comes.

    Raises:
        UserError: the pre-flight found something wrong, or there is no GPU and tiny shapes were not asked for.
    """
    child = partial(_child, smoke=smoke, log=log)
    check = partial(_child_check, smoke=smoke, log=log)
    session = _Session(smoke, limit, save, say)
    session.check(engines, check, attention=attention, parity="parity" in parts)
    given = _SMOKE_RATES if smoke else _DEVICE_RATES
    rates = [session.run(Part("rates", engine, partial(child, engine, "rates", given))) for engine in engines]
    measured = [found for found in rates if found["ok"]]
    if not measured:
        reasons = "; ".join(f"{found['engine']}: {found['error']}" for found in rates)
        raise UserError(f"no device could be measured ({reasons}); --smoke runs tiny shapes on the CPU")
    device = _best(measured)
    planned = _planned(sizes, parts, engines, attention, child, partial(_parity, smoke=smoke, log=log), device, smoke)
    shapes = tuple((part.name, part.shape) for part in planned if part.shape and part.engine == engines[0])
    session.result = replace(session.result, device=device, shapes=shapes)
    stopped = False
    try:
        for part in planned:
            session.run(part)
    except KeyboardInterrupt:
        stopped = True
    result = session.result
    result = replace(result, stopped=stopped, targets=() if smoke else targets(result.parts, device))
    save(result)
    return result


class _Session:
    """The result while it grows, and the time that is left for it."""

    def __init__(self, smoke: bool, limit: float, save: Callable[[DeviceResult], None], say: Say):
        self._patience = _PATIENCE if smoke else 1.0
        self._limit = limit * self._patience
        self._ends = time.monotonic() + self._limit
        self._save, self._say = save, say
        self.result = DeviceResult(smoke, environment(), preflight={}, seconds=0.0)

    def check(self, engines: Sequence[str], check: Callable[..., Any], **settings: Any) -> None:
        """What can go wrong, before anything is measured."""
        begun = time.monotonic()
        seen = preflight(engines, self._left(PREFLIGHT_LIMIT), check, **settings)
        self.result = replace(self.result, preflight=seen)
        self._say(f"pre-flight: all well in {time.monotonic() - begun:.0f} s")

    def run(self, part: Part) -> Mapping[str, Any]:
        """One part, in the time that is left, which joins the result."""
        device, smoke = self.result.device, self.result.smoke
        found = _run(part, self._left(_LIMITS[part.name]), device, smoke)
        parts = beside_plans((*self.result.parts, found), on_host=smoke)
        self.result = replace(self.result, parts=parts, seconds=self._limit - (self._ends - time.monotonic()))
        self._save(self.result)
        self._say(f"{part.title}: {outcome(found)}")
        return found

    def _left(self, most: float) -> float:
        return min(self._patience * most, self._ends - time.monotonic())


def _planned(
    sizes: Sequence[str],
    parts: Sequence[str],
    engines: Sequence[str],
    attention: str | None,
    child: Callable[..., dict[str, Any]],
    parity: Callable[..., dict[str, Any]],
    device: Mapping[str, Any],
    smoke: bool,
) -> list[Part]:
    """Everything but the rates, what is worth most first."""
    planned: list[Part] = []
    for size, name in _SMOKE_ORDER if smoke else _ORDER:
        if name not in parts or (size is not None and not smoke and size not in sizes):
            continue
        if size is None:
            planned.append(Part(name, None, parity))
            continue
        shape = SMOKE if smoke else device_shape(size, name, device["memory_bytes"] or 0)
        for engine in engines if name in _BY_BOTH else tuple(engine for engine in engines if engine == "jax"):
            settings: dict[str, Any] = {"shape": shape.to_json()}
            if engine == "jax" and name != "decode":
                settings["attention"] = attention
            planned.append(Part(name, engine, partial(child, engine, name, settings), shape))
    return planned


def _run(part: Part, seconds: float, device: Mapping[str, Any] | None, smoke: bool) -> Mapping[str, Any]:
    """What a part found, or the line that says why it did not."""
    line = {"part": part.name, "engine": part.engine, "model": part.shape.name if part.shape else None}
    begun = time.monotonic()
    try:
        if seconds < _LEAST:
            raise RuntimeError("not begun: the time for everything is up")
        found: Mapping[str, Any] = {**line, "ok": True, **part.run(seconds)}
        if part.shape is not None and device is not None:
            found = judged(found, part.shape, device, strict=not smoke)
    except (UserError, RuntimeError, OSError, ValueError, IndexError) as error:
        found = {**line, "ok": False, "error": str(error).strip().split("\n")[0]}
    return {**found, "seconds": time.monotonic() - begun}


def _child(
    engine: str, name: str, settings: Mapping[str, Any], seconds: float, *, smoke: bool, log: TextIO | None
) -> dict[str, Any]:
    require_engine(engine)
    timed = {} if name == "rates" else {"seconds": _SHARE_TIMED * seconds}
    given = {**settings, **timed, "smoke": smoke}
    module, variables = module_of(engine, "device bench"), _environment(smoke)
    return run_in_child(module, name, given, timeout=seconds, environment=variables, log=log)


def _child_check(
    module: str, settings: Mapping[str, Any], seconds: float, *, smoke: bool, log: TextIO | None
) -> dict[str, Any]:
    variables = _environment(smoke)
    return run_in_child(module, "check", {**settings, "smoke": smoke}, timeout=seconds, environment=variables, log=log)


def _parity(seconds: float, *, smoke: bool, log: TextIO | None) -> dict[str, Any]:
    """The tests of the parity suite marked to run on a device; tiny shapes only look whether there are any."""
    how = ["--collect-only"] if smoke else ["-rf", "--tb=short"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "device", *how, str(ROOT / "parity_tests")]
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


def _best(rates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The device: its name and memory, and the higher of what the frameworks measured."""
    best = {key: max(rates, key=lambda found: found[key]) for key in ("matrix_flops", "copy_bytes")}
    return {
        "name": rates[-1]["device"],
        "memory_bytes": max((found["memory_bytes"] or 0 for found in rates), default=0) or None,
        **{key: found[key] for key, found in best.items()},
        **{f"{key}_by": found["engine"] for key, found in best.items()},
    }


def _parts(asked: Sequence[str] | None, engines: Sequence[str]) -> Sequence[str]:
    """What was asked for, or all that the engines can do: parity takes both."""
    return asked or [part for part in PARTS if part != "parity" or len(set(engines)) == len(ENGINES)]


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 done, 1 some part failed, 2 it could not begin."""
    parser = argparse.ArgumentParser(prog="gpu_bench.sh", description="Parity and speed of both engines on one NVIDIA GPU.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON, and beside it FILE.log")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: does it all run?")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="which models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=None, help="what is measured, beside the device's rates")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="who is measured")
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
                parts=_parts(values.parts, values.engines),
                engines=[engine for engine in ENGINES if engine in values.engines],
                limit=values.seconds,
                attention=values.attention,
                log=log,
                save=lambda result: None if out is None else write_json(out, result.to_json()),
                say=say,
            )
    except UserError as error:
        print(f"gpu_bench: {error}", file=sys.stderr)
        return 2
    say("\n".join(["", *table(result)]))
    return 0 if all(found["ok"] for found in result.parts) and not result.stopped else 1


if __name__ == "__main__":
    sys.exit(main())
