"""Memory of devices: what they have, what a compiled program takes of it, and what was in use."""

from __future__ import annotations

from typing import Any

import jax

from medllm.host.memory import physical_bytes


def device_memory() -> float:
    """Bytes that a device of this process has; devices that a CPU is cut into share the host's."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return physical_bytes() / len(jax.local_devices())


def program_bytes(compiled: Any) -> int:
    """Bytes of a device that a compiled program takes while it runs; 0 where its compiler does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return taken - memory.alias_size_in_bytes


def peak_device_bytes() -> int:
    """The most that was in use on any device of this process; 0 where a device does not say, as a CPU."""
    return max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())
