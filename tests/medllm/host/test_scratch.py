"""What is written beside a target is named by its owner, and goes when that one is dead."""

import os
import subprocess
import sys

import pytest

from medllm.host.scratch import remove_left, scratch_path
from medllm.run import atomic_path


@pytest.fixture(scope="module")
def processes():
    """The number of a process that is gone, and of one that is alive."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    return gone.pid, os.getppid()


def named(target, process, kind="part"):
    """The name of a scratch path that this process did not ask for."""
    host = scratch_path(target.with_name("x")).name.split(".")[2]
    return f".{target.name}.{host}.{process}.{kind}"


def test_what_a_dead_process_left_of_a_target_goes_and_nothing_else_does(tmp_path, processes):
    dead, alive = processes
    target = tmp_path / "model [1]"
    deep = tmp_path / named(target, dead)
    left = [
        deep,
        tmp_path / named(target, dead, "merged"),
        tmp_path / named(deep, dead),
        tmp_path / named(deep, dead, "merged"),
    ]
    kept = [
        tmp_path / name
        for name in (
            named(target, alive),
            named(tmp_path / named(target, dead), alive),  # a living process writes beside what a dead one left
            named(tmp_path / "model 1", dead),
            named(target, dead).replace(".part", ".partial"),
            named(target, dead).removeprefix("."),
            f".model [1].elsewhere.{dead}.part",
            f".model [1].{dead}.part",
            ".model [1].part",
            "model [1]",
        )
    ]
    for path in (*left, *kept):
        path.mkdir()
        (path / "weights").write_text("half")
    user = tmp_path / "users"
    user.mkdir()
    (link := tmp_path / named(target, 999999999)).symlink_to(user)
    own = scratch_path(target, "merged")
    own.mkdir()
    with atomic_path(tmp_path / "another") as scratch:
        scratch.mkdir()
    (tmp_path / "another").rmdir()
    assert sorted(tmp_path.iterdir()) == sorted([*left, *kept, user, link, own])
    remove_left(target)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, user, own])


def test_a_target_is_written_although_a_process_of_the_same_number_was_killed(tmp_path):
    left = tmp_path / named(tmp_path / "model", os.getpid())
    left.mkdir()
    (left / "weights").write_text("half")
    with atomic_path(tmp_path / "model") as scratch:
        assert scratch == left
        assert not scratch.exists()
        scratch.mkdir()
    assert [*tmp_path.rglob("*")] == [tmp_path / "model"]
