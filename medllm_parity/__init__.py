"""The two stacks side by side: the float64 truth, the tolerances, and the audit behind ``medllm parity``.

The only package that imports both engines. ``parity_tests`` proves the code with it; ``medllm parity`` audits a user's own
checkpoint with it.
"""

from __future__ import annotations

import jax_medllm  # noqa: F401  (before JAX: it keeps plugins of absent accelerators out)
