"""Which mesh, remat policy and number of rows: compiles what could fit, and ranks it by predicted tokens a second."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, get_args

from medllm.architecture import Architecture
from medllm.axes import MESH_AXES, RULES
from medllm.config import REMAT_KEEPS, OptimizerConfig, RematPolicy
from medllm.errors import UserError
from medllm.host.progress import Progress, Say
from medllm.plan.models import planned_model
from medllm.plan.plan import Plan, asked
from medllm.plan.planning import check_context, check_installed, make_plan
from medllm.plan.request import Request, held_as, row_length
from medllm.plan.targets import Target
from medllm.plan.wording import mesh_words

_ROWS = (1, 2, 4, 8)
_GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """A mesh with a number of rows.

    Attributes:
        mesh: Devices along each axis.
        rows: Rows of a micro-batch in each group of devices that hold rows; slots in all for generation.
        policies: Remat policies that could fit, fastest first.
        least_gib: What it needs at least under the last of them.
    """

    mesh: dict[str, int]
    rows: int
    policies: tuple[RematPolicy, ...]
    least_gib: float

    @property
    def tokens(self) -> int:
        """A measure of the work a step does, to compile first what uses the devices best."""
        return self.rows * _devices(self.mesh, RULES["batch"])


@dataclass(frozen=True)
class Tried:
    """A candidate under one policy.

    Attributes:
        candidate: Mesh and rows.
        policy: The policy.
        fits: Whether it does; None where it was not compiled.
        why: Why not; empty where it fits.
        plan: What it takes, where it was compiled.
    """

    candidate: Candidate
    policy: RematPolicy
    fits: bool | None
    why: str
    plan: Plan | None = None

    def rank(self) -> tuple[Any, ...]:
        """What fits, then what was not tried, then what does not fit.

        What fits is ranked by tokens a second to two digits, beyond which a roofline says nothing; those that are alike by the
        time of compute, memory and interconnect, one after the other.
        """
        roofline = self.plan.roofline() if self.plan else {}
        rate = float(f"{roofline.get('tokens_per_s', 0.0):.2g}")
        together = sum(roofline["seconds"].values()) / self.plan.compiled["tokens_per_step"] if self.plan and roofline else 0.0
        return (self.fits is not True, -rate, self.fits is False, together)

    def to_json(self) -> dict[str, Any]:
        """A line of the table of candidates."""
        one = self.candidate
        asked_for = {"mesh": one.mesh, "remat": self.policy, "rows": one.rows, "fits": self.fits, "why": self.why}
        shown = ("gib_per_device", "step_s", "tokens_per_s", "compile_s")
        plan = self.plan.to_json() if self.plan else {}
        return asked_for | {name: plan[name] for name in shown if name in plan}


@dataclass(frozen=True)
class Search:
    """Every candidate, the best first."""

    request: Request
    target: Target
    model: Architecture
    tried: tuple[Tried, ...]

    @property
    def best(self) -> Plan | None:
        """The plan of the best that fits."""
        return next((one.plan for one in self.tried if one.fits), None)

    def to_json(self) -> dict[str, Any]:
        """As ``medllm plan --search --json`` writes it."""
        return {
            "ok": self.best is not None,
            **asked(self.request, self.target, self.model),
            "fits": self.best is not None,
            "candidates": [one.to_json() for one in self.tried],
            "best": self.best.to_json() if self.best else None,
        }


def search(request: Request, most: int, say: Say, progress: Progress | None = None) -> Search:
    """Plans for every mesh and number of rows that could fit, each under the policy that computes least again.

    A candidate that needs more than there is by its arguments and saved activations alone is not compiled; of the others at
    most ``most`` are, those with the most rows at a time first.

    Raises:
        UserError: as :func:`medllm.plan.planning.make_plan`, where no mesh would do; a mesh was given, which leaves nothing to
            search.
    """
    if most < 1:
        raise UserError(f"--most is {most}; at least 1 is needed")
    if request.mesh:
        raise UserError(f"--search tries all meshes, and --mesh {request.mesh} names one; leave one of them out")
    target = Target.parse(request.planned_for)
    check_installed(target)
    model = planned_model(request.model)
    check_context(request, model)
    candidates = list(_candidates(request, target, model))
    could_fit = [one for one in candidates if one.policies]
    could_fit.sort(key=lambda one: (-one.tokens, one.least_gib))
    chosen, left = could_fit[:most], could_fit[most:]
    say(f"plan: {len(candidates)} meshes and row counts, {len(could_fit)} could fit, {len(chosen)} are compiled")
    found: list[Tried] = []
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        for done, tried in enumerate(pool.map(lambda one: _tried(request, one, say), chosen), 1):
            found += tried
            if progress:
                progress(done, len(chosen), f"{done} of {len(chosen)} compiled")
    refused = {one.why for one in found if one.fits is False and one.plan is None}
    if len(refused) == 1 and all(one.why in refused for one in found):
        raise UserError(*refused)  # not for its mesh
    found += [Tried(one, one.policies[-1], None, why=f"not compiled: --most {most} were") for one in left]
    found += [
        Tried(one, "layer", False, why=f"needs {one.least_gib:.1f} GiB at least; {target.memory_gib:.1f} are there")
        for one in candidates
        if not one.policies
    ]
    return Search(request, target, model, tuple(sorted(found, key=Tried.rank)))


def _candidates(request: Request, target: Target, model: Architecture) -> Iterator[Candidate]:
    for mesh in _meshes(target.count):
        if model.num_kv_heads % mesh.get("tensor", 1) or (request.stage != "cpt" and "sequence" in mesh):
            continue
        for rows in _ROWS if request.rows is None and request.stage != "generate" else (request.settings()["rows"],):
            needed = {policy: least_gib(request, mesh, rows, policy, model) for policy in _policies(request)}
            fitting = tuple(policy for policy, gib in needed.items() if gib <= target.memory_gib)
            yield Candidate(mesh, rows, fitting, min(needed.values()))


def _meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to write a number of devices as a product over the axes."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for shape in itertools.product(divisors, repeat=len(MESH_AXES) - 1):
        used = math.prod(shape)
        if devices % used == 0:
            sizes = dict(zip(MESH_AXES, (*shape, devices // used), strict=True))
            yield {axis: size for axis, size in sizes.items() if size > 1} or {"fsdp": 1}


def _policies(request: Request) -> tuple[RematPolicy, ...]:
    return ("layer",) if request.stage == "generate" else get_args(RematPolicy)


def least_gib(request: Request, mesh: dict[str, int], rows: int, policy: RematPolicy, model: Architecture) -> float:
    """GiB that a device needs at the least: weights, adapters with their moments, and what a policy keeps of each layer."""
    shards = _devices(mesh, RULES["heads"])
    item = {"float32": 4, "bfloat16": 2}[held_as(request.quantization)[1]]
    weights = model.weight_bytes(request.quantization, item)
    adapter = 4 * model.adapter_parameters(request.rank)
    if request.stage == "generate":
        slots, length = request.settings()["rows"], request.settings()["length"]
        cache = 2 * model.num_layers * model.kv_width * slots * length * item
        return (weights + adapter) / shards / _GIB + cache / math.prod(mesh.values()) / _GIB
    held = 2 + OptimizerConfig().moments  # beside the adapter its gradient
    positions = rows * row_length(request.settings()) / _devices(mesh, RULES["sequence"])
    kept = _kept_width(model, policy) / _devices(mesh, RULES["heads_in"])
    activations = model.num_layers * positions * (model.hidden_size + kept) * item
    return ((weights + held * adapter) / shards + activations) / _GIB


def _kept_width(model: Architecture, policy: RematPolicy) -> int:
    """Numbers that a policy keeps of each layer for a token, but for attention's own: not every backend of it keeps those."""
    kept = REMAT_KEEPS[policy]
    if kept is None:
        return sum(model.results.values())
    return sum(model.results[name] for name in kept if name != "attention")


def _devices(mesh: dict[str, int], axes: Sequence[str]) -> int:
    """Devices along some axes of a mesh."""
    return math.prod(mesh.get(axis, 1) for axis in axes)


def _tried(request: Request, one: Candidate, say: Say) -> list[Tried]:
    """Policies from the fastest on, up to the first that fits."""
    tried: list[Tried] = []
    for policy in one.policies:
        mesh = mesh_words(one.mesh)
        try:
            plan = make_plan(replace(request, mesh=mesh, rows=one.rows, remat=policy))
        except UserError as error:
            return [*tried, Tried(one, policy, False, why=str(error))]
        except RuntimeError as error:
            return [*tried, Tried(one, policy, None, why=f"did not compile: {error}")]
        there = f"{plan.target.memory_gib:.1f} are there"
        why = "" if plan.fits else f"needs {plan.gib_per_device:.1f} GiB; {there}"
        tried.append(Tried(one, policy, plan.fits, why, plan))
        say(f"plan: {mesh} rows {one.rows} remat {policy}: {plan.gib_per_device:.1f} GiB")
        if plan.fits:
            break
    return tried
