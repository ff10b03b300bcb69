"""Trackers: what shows the lines of a run while it goes on, each by a library of its own that is imported when it is asked for.

What a tracker writes lies in the run folder and is written anew where a run goes on from an earlier step, so that it holds each
step once. None of them contacts anybody, unless the user's own environment says so: ``WANDB_MODE``, ``MLFLOW_TRACKING_URI``,
``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from medllm.config import TrackerName
from medllm.host.installation import require

PACKAGES: Mapping[TrackerName, str] = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
"""The package of each; the extra that installs it goes by the tracker's name."""

FOLDERS: Mapping[TrackerName, str] = {"tensorboard": "events", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""Where in the run folder each one writes."""

_PROJECT = "medllm"


class Tracker(Protocol):
    """One that is open: what it is told of is shown."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a step."""

    def close(self) -> None:
        """No more come."""


def require_tracker(name: TrackerName) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    require(f"--tracker {name}", PACKAGES[name], name)


def open_tracker(name: TrackerName, run: Path, settings: Mapping[str, Any], *, anew: bool = False) -> Tracker:
    """A tracker that writes into the run folder ``run``; its name there is what the run is called.

    Args:
        name: Which tracker.
        run: The run folder.
        settings: The run's, by dotted names.
        anew: What it wrote of this run before is taken away.
    """
    folder = run / FOLDERS[name]
    if anew and name != "mlflow":  # which keeps what it knows of a database in memory, and removes its run there by itself
        shutil.rmtree(folder, ignore_errors=True)
    return _TRACKERS[name](folder, run.name, settings)


class _TensorBoard:
    """A file of events, each of them written before the next step: a thread of tensorboardX's own would meet a full disk alone.

    Where torch is installed tensorboardX imports it for a type's name, 190 MB.
    """

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any]):
        hidden = "torch" not in sys.modules
        if hidden:
            sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails, and tensorboardX does without
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.summary import scalar
        finally:
            if hidden:
                del sys.modules["torch"]
        self._event, self._scalar = Event, scalar
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """``wandb sync`` sends what lies in the folder; neither the machine's facts nor the code are in it."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any]):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        quiet = wandb.Settings(
            silent=True, console="off", save_code=False, disable_git=True, x_disable_stats=True, x_disable_meta=True
        )
        mode = os.environ.get("WANDB_MODE", "offline")
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        self._run = wandb.init(project=project, name=run, dir=str(folder), config=dict(settings), mode=mode, settings=quiet)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """A database in the folder, which ``mlflow ui --backend-store-uri sqlite:///…`` shows."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any]):
        from mlflow.tracking import MlflowClient

        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute() / 'mlflow.db'}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        mine = {"medllm.folder": str(folder.absolute())}
        for before in self._client.search_runs([experiment], filter_string=f"tags.`medllm.folder` = '{folder.absolute()}'"):
            self._client.delete_run(before.info.run_id)
        self._run = self._client.create_run(experiment, run_name=run, tags=mine).info.run_id
        for setting, value in settings.items():
            self._client.log_param(self._run, setting, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Trackio:
    """A database in the folder; ``TRACKIO_DIR`` names it for ``trackio show``."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any]):
        os.environ["TRACKIO_DIR"] = str(folder.absolute())  # read when the package is imported
        with contextlib.redirect_stdout(io.StringIO()):
            import trackio

            self._trackio = trackio
            trackio.init(project=_PROJECT, name=run, config=dict(settings), embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


_TRACKERS: Mapping[TrackerName, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}
