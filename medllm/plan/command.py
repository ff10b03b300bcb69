"""``medllm plan``: its arguments, and what it prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from medllm.errors import UserError
from medllm.host.progress import Say, progress_bar
from medllm.plan.calibration import Calibration
from medllm.plan.request import Request
from medllm.plan.wording import KINDS, mesh_words


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_class_arguments(Request, as_group=True)
    parser.add_argument("--search", type=bool, nargs="?", const=True, default=False, help="try meshes, remat policies and rows")
    parser.add_argument("--most", type=int, default=48, help="with --search: candidates that are compiled at most")
    parser.add_argument(
        "--calibrate",
        type=str | None,
        default=None,
        metavar="FILE",
        help="run two and four layers of the model on the device that is here, three minutes at most, and write FILE",
    )
    parser.add_argument(
        "--calibration",
        type=str | None,
        default=None,
        metavar="FILE",
        help="what --calibrate wrote: also predict a step's time",
    )
    parser.add_argument("--html", type=str | None, default=None, metavar="FILE", help="also write the plan as a page")


def run(values: Any, say: Say) -> dict[str, Any]:
    """Plan, print, and return what was found; ``ok`` says whether it fits."""
    from medllm.plan.page import write_page
    from medllm.plan.planning import make_plan
    from medllm.plan.search import search

    request = Request.of(values)
    if values.html and Path(values.html).is_dir():
        raise UserError(f"--html {values.html}: is a folder; name a file")
    if values.calibrate:
        return _calibrate(request, values, say)
    if values.search and values.calibration:
        raise UserError("--search ranks by the roofline; give --calibration with the --mesh, --rows and --remat that it finds")
    calibration = Calibration.read(Path(values.calibration)) if values.calibration else None
    with progress_bar("plan") as progress:
        plans = search(request, values.most, say, progress) if values.search else make_plan(request, calibration, progress)
    found = plans.to_json()
    for line in _candidate_lines(found) if values.search else ():
        say(line)
    plan = found["best"] if values.search else found
    for line in plan_lines(plan) if plan else ():
        say(line)
    if values.html:
        write_page(Path(values.html), found)
        say(f"plan: {values.html}")
    return found


def _calibrate(request: Request, values: Any, say: Say) -> dict[str, Any]:
    from medllm.plan.calibrating import calibrate, calibration_lines

    for name in ("search", "calibration", "html"):
        if values[name]:
            raise UserError(f"--calibrate measures and plans nothing; leave --{name} out")
    file = Path(values.calibrate)
    with progress_bar("calibrate: two and four layers run on the device that is here"):
        written = calibrate(request, file)
    for line in calibration_lines(written, file):
        say(line)
    return written


def plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """The plan as text."""
    settings = ", ".join(f"{name} {value}" for name, value in plan["settings"].items())
    yield f"{plan['model']['name']} {plan['stage']} on {plan['target']}, mesh {mesh_words(plan['mesh'])}: {settings}"
    verdict = "fits" if plan["fits"] else "does NOT fit"
    yield (
        f"{verdict}: {plan['gib_per_device']:.2f} GiB on each of {plan['devices']} devices, "
        f"{plan['memory_gib']:.2f} are there ({plan['headroom_gib']:+.2f}); compiled in {plan['compile_s']:.0f} s"
    )
    if not plan["by_kind"]:
        yield "the compiler refused it for its memory, so nothing more is known"
        return
    for kind, gib in plan["by_kind"].items():
        if gib >= 0.005:
            yield f"  {KINDS[kind][0]:<27}{gib:7.2f} GiB"
    known = "collectives" in plan
    large = [one for one in plan["collectives"] if one["bytes"] >= 1e6] if known else []
    if large:
        yield "between devices, sent by each in a step:"
    elif not known:
        yield "what is sent is not known: this JAX cannot read the program"
    for one in large:
        sent = f"{one['times']:>7.0f} x {one['bytes'] / 1e9:10.3f} GB {one['seconds']:8.3f} s"
        yield f"  {one['kind']:<20}{one['dtype']:<6}{sent}"
    seconds, rates = plan["seconds"], plan["rates"]
    amounts = {"compute": f"{_digits(plan['flops'] / 1e12)} TFLOP at {_digits(rates['flops'] / 1e12)} TFLOP/s"}
    if known:
        amounts["memory"] = f"{_digits(plan['bytes'] / 1e9)} GB at {_digits(rates['memory_bytes'] / 1e9)} GB/s"
        amounts["interconnect"] = f"at {_digits(rates['link_bytes'] / 1e9)} GB/s"
    yield f"a step takes at least (roofline at peak rates, by {rates['source']}; none is reached in practice):"
    for what, amount in amounts.items():
        yield f"  {what:<13}{seconds[what]:8.3f} s   {amount}"
    yield f"  {plan['step_s']:.3f} s, bound by {plan['bound']}: at most {plan['tokens_per_s']:,.0f} tokens/s on all devices"
    if "predicted" in plan:
        yield from _prediction_lines(plan["predicted"], plan["devices"])


def _prediction_lines(found: dict[str, Any], devices: int) -> Iterator[str]:
    yield f"predicted from {found['probed']} on {found['hardware']}, {found['measured']}:"
    yield f"  layers       {found['layers_s']:9.3f} s   {found['layer_factor']:.3g} x their roofline at the measured rates"
    yield f"  the rest     {found['rest_s']:9.3f} s   {found['rest_factor']:.3g} x"
    if devices > 1:
        yield f"  interconnect {found['interconnect_s']:9.3f} s   at peak rate, not calibrated, nothing hidden"
    yield f"  {found['step_s']:.3f} s a step: {found['tokens_per_s']:,.0f} tokens/s on all devices"


def _digits(value: float) -> str:
    """Three of them at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _candidate_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{'mesh':<28}{'rows':>5} {'remat':<12}{'GiB':>7}{'step s':>9}{'tokens/s':>11}  "
    for row in found["candidates"]:
        numbers = [row.get(name) for name in ("gib_per_device", "step_s", "tokens_per_s")]
        shown = [f"{value:,.{digits}f}" if value is not None else "" for value, digits in zip(numbers, (1, 2, 0), strict=True)]
        layout = f"{mesh_words(row['mesh']):<28}{row['rows']:>5} {row['remat']:<12}"
        yield f"{layout}{shown[0]:>7}{shown[1]:>9}{shown[2]:>11}  {row['why']}"
