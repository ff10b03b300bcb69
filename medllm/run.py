"""A run is a folder: configuration, environment, provenance, metrics, checkpoints, adapter and result. Nothing outside it is
written."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from medllm.errors import UserError
from medllm.host.faults import explained
from medllm.host.lock import LOCK, FolderLock
from medllm.host.processes import is_primary_process, process_count, tell
from medllm.host.scratch import of_the_living, remove_left, scratch_path
from medllm.metrics import Metrics
from medllm.provenance import PROVENANCE, code_digest, input_digests, output_digests, read_provenance
from medllm.stage_config import FREE_ON_RESUME
from medllm.text_files import read_json_object, read_yaml
from medllm.trackers import FOLDERS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_RECORDED_PACKAGES = (
    *("medllm", "numpy", "transformers", "tokenizers", "datasets", "safetensors"),
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
    *("torch", "bitsandbytes", "peft", "trl", "accelerate"),
)


MERGED = "merged"
"""Folder of a run for the weights it is trained on, where stage 1's adapter was merged into them."""

NOT_FINITE = "not_finite"
"""Folder of a run for the batches whose numbers were not finite."""

RESULT = "result.json"
"""Written last: a folder without it is unfinished."""

_WRITTEN = (
    "adapter",
    "answers.journal",
    "checkpoints",
    *FOLDERS.values(),
    "metrics.jsonl",
    NOT_FINITE,
    "options.journal",
    "predictions.jsonl",
    "preferences.jsonl",
    RESULT,
    MERGED,
)
"""What stages write into a run folder, some of it in place of what is there."""

_OPENING_FILES = {"config.yaml", "environment.json", PROVENANCE, LOCK}


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A sibling path that takes ``target``'s place when the block ends well, and disappears when it does not.

    What processes that were killed left of theirs is removed first.
    """
    _make_folder(target.parent)
    remove_left(target)
    scratch = scratch_path(target)
    try:
        yield scratch
        if target.is_symlink() and target.is_dir():
            raise UserError(
                f"{target}: is a link to a folder, which is not written through; give another path, or remove the link"
            )
        if target.is_dir() and not scratch.is_dir():
            raise UserError(f"{target}: is a folder, and a file is to be written there; give another path")
        if scratch.is_dir() and target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        elif scratch.exists():
            scratch.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable UTF-8 JSON, all of it or nothing."""
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def this_machine() -> str:
    """The processor of this machine, and how many cores this process may use."""
    return f"{_processor()}, {_cpus()} cores"


def environment() -> dict[str, Any]:
    """Versions, hardware and git commit that a figure depends on."""
    versions = {}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        **({"devices": gpus} if (gpus := _gpus()) else {}),
        "cpus": _cpus(),
        "packages": versions,
        "git_commit": _git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


class Run:
    """A run folder that is being written. In a multi-process launch only the primary process writes.

    As a context manager it takes a folder it has just made away again when the block fails before anything was written
    there, so that a refused input leaves nothing behind. Another process is kept out until the run is finished or left.

    Args:
        path: The folder. A folder that already holds a run is refused unless ``resume`` says otherwise.
        config: The resolved configuration (a dataclass), written as ``config.yaml``.
        engine: Which engine does the work, where one does; recorded beside the configuration.
        resume: Go on in a folder that holds a run, with the settings it was begun with; ``auto``: where there is one, and it is
            not finished.

    Raises:
        UserError: the folder cannot be made, another process is at work in it, it holds a run already, one that was begun with
            other settings, or none that could go on.
    """

    def __init__(
        self,
        path: str | Path,
        config: DataclassInstance,
        *,
        engine: str | None = None,
        resume: bool | Literal["auto"] = False,
    ):
        self.path = Path(path)
        plain = _plain(config, engine)
        self._metrics = Metrics(self.path, plain.get("tracker", "tensorboard"), dict(_flat(plain)))
        self._begun_before = False
        self._lock: FolderLock | None = None
        self._made_here = not self.path.exists()
        if not is_primary_process():
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: a run folder is needed here, but this is a file; give another --run")
        _make_folder(self.path)
        self._lock = FolderLock(self.path)
        try:
            self._open(plain, resume)
        except BaseException as error:
            self._take_away()
            self._lock.release()
            self._explain(error)
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with suppress(OSError) if kind is not None else nullcontext():  # of a full disk, which has been said
            self._metrics.close()
        if kind is not None and is_primary_process():
            self._take_away()
        self._close()
        self._explain(error)

    def log(self, step: int, **metrics: float) -> None:
        """Append one line to ``metrics.jsonl`` and show the same values in the run's tracker."""
        if is_primary_process():
            self._metrics.append(step, {name: float(value) for name, value in metrics.items()})

    def metrics(self) -> list[dict[str, float]]:
        """The lines logged so far.

        Raises:
            UserError: one that is none.
        """
        return self._metrics.lines()

    def go_on(self, done: int, steps: int) -> None:
        """Say where a run that was begun before goes on, and drop what it logged beyond: those steps are taken anew.

        Args:
            done: Optimizer steps of the checkpoint it goes on from; 0 where there was none.
            steps: Those it ends at.
        """
        if not is_primary_process():
            return
        self._metrics.forget_after(done)
        (self.path / RESULT).unlink(missing_ok=True)  # of the shorter run
        if self._begun_before:
            where = (
                f"going on at step {done:,} of {steps:,}" if done else f"no checkpoint yet, beginning at step 1 of {steps:,}"
            )
            tell(f"{self.path}: {where}")

    def finish(self, result: dict[str, Any]) -> None:
        """Write ``result.json``, close the tracker and let other processes in."""
        if is_primary_process():
            record = read_json_object(self.path / PROVENANCE, "a run records what it is made from")
            write_json(self.path / PROVENANCE, {**record, "outputs": output_digests(self.path)})
            write_json(self.path / RESULT, result)
        self._close()

    def _open(self, plain: dict[str, Any], resume: bool | str) -> None:
        written = self.path / "config.yaml"
        if written.exists():
            if resume == "auto" and (self.path / RESULT).exists():
                raise UserError(f"{self.path}: already holds a finished run; give another --run, or remove it")
            if not resume:
                remedy = "give another --run, remove it" + (", or go on with --resume auto" if "resume" in plain else "")
                raise UserError(f"{self.path}: already holds a run; {remedy}")
            _refuse_other_settings(self.path, plain)
            self._begun_before = True
            self._sweep()
        elif resume is True:
            raise UserError(f"{self.path}: there is no run to go on with; name its folder with --run, or leave out --resume")
        elif own := sorted(name for name in _WRITTEN if os.path.lexists(self.path / name)):
            raise UserError(f"{self.path}: holds {own[0]}, and no run that it is of; give another --run, or move it away")
        with atomic_path(written) as scratch:
            scratch.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
        made_on = environment()
        write_json(self.path / "environment.json", made_on)
        self._record_inputs(plain, made_on["started"])

    def _sweep(self) -> None:
        """Remove what processes that are gone have left half-written; a run below this one has a lock of its own."""
        runs = [config.parent for config in self.path.rglob("*/config.yaml")]
        for scratch in [*self.path.rglob(".*.part")]:
            if not of_the_living(scratch) and not any(scratch.is_relative_to(run) for run in runs):
                shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink(missing_ok=True)

    def _record_inputs(self, plain: dict[str, Any], started: str) -> None:
        """A session begins: with what files, and by what code."""
        before, _ = read_provenance(self.path)
        session = {"started": started, "processes": process_count(), "code": code_digest(), "inputs": input_digests(plain)}
        write_json(self.path / PROVENANCE, {"sessions": [*before, session]})

    def _explain(self, error: BaseException | None) -> None:
        """Raise what a user can do about an error of the disk, where it is one."""
        if isinstance(error, Exception) and not isinstance(error, UserError):
            told = explained(error, self.path)
            if told is not None:
                raise told from error

    def _take_away(self) -> None:
        """The folder, where it was made here and nothing was done in it, by another process neither."""
        left = {file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file()}
        if self._made_here and {name for name in left if not name.startswith(f"{MERGED}/")} <= _OPENING_FILES:
            shutil.rmtree(self.path, ignore_errors=True)

    def _close(self) -> None:
        self._metrics.close()
        if self._lock is not None:
            self._lock.release()


def check_begun(path: Path, config: DataclassInstance, engine: str) -> None:
    """Refuse a folder in which no run with these settings was begun.

    Raises:
        UserError: there is none, or one with other settings.
    """
    if not (path / "config.yaml").exists():
        raise UserError(f"{path}: nothing was begun here; start the command without --join first")
    _refuse_other_settings(path, _plain(config, engine))


def _plain(config: DataclassInstance, engine: str | None) -> dict[str, Any]:
    """The settings as ``config.yaml`` has them."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists, as YAML has them
    return {"engine": engine, **plain} if engine else plain


def _refuse_other_settings(path: Path, now: dict[str, Any]) -> None:
    """A run goes on with the settings it was begun with; only its length and its bookkeeping may change."""
    then = read_yaml(path / "config.yaml")
    before, after = dict(_flat(then)), dict(_flat(now))
    for name in sorted((before.keys() | after.keys()) - FREE_ON_RESUME):
        if not _same(before.get(name), after.get(name)):
            raise UserError(
                f"{path}: was begun with {name} = {before.get(name)}, now it is {after.get(name)}; "
                "resume with the same settings, or start a new --run"
            )


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, settings


def _same(before: Any, after: Any) -> bool:
    """Whether two values of a setting mean the same: equal, or paths of the same file, and lists of such."""
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_same, before, after))
    paths = isinstance(before, str) and isinstance(after, str) and os.path.exists(before) and os.path.exists(after)
    return before == after or (paths and os.path.samefile(before, after))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: this folder cannot be made ({error.strerror}); give another path") from error


def _cpus() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _gpus() -> str | None:
    return _asked("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")


def _git_commit() -> str | None:
    return _asked("git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD")


def _asked(*command: str) -> str | None:
    """What a program of this machine prints, on one line; None where it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(done.stdout.split("\n")).strip("; ") or None
