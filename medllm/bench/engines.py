"""A measurement of either engine."""

from __future__ import annotations

from typing import Any

from medllm.engines import module_of, require_engine
from medllm.host.child import run_in_child


def measure(engine: str, name: str, **settings: Any) -> dict[str, Any]:
    """Run the measurement ``name`` of an engine in a fresh process and return what it found.

    Raises:
        UserError: the engine is not installed, or refuses the settings (its own one-line reason).
        RuntimeError: the process failed.
    """
    require_engine(engine)
    return run_in_child(module_of(engine, "bench"), name, settings)
