"""``medllm replay``: a batch whose numbers were not finite, computed alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from medllm.command import Command, say
from medllm.errors import UserError
from medllm.host.progress import Say

if TYPE_CHECKING:
    from medllm.replay import Batch, Replay


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="run folder of the training that met it")
    parser.add_argument("--batch", type=str | None, default=None, help="the file it was kept in; the run's first when unset")
    parser.add_argument(
        "--mesh", type=str | None, default=None, help="the devices it is computed on (JAX); those of the run when unset"
    )


def _replay(values: Any) -> dict[str, Any]:
    from medllm.replay import first_batch, read_batch, table

    run = Path(values.run)
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    file = Path(values.batch) if values.batch else first_batch(run)
    batch = read_batch(file)
    say(f"{file}: {batch.said}")
    found = []
    for one in open_replay(run, batch, values.mesh, say):
        say(f"micro-batch {one.part.number} ({one.part.named}): loss {one.loss:.6g}, gradient norm {one.gradient_norm:.6g}")
        for line in table(one):
            say(line)
        say(f"micro-batch {one.part.number}: {one.verdict()}")
        found.append(one)
    wrong = [one for one in found if not one.finite]
    say(f"replay: {len(wrong)} of {len(found)} micro-batches are not finite")
    about = {name: getattr(batch, name) for name in ("stage", "engine", "step", "said")}
    return {**about, "batch": str(file), "micro_batches": [one.to_json() for one in found], "finite": not wrong}


def open_replay(run: Path, batch: Batch, mesh: str | None, say: Say) -> Iterator[Replay]:
    """Each micro-batch of a step of ``run``, computed alone by the engine that met it. Nothing in the run is changed.

    Args:
        run: The run folder.
        batch: The step.
        mesh: The devices, where others than the run's.
        say: Told with which adapter.

    Raises:
        UserError: the folder is no training, or one that the batch is not of, or its model, weights or checkpoints cannot be
            used.
    """
    from medllm.engines import open_trainer
    from medllm.run import MERGED
    from medllm.shortage import advising
    from medllm.stages.handover import merges
    from medllm.verify.record import open_record

    record = open_record(run)
    if (record.stage, record.engine) != (batch.stage, batch.engine):
        raise UserError(
            f"{run}: is a run of {record.stage} on engine {record.engine}, and the batch is of {batch.stage} on "
            f"{batch.engine}; name the run that kept it"
        )
    config = record.config if mesh is None else dataclasses.replace(record.config, mesh=mesh)
    model = open_trainer(batch.engine, config.model, config)  # type: ignore[arg-type]  # the run was opened by that name
    if batch.stage == "rpo" and merges(config.model, config):
        if not (run / MERGED).is_dir():
            raise UserError(
                f"{run / MERGED}: the weights it trained on are gone; put them back, or give the run's command again"
            )
        model = model.with_weights(str(run / MERGED))
    with advising(config, batch.engine):
        yield from model.replay(batch, config, run, say)


REPLAY = Command(
    "compute a batch alone whose loss or gradient was not finite, and name the tensor where that begins",
    _arguments,
    _replay,
    ("--batch", "--mesh"),
)
