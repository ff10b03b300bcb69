"""Orbax checkpoints of a training run: adapter, optimizer state and the place in the data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jax_medllm.mesh.processes import everywhere
from medllm.checkpoints import newest_whole, seal
from medllm.errors import UserError
from medllm.host.processes import is_primary_process
from medllm.shortage import is_shortage

State = TypeVar("State")

_SCRATCH = ".orbax-checkpoint-tmp"
"""In the name of a checkpoint that is being written."""
_COMMITTED = "_CHECKPOINT_METADATA"
"""Orbax's note of when; written last of all."""


class Checkpoints:
    """The ``checkpoints`` folder of a run.

    Args:
        folder: Where they are, one numbered folder each.
        settings: What the trajectory depends on. A checkpoint of other settings is refused on restore.
        keep: So many of the latest are kept.
        keep_every: Those of steps that are multiples of it are kept too (0: none).
    """

    def __init__(self, folder: Path, settings: dict[str, Any], keep: int = 2, keep_every: int = 0):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what its threads meet is raised here too
        self._folder = folder
        self._settings = settings
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            create=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        with _reading(folder):
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, state: Any, step: int) -> None:
        """Write ``state`` after ``step`` optimizer steps. The caller waits until it is copied to the host, and for a checkpoint
        that is being written still; the writing itself goes on in the background."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(_named(state)),
            position=ocp.args.JsonSave({"step": step, "settings": self._settings}),
        )
        self._manager.save(step, args=arguments, force=True)

    def restore(self, state: State) -> tuple[State, int]:
        """The latest whole checkpoint in the structure, types and shardings of ``state``, and the optimizer steps that were
        done; ``state`` itself and 0 where there is none. Later ones, which are not whole, are removed.

        Raises:
            UserError: it was written under other settings, or cannot be read, or all that there are are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        found = newest_whole(self._folder / str(step) for step in steps)
        if found.useless:
            everywhere(True)  # all have looked before the first is taken away
        for useless in found.useless:
            self._manager.delete(int(useless.name))
        if found.newest is None:
            return state, 0
        step = int(found.newest.name)
        position = self._read(step, position=ocp.args.JsonRestore())["position"]
        if not isinstance(position, dict) or not isinstance(position.get("settings"), dict):
            raise UserError(f"{self._folder / str(step)}: its position is not one of this version; start a new --run")
        if position.get("step") != step:
            raise UserError(
                f"{self._folder / str(step)}: holds the state after step {position.get('step')}; put it back under its name"
            )
        before = position["settings"]
        for name in sorted(self._settings.keys() | before.keys()):
            then, now = before.get(name), self._settings.get(name)
            if then != now:
                raise UserError(
                    f"{self._folder / str(step)}: the checkpoint was written with {name} = {then}, this run has {now}; "
                    "resume with the same settings and data, or start a new --run"
                )
        named = _named(state)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, named)
        restored = self._read(step, state=ocp.args.StandardRestore(abstract))["state"]
        leaves = [restored[name] for name in named]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), step

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.close()

    def _seal(self) -> None:
        """All of a checkpoint is written, and it has not its name yet: with the name it gets, it is whole."""
        if is_primary_process():
            for scratch in self._folder.glob(f"*{_SCRATCH}*"):
                seal(scratch, leave_out=(_COMMITTED,))

    def _read(self, step: int, **arguments: Any) -> Any:
        with _reading(self._folder / str(step)):
            return self._manager.restore(step, args=ocp.args.Composite(**arguments))


def restore_before(folder: Path, state: State, step: int) -> tuple[State, int]:
    """The newest whole checkpoint of fewer than ``step`` steps, and how many were done; ``state`` and 0 where there is none.
    Nothing in the folder is touched.

    Args:
        folder: The ``checkpoints`` of a run.
        state: Arrays of the structure, types and shardings it is read into.
        step: An optimizer step, from 1.

    Raises:
        UserError: it holds other arrays, or cannot be read.
    """
    found = newest_whole(folder / str(one) for one in range(step - 1, 0, -1) if (folder / str(one)).is_dir())
    if found.newest is None:
        return state, 0
    named = _named(state)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with _reading(found.newest), ocp.StandardCheckpointer() as reader:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, named)
        restored = reader.restore((found.newest / "state").absolute(), abstract)
    return jax.tree.unflatten(jax.tree.structure(state), [restored[name] for name in named]), int(found.newest.name)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Inside, whatever Orbax meets in ``folder`` is one line: of files it does not know, as those of another version may be, it
    raises errors of every kind, a bare ``Exception`` among them."""
    try:
        yield
    except Exception as error:
        if is_shortage(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder}: cannot be read as what this version writes ({reason}); restore the folder, remove it to go on from an "
            "earlier one, or start a new --run"
        ) from error


def _named(state: Any) -> dict[str, jax.Array | np.ndarray]:
    """Every array of a pytree under its path: what is on disk does not depend on Python classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
