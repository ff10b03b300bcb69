"""``medllm verify-mesh``: is a step over a mesh the step of one device, as the target's own compiler cuts it?

The model is narrow (:func:`narrowed`) and everything else as it will be: the programs, the mesh, the rules, the packing, the
target's compiler. What it makes of a step for each device runs here, on as many devices as the target has.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medllm.architecture import Architecture
from medllm.engines import module_of
from medllm.host.child import run_in_child
from medllm.host.progress import Progress
from medllm.plan.models import planned_model
from medllm.plan.planning import check_installed, compiling_environment, default_mesh
from medllm.plan.request import Request
from medllm.plan.targets import Target

DUMPED = "MEDLLM_PARTITIONED"
"""Environment variable of the child process: the folder that its compiler writes to."""
TOLERANCE = 2e-4
"""Largest difference of a result from one device, as a share of its largest value, all in fp32: sums are added up in another
order. A reduction that is left out, or made twice, is of the order of 1."""

_MOST_FACTORS_OF_TWO = 7
_HEAD = 32


def narrowed(model: Architecture) -> Architecture:
    """A model of the same family, heads and biases, of two layers, whose sizes have the factors of two that the model's have,
    up to 128, so that a mesh divides what it divides there; three times that, as a size is seldom a power of two."""

    def narrow(size: int) -> int:
        twos = (size & -size).bit_length() - 1
        return 3 * 2 ** min(twos, _MOST_FACTORS_OF_TWO)

    return replace(
        model,
        num_layers=2,
        hidden_size=narrow(model.hidden_size),
        intermediate_size=narrow(model.intermediate_size),
        vocab_size=narrow(model.vocab_size),
        head_dim=_HEAD,
    )


@dataclass(frozen=True)
class Array:
    """A result of a step's program: a gradient, a moment, a parameter, a number that is logged.

    Attributes:
        program: Whose.
        name: Its place in what that program returns.
        error: Largest difference from one device, as a share of the largest value.
        apart: The same between devices that hold the same piece.
    """

    program: str
    name: str
    error: float
    apart: float

    @property
    def ok(self) -> bool:
        """Whether it is what one device computes, wherever it lies."""
        return self.error <= TOLERANCE and self.apart <= TOLERANCE


@dataclass(frozen=True)
class MeshCertificate:
    """What was found.

    Attributes:
        target: Whose compiler cut the programs.
        mesh: Devices along each axis.
        stage: Whose step.
        model: The narrow one.
        arrays: Every result.
        reductions: How many each program has.
        versions: Of JAX.
    """

    target: str
    mesh: Mapping[str, int]
    stage: str
    model: Architecture
    arrays: tuple[Array, ...]
    reductions: Mapping[str, int]
    versions: Mapping[str, str]

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.mesh.values())

    @property
    def refuted(self) -> tuple[Array, ...]:
        """Results that are off, the worst first."""
        return tuple(sorted((one for one in self.arrays if not one.ok), key=lambda one: -max(one.error, one.apart)))

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` writes; ``ok`` says whether it is proved."""
        return {
            "ok": not self.refuted,
            "target": self.target,
            "mesh": dict(self.mesh),
            "stage": self.stage,
            "model": self.model.to_hf(),
            "tolerance": TOLERANCE,
            "worst": max(max(one.error, one.apart) for one in self.arrays),
            "reductions": dict(self.reductions),
            "arrays": [{**vars(one), "ok": one.ok} for one in self.arrays],
            "versions": dict(self.versions),
        }


def request_of(values: Any) -> Request:
    """What a command line asks for: rows short enough to run here."""
    short: dict[str, Any] = {"length": 64} if values.stage == "cpt" else {"prompt": 32, "responses": 3, "response": 16}
    named = ("model", "stage", "target", "mesh", "rules", "quantization", "remat", "rank")
    return Request(rows=1, **{name: values[name] for name in named}, **short)


def verify_mesh(request: Request, progress: Progress | None = None) -> MeshCertificate:
    """Run a step over the mesh as the target's compiler cuts it.

    Raises:
        UserError: an unknown model, device or mesh, arrays that the mesh does not divide, or a compiler that is not installed.
        RuntimeError: the compiler failed.
    """
    target, model = Target.parse(request.planned_for), narrowed(planned_model(request.model))
    check_installed(target)
    with tempfile.TemporaryDirectory(prefix="medllm-partitioned-") as folder:
        found = run_in_child(
            module_of("jax", "plan"),
            "check_mesh",
            {
                "target": target.to_json(),
                "mesh": request.mesh or default_mesh(request, target, model),
                "rules": request.rules,
                "stage": request.stage,
                "settings": {**request.settings(), "model": model.to_hf(), "dtype": "float32"},
            },
            environment={**compiling_environment(target, Path(folder)), DUMPED: folder},
            progress=progress or (lambda done, total, doing="": None),
        )
    arrays = tuple(Array(**one) for one in found["arrays"])
    return MeshCertificate(target.name, found["mesh"], request.stage, model, arrays, found["reductions"], found["versions"])
