"""A training that is begun under one version of JAX and gone on with under another.

::

    python -m tests.other_versions OTHER/bin/python cpt

OTHER is an environment with another jax (jaxlib, flax, optax, orbax-checkpoint) and all else of this one. A run is left alone
in either; others are asked to stop in their middle in one and gone on with in the other. Prints how far the adapters are apart
at the end, and whether either environment reads the same bytes from the checkpoint between.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path

from tests.killed_training import apart, command, finish, inputs, steps
from tests.kills import Job, until

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
_VERSIONS = f"import importlib.metadata as m; print(', '.join(p + ' ' + m.version(p) for p in {PACKAGES}))"
_DIGESTS = """
import hashlib, json, sys
import numpy as np, orbax.checkpoint as ocp
with ocp.StandardCheckpointer() as reader:
    held = {name: np.asarray(value) for name, value in reader.restore(sys.argv[1]).items()}
print(json.dumps({name: [str(a.dtype), a.shape, hashlib.blake2b(a.tobytes()).hexdigest()] for name, a in held.items()}))
"""


def said(python: str, code: str, *words: str) -> str:
    """What a line of Python prints last in an environment."""
    with Job.of([python, "-c", code, *words]) as job:
        ended, out, errors = job.ended(0, 240)
    assert ended == 0, errors
    return out.strip().splitlines()[-1]


def trial(pythons: dict[str, str], stage: str, folder: Path) -> str:
    """Whole runs in both environments, and those that change it in their middle. What was seen, a line each."""
    options = inputs(stage, folder)

    def words(python: str, run: Path) -> list[str]:
        return [python, *command("jax", stage, options, run)[1:]]

    for name, python in pythons.items():
        finish(words(python, folder / name))
    lines = [f"{stage}, left alone: adapters apart by {apart(folder / 'here', folder / 'there'):.1e}"]
    for first, second in (("there", "here"), ("here", "there")):
        run = folder / f"from-{first}"
        job = Job.of(words(pythons[first], run))
        until(lambda run=run: max(steps(run), default=0) >= 8, job)
        job.ask(signal.SIGTERM)
        job.end()
        done = steps(run)[-1]
        checkpoint = str((run / "checkpoints" / str(done) / "state").absolute())
        read = [json.loads(said(python, _DIGESTS, checkpoint)) for python in pythons.values()]
        same = "the same" if read[0] == read[1] else "not the same"
        assert f"going on at step {done}" in finish(words(pythons[second], run))
        assert steps(run) == steps(folder / second)
        far = ", ".join(f"{apart(run, folder / name):.1e} from that left alone {name}" for name in (first, second))
        lines.append(f"{stage}, begun {first}, gone on with {second} after step {done}: {same} {len(read[0])} arrays; {far}")
    return "\n".join(lines)


def main(other: str, *stages: str) -> None:
    """The command of the module's docstring."""
    pythons = {"here": sys.executable, "there": other}
    for name, python in pythons.items():
        print(f"{name}: {said(python, _VERSIONS)}", flush=True)
    for stage in stages:
        with tempfile.TemporaryDirectory() as folder:
            print(trial(pythons, stage, Path(folder)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
