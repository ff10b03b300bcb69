"""What tells processes on this machine of one another, as the engine they run reads it."""

from __future__ import annotations


def options(engine: str, count: int) -> list[str]:
    """Those of a command that ``count`` processes of an engine run, each with one device."""
    return ["--mesh", f"data={count}"] if engine == "jax" and count > 1 else []


def variables(engine: str, port: int, index: int, count: int) -> dict[str, str]:
    """The environment of process ``index`` of ``count``, the first of which listens on ``port``; nothing for one alone."""
    if count == 1:
        return {}
    if engine == "jax":
        from jax_medllm.mesh import processes  # the other engine's processes are told without JAX

        return {processes.ADDRESS: f"127.0.0.1:{port}", processes.COUNT: str(count), processes.INDEX: str(index)}
    assert engine == "torch", f"{engine}'s processes do not meet"
    ranks = {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
