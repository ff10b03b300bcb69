"""A measurement of either engine."""

from __future__ import annotations

from typing import Any

from medllm.child import run_in_child
from medllm.engine import require

_MODULES = {"jax": ("jax_medllm.bench", "jax"), "torch": ("torch_ref.bench", "torch")}


def measure(engine: str, name: str, **settings: Any) -> dict[str, Any]:
    """Run the measurement ``name`` of an engine in a fresh process and return what it found.

    Raises:
        UserError: the engine is not installed, or refuses the settings (its own one-line reason).
        RuntimeError: the process failed.
    """
    module, package = _MODULES[engine]
    require(f"engine '{engine}'", package, package)
    return run_in_child(module, name, settings)
