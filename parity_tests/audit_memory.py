"""Child process of the memory test: audits a small model to warm up, then a given one, and prints the memory the latter took.

python audit_memory.py WARM_UP_MODEL MODEL
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from medllm.config import ModelConfig
from medllm.stage_config import AuditConfig
from medllm_parity.audit import run_audit


def status(field: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def audited(path: str) -> bool:
    return run_audit(AuditConfig(ModelConfig(path, dtype="float32"), rows=3, tokens=8)).ok


audited(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = status("VmRSS")
ok = audited(sys.argv[2])
print(json.dumps({"ok": ok, "peak": status("VmHWM") - before}))
