"""Which checkpoints are whole, held against files that are written and damaged by hand."""

import hashlib
import json

import pytest

from medllm.checkpoints import CHECKSUMS, Saving, damage, newest_whole, seal, surplus
from medllm.config import TrainingConfig
from medllm.errors import UserError


def checkpoint(folder, content=b"weights"):
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "a").write_bytes(content)
    (folder / "note").write_bytes(b"")
    seal(folder)
    return folder


def test_the_checksums_are_those_of_the_files(tmp_path):
    folder = checkpoint(tmp_path / "1")
    expected = {"note": hashlib.blake2b(b"").hexdigest(), "state/a": hashlib.blake2b(b"weights").hexdigest()}
    assert json.loads((folder / CHECKSUMS).read_text()) == expected
    assert sorted(path.name for path in folder.iterdir()) == [CHECKSUMS, "note", "state"]
    assert damage(folder) is None


def test_a_file_that_is_left_out_may_change(tmp_path):
    folder = tmp_path / "1"
    checkpoint(folder)
    seal(folder, leave_out=("note",))
    (folder / "note").write_text("later")
    assert damage(folder) is None


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("state/a", b"weightt", "state/a is not what was written"),
        ("state/a", b"weight", "state/a is not what was written"),
        ("state/a", None, "state/a is gone"),
        ("note", b"x", "note is not what was written"),
        (CHECKSUMS, b"{", f"{CHECKSUMS} or a file it names cannot be read"),
        (CHECKSUMS, b"[]", f"{CHECKSUMS} or a file it names cannot be read"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, file, content, said, capsys):
    old, new = checkpoint(tmp_path / "1"), checkpoint(tmp_path / "2")
    (new / file).unlink() if content is None else (new / file).write_bytes(content)
    found = newest_whole([new, old])
    assert (found.newest, list(found.useless)) == (old, [new])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"medllm: {new}: is damaged, {said}")


def test_one_without_checksums_was_being_written(tmp_path, capsys):
    old, new = checkpoint(tmp_path / "1"), checkpoint(tmp_path / "2")
    (new / CHECKSUMS).unlink()
    assert newest_whole([new, old]).newest == old
    found = newest_whole([new])
    assert (found.newest, list(found.useless)) == (None, [new])
    assert capsys.readouterr().err == ""


def test_where_all_are_damaged_nothing_is_gone_on_from(tmp_path):
    folder = checkpoint(tmp_path / "1")
    (folder / "state" / "a").write_bytes(b"")
    with pytest.raises(UserError, match="1: is damaged, state/a is not what was written, and no checkpoint before it is whole"):
        newest_whole([folder])


def test_checkpoints_of_before_the_checksums_are_refused_and_stay(tmp_path):
    folders = [checkpoint(tmp_path / name) for name in ("2", "1")]
    for folder in folders:
        (folder / CHECKSUMS).unlink()
    with pytest.raises(UserError, match=r"2: has no checksums.json, and those before it neither"):
        newest_whole(folders)
    assert all((folder / "state" / "a").exists() for folder in folders)


def test_minutes_are_counted_from_the_last_checkpoint_by_a_clock_that_does_not_go_back():
    now = [1000.0]
    saving = Saving(TrainingConfig(checkpoint_minutes=10), clock=lambda: now[0])
    assert [saving.by_time() for now[0] in (1000.0, 1599.0, 1600.0)] == [False, False, True]
    saving.saved()
    assert [saving.by_time() for now[0] in (1700.0, 2199.0, 2200.0)] == [False, False, True]


def test_without_minutes_no_time_is_due_and_steps_are_multiples():
    saving = Saving(TrainingConfig(checkpoint_every=3), clock=lambda: 0.0)
    assert not saving.timed
    assert not saving.by_time()
    assert [step for step in range(1, 10) if saving.by_steps(step)] == [3, 6, 9]
    assert not any(Saving(TrainingConfig()).by_steps(step) for step in range(9))


def test_the_latest_are_kept_and_the_multiples():
    assert surplus([40, 10, 20, 30, 25], keep=2, keep_every=0) == [10, 20, 25]
    assert surplus([40, 10, 20, 30, 25], keep=2, keep_every=20) == [10, 25]
    assert surplus([10, 20], keep=2, keep_every=0) == []


@pytest.mark.parametrize("name", ["checkpoint_minutes", "keep_every"])
def test_a_setting_that_is_less_than_nothing_is_refused(name):
    with pytest.raises(UserError, match=f"training.{name} is -1; expected 0 or more"):
        TrainingConfig(**{name: -1})
