"""How far every preference loss is from TRL's in float64, over 20 inputs each: the table in ``docs/evidence.md``.

python -m parity_tests.loss_differences
"""

from __future__ import annotations

import jax
import numpy as np

from jax_medllm.train.preference_losses import OBJECTIVES
from medllm.config import PreferenceLoss
from parity_tests.test_loss_formulas import CASES, LONGEST, RANGES, away_from_kinks, difference, jax_result
from parity_tests.trl_losses import Scored

INPUTS = 20


def drawn(rng: np.random.Generator) -> Scored:
    """As :func:`parity_tests.test_loss_formulas.scored`."""
    rows = 2 * int(rng.integers(1, 4))
    mask = np.arange(LONGEST) < rng.integers(1, LONGEST + 1, rows)[:, None]
    policy = np.where(mask, rng.uniform(-6, -0.01, (rows, LONGEST)), 0.0)
    return Scored(policy, policy.sum(1) + rng.uniform(-10, 10, rows), mask)


def table() -> str:
    """A Markdown table: of each loss what it is compared with, and the largest differences of loss and gradient."""
    lines = ["| loss | compared with | loss | gradient |", "|---|---|---:|---:|"]
    for name, compared, fixed in CASES:
        rng, worst = np.random.default_rng(0), np.zeros(2)
        for _ in range(INPUTS):
            given = drawn(rng)
            settings = {one: rng.uniform(*RANGES[one]) for one in OBJECTIVES[name].reads if one in RANGES}
            loss = PreferenceLoss(name, **settings, **fixed)
            if not away_from_kinks(name, given, loss):
                continue
            expected, (found, gradient) = compared(given, loss), jax_result(given, loss)
            both = difference(found.loss, expected.loss), difference(gradient, expected.gradient)
            worst = np.maximum(worst, both)
        lines.append(f"| `{name}` | `{compared.__name__}` | {worst[0]:.1e} | {worst[1]:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with jax.enable_x64(True):
        print(table())
