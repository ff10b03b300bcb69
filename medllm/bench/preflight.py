"""The first ninety seconds of ``scripts/gpu_bench.sh``: what can go wrong does so before anything is measured.

Packages, one tiny step of each engine on the device, each attention backend against float64, one NF4 product against the bytes
that bitsandbytes makes there. Whatever fails stops everything with its reason.
"""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medllm.bench.device_shapes import SMOKE
from medllm.engines import module_of
from medllm.errors import UserError

LIMIT = 90.0
"""Seconds it may take."""
_ORDER = ("torch", "jax")  # the reference leaves a weight for the other
_PACKAGES = {
    "torch": ("torch", "transformers", "bitsandbytes", "peft", "trl", "accelerate", "datasets", "tokenizers"),
    "jax": ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_dtypes", "jaxtyping", "numpy"),
}
_LOSS_TOLERANCE = 0.05


def preflight(
    engines: Sequence[str],
    seconds: float,
    child: Callable[..., dict[str, Any]],
    *,
    attention: str | None = None,
    parity: bool = False,
) -> dict[str, Any]:
    """Check what the parts need.

    Args:
        engines: Whose, of ``jax`` and ``torch``.
        seconds: For all of it.
        child: ``(module, settings, seconds)``: runs a module's ``check`` in a process of its own.
        attention: The JAX engine's only backend, where it was asked for.
        parity: The parity suite is to run.

    Returns:
        ``versions``, and what each engine's check found.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    ends = time.monotonic() + seconds
    versions = {package: _version(package, engine) for engine in engines for package in _PACKAGES[engine]}
    if parity:
        if set(engines) != set(_ORDER):
            raise UserError("pre-flight: the part parity compares both engines; leave it out of --parts, or --engines out")
        versions["pytest"] = _version("pytest", "the part parity")
    result: dict[str, Any] = {"versions": versions}
    shape = {**SMOKE.to_json(), "depths": SMOKE.depths[:1]}
    with tempfile.TemporaryDirectory(prefix="medllm-preflight-") as folder:
        nf4 = str(Path(folder) / "nf4") if "torch" in engines else None
        for engine in _ORDER:
            if engine not in engines:
                continue
            settings = {"shape": shape, "nf4": nf4, **({"attention": attention} if engine == "jax" else {})}
            try:
                result[engine] = child(module_of(engine, "preflight"), settings, max(1.0, ends - time.monotonic()))
                _check_loss(result[engine]["loss"])
            except (UserError, RuntimeError) as error:
                raise UserError(f"pre-flight: {engine}: {_one_line(error)}{_way_out(engine, engines)}") from error
    return result


def _version(package: str, needed_by: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        missing = f"pre-flight: {needed_by} needs the package '{package}', which is not installed"
        raise UserError(f"{missing}{_way_out(needed_by, _ORDER)}") from None


def _check_loss(loss: float) -> None:
    """A random model knows nothing: a token costs ln V."""
    expected = math.log(SMOKE.model.vocabulary)
    if not abs(loss - expected) <= _LOSS_TOLERANCE * expected:
        raise RuntimeError(f"a tiny step has the loss {loss:.4g}; {expected:.4g} (ln {SMOKE.model.vocabulary}) is expected")


def _way_out(failed: str, engines: Sequence[str]) -> str:
    return "; --engines jax measures without it" if failed == "torch" and "jax" in engines else ""


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
