"""Errors of disks and file systems, real and as libraries wrap them; each is one line that says what to do."""

import errno
import os
import subprocess
import time

import pytest

from medllm.cli import main
from medllm.config import TrainingConfig
from medllm.errors import UserError
from medllm.host.faults import explained
from medllm.host.lock import FolderLock
from medllm.metrics import METRICS
from medllm.run import Run

pytest_plugins = ["tests.small_disk"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "runs/x: the disk is full"),
        (ValueError('RESOURCE_EXHAUSTED: Error writing "state": No space left on device'), "runs/x: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), r"a/b: cannot be opened or written \(Permission denied\)"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), r"a/b: cannot be opened or written \(Read-only"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "a/b: is not there, or not any more"),
        (OSError(errno.EIO, "Input/output error"), r"runs/x: its disk does not answer"),
    ],
)
def test_an_error_of_the_disk_says_where_and_what_to_do(error, said):
    found = explained(error, "runs/x")
    assert found is not None
    with pytest.raises(UserError, match=f"^{said}"):
        raise found


def test_what_a_library_made_of_it_is_seen_through():
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "the disk is full" in str(explained(wrapped))


@pytest.mark.parametrize("error", [ValueError("no number"), KeyError("space"), InterruptedError(), OSError("odd")])
def test_an_error_of_another_kind_is_none(error):
    assert explained(error) is None


def test_a_disk_that_fills_while_a_run_is_logged_is_one_line_and_the_run_goes_on(small_disk):
    config = TrainingConfig()
    with pytest.raises(UserError, match=r"run: the disk is full"), Run(small_disk.folder / "run", config) as run:
        run.log(1, loss=2.0)
        small_disk.fill()
        for step in range(2, 2000):
            run.log(step, loss=1.0)
    small_disk.make_room()
    with Run(small_disk.folder / "run", config, resume="auto") as again:
        again.go_on(1, 3)
        again.log(2, loss=1.0)
        again.finish({})
    assert [line["step"] for line in again.metrics()] == [1, 2]
    assert (small_disk.folder / "run" / METRICS).read_bytes().count(b"\n") == 2


def test_a_run_on_a_full_disk_is_refused_and_leaves_nothing(small_disk):
    small_disk.fill()
    with pytest.raises(UserError, match="the disk is full"):
        Run(small_disk.folder / "run", TrainingConfig())
    assert not (small_disk.folder / "run").exists()
    small_disk.make_room()
    with Run(small_disk.folder / "run", TrainingConfig(), resume="auto") as run:
        run.finish({})


def test_a_folder_that_cannot_be_written_is_one_line(small_disk):
    (small_disk.folder / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk.folder)], check=True)
    for path in ("run", "another"):
        with pytest.raises(UserError, match=r"(cannot be written|cannot be made) \(Read-only file system\)"):
            Run(small_disk.folder / path, TrainingConfig())
    with pytest.raises(UserError, match="see its rights, or give another --run"):
        FolderLock(small_disk.folder / "run")


def test_a_file_that_vanishes_is_one_line_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("medllm.cli.find_command", lambda *_: os.stat(tmp_path / "gone"))
    assert main(["score"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"medllm: {tmp_path / 'gone'}: is not there, or not any more; put it back, and give the same command"


def test_a_date_that_goes_back_gives_no_rate_below_nothing(tmp_path, monkeypatch):
    """Seconds and rates are of clocks that do not: the date plays no part."""
    monkeypatch.setattr(time, "time", lambda: -1e9)
    with Run(tmp_path / "run", TrainingConfig()) as run:
        run.log(1, loss=1.0)
        run.finish({})
    assert run.metrics() == [{"step": 1, "loss": 1.0}]
