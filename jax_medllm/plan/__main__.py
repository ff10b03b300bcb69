"""The child process of :mod:`medllm.plan`: ``python -m jax_medllm.plan compile SETTINGS`` prints one line of JSON.

``probe`` in place of ``compile`` runs a few layers on the device that is here, ``check_mesh`` a narrow step over a mesh.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

from jax_medllm.mesh.layout import Layout
from jax_medllm.plan.compiled import measure
from jax_medllm.plan.mesh_check import check_mesh
from jax_medllm.plan.probe import probe
from jax_medllm.plan.programs import trace
from jax_medllm.plan.targets import devices_of
from medllm.host.child import serve, tell


def compile_stage(target: dict[str, Any], mesh: str, rules: str, stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the programs of a stage take on a target; the arguments are the fields of :class:`medllm.plan.request.Request`."""
    layout = Layout.of(mesh, rules, devices_of(target))
    versions = {"jax": version("jax"), "compiler": _compiler(target["kind"])}
    return {**measure(trace(stage, settings, layout), layout, tell), "versions": versions}


def _compiler(kind: str) -> str:
    package = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin", "cpu": "jaxlib"}[kind]
    return f"{package} {version(package)}"


if __name__ == "__main__":
    sys.exit(serve({"check_mesh": check_mesh, "compile": compile_stage, "probe": probe}, sys.argv[1:]))
