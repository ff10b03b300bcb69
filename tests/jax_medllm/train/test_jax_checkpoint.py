"""A run that stops and goes on ends where an uninterrupted one ends, bit for bit."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.train import loop as loop_module
from jax_medllm.train.batches import CptData, plan_steps
from jax_medllm.train.checkpoint import Checkpoints
from jax_medllm.train.loop import cpt_loss_fn, train
from medllm.checkpoints import CHECKSUMS, Saving, seal
from medllm.config import LoraConfig, OptimizerConfig, TrainingConfig
from medllm.corpus.packing import PackedRows
from medllm.errors import Stopped, UserError
from medllm.host.stopping import SIGNALS
from medllm.replay import first_batch, read_batch
from medllm.run import Run
from tests.small_model import small_config

pytest_plugins = ["tests.small_disk"]

SMALL = small_config()


def small_model():
    return DenseDecoder(SMALL, lora=LoraConfig(rank=4, alpha=8), rngs=nnx.Rngs(0))


def adapter(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, LoraParam))]


def train_six(run, kind=CptData, model=None, settings=None, **changes):
    """One call of ``train`` on six rows, a document each."""
    tokens = np.random.default_rng(0).integers(1, 53, (6, 16)).astype(np.int32)
    positions = np.tile(np.arange(16, dtype=np.int32), (6, 1))
    rows = PackedRows(tokens, np.ones_like(tokens), positions, [[row] for row in range(6)], [f"d{row}" for row in range(6)])
    config = TrainingConfig(**{"epochs": 2, "batch_size": 1, "accumulation": 2} | changes)
    data = kind(rows, plan_steps(6, config))
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.1)
    return train(model or small_model(), cpt_loss_fn, data, optimizer, config, run, settings=settings or {})


def session(run, settings=None, **changes):
    """The adapter's arrays after such a call."""
    model = small_model()
    train_six(run, CptData, model, settings, **changes)
    return adapter(model)


def logged(run):
    timed = {"tokens_per_second", "seconds", "compile_seconds"}
    return [{name: value for name, value in line.items() if name not in timed} for line in run.metrics()]


def test_three_steps_and_three_resumed_are_six_steps(tmp_path):
    straight, halves = Run(tmp_path / "straight", TrainingConfig()), Run(tmp_path / "halves", TrainingConfig())
    expected = session(straight)
    session(halves, max_steps=3)
    got = session(halves)
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [line["step"] for line in logged(halves)] == [1, 2, 3, 4, 5, 6]
    assert logged(halves) == logged(straight)


def test_lines_logged_after_the_last_checkpoint_are_replaced_on_resuming(tmp_path):
    run = Run(tmp_path / "run", TrainingConfig())
    session(run, max_steps=3)
    run.log(4, loss=99.0)
    session(run, max_steps=5)
    assert [line["step"] for line in logged(run)] == [1, 2, 3, 4, 5]
    assert max(line["loss"] for line in logged(run)) < 10


def test_a_run_that_stopped_before_its_first_checkpoint_begins_anew(tmp_path):
    run = Run(tmp_path / "run", TrainingConfig())
    run.log(1, loss=99.0)
    session(run)
    assert [line["step"] for line in logged(run)] == [1, 2, 3, 4, 5, 6]
    assert max(line["loss"] for line in logged(run)) < 10


def test_resuming_a_complete_run_changes_nothing(tmp_path):
    run = Run(tmp_path / "run", TrainingConfig())
    first, before = session(run), logged(run)
    for a, b in zip(first, session(run), strict=True):
        np.testing.assert_array_equal(a, b)
    assert logged(run) == before


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    run = Run(tmp_path / "run", TrainingConfig())
    session(run, settings={"rows": 6}, max_steps=1)
    with pytest.raises(UserError, match="rows = 6, this run has 7"):
        session(run, settings={"rows": 7})


def test_only_the_last_checkpoint_is_kept_unless_more_are_asked_for(tmp_path):
    def kept(run):
        return sorted(int(folder.name) for folder in (run.path / "checkpoints").iterdir() if folder.name.isdigit())

    last, several, some = (Run(tmp_path / name, TrainingConfig()) for name in ("last", "several", "some"))
    session(last)
    session(several, checkpoint_every=2)
    session(some, checkpoint_every=1, keep=1, keep_every=2)
    assert kept(last) == [6]
    assert kept(several) == [4, 6]
    assert kept(some) == [2, 4, 6]


def test_a_checkpoint_is_due_when_its_minutes_are_over(tmp_path, monkeypatch):
    minutes = iter(range(99))

    def clock():
        return 60.0 * next(minutes)  # a minute at each look

    monkeypatch.setattr(loop_module, "Saving", partial(Saving, clock=clock))
    run = Run(tmp_path / "run", TrainingConfig())
    session(run, checkpoint_minutes=2, keep=9)
    assert [folder.name for folder in sorted((run.path / "checkpoints").iterdir())] == ["2", "4", "6"]


def test_a_step_does_not_wait_for_a_checkpoint_to_be_written(tmp_path, monkeypatch):
    """The copy on the host is all that is waited for: the writing ends when it is let, after ``save`` has come back."""
    written, ended = threading.Event(), []
    sealed = Checkpoints._seal

    def waiting(self):
        ended.append(written.wait(60))
        sealed(self)

    monkeypatch.setattr(Checkpoints, "_seal", waiting)
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    checkpoints.save({"a": jnp.arange(3.0)}, 1)
    assert not ended
    assert not (tmp_path / "checkpoints" / "1").exists()
    written.set()
    checkpoints.close()
    assert ended == [True]
    assert (tmp_path / "checkpoints" / "1" / CHECKSUMS).exists()


def damaged_files(folder):
    """Ways to damage a checkpoint: each of its files with a bit flipped, cut short, and gone."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [(file, way) for file in files for way in ("flipped", "cut", "gone")]


def do_damage(file, way):
    content = file.read_bytes()
    if way == "gone":
        file.unlink()
    elif way == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif content:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_gone_on_from(tmp_path, capsys):
    run = Run(tmp_path / "run", TrainingConfig())
    expected = session(run, checkpoint_every=2)
    kept, lines = tmp_path / "kept", logged(run)
    (tmp_path / "run" / "checkpoints").rename(kept)
    ways = damaged_files(kept / "6")
    named = 0
    assert len(ways) > 30
    for file, way in ways[:: len(ways) // 8]:
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        shutil.copytree(kept, run.path / "checkpoints")
        do_damage(run.path / "checkpoints" / "6" / file, way)
        for a, b in zip(expected, session(run, checkpoint_every=2), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{file} {way}")
        assert logged(run) == lines
        named += f"6: is damaged, {file}" in capsys.readouterr().err
    assert named >= 6


def test_where_every_checkpoint_is_damaged_it_is_one_line(tmp_path):
    state = {"a": jnp.arange(3.0)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    for step in (1, 2):
        checkpoints.save(state, step)
    checkpoints.close()
    for file in (tmp_path / "checkpoints").rglob("state/*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"checkpoints/1: is damaged, state/\S+ is not what was written, and no checkpoint before"
    ):
        Checkpoints(tmp_path / "checkpoints", {}).restore(state)
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}


def test_one_that_was_being_written_is_none(tmp_path):
    """Its checksums are there with its name, so one without them was not written whole."""
    run = Run(tmp_path / "run", TrainingConfig())
    expected = session(run, checkpoint_every=2)
    (run.path / "checkpoints" / "6" / CHECKSUMS).unlink()
    (run.path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    for a, b in zip(expected, session(run, checkpoint_every=2), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sorted(folder.name for folder in (run.path / "checkpoints").iterdir()) == ["4", "6"]


def test_seconds_and_rate_are_of_all_sessions(tmp_path):
    run = Run(tmp_path / "run", TrainingConfig())
    whole = train_six(run, max_steps=4)
    lines = run.metrics()
    again = train_six(run, max_steps=4)
    assert again.steps == whole.steps == 4
    assert again.seconds >= lines[-1]["seconds"] > 0
    worked = [line["seconds"] - line["compile_seconds"] for line in lines]
    assert again.rate == pytest.approx(3 * 2 * 16 / (worked[-1] - worked[0]), rel=1e-6)
    assert again.compile_seconds >= lines[-1]["compile_seconds"] > 0
    assert again.loss == lines[-1]["loss"]


def test_a_disk_that_fills_is_one_line_and_the_run_goes_on_bit_for_bit(tmp_path, small_disk, capfd):
    expected, model = session(Run(tmp_path / "whole", TrainingConfig())), small_model()

    class Filling(CptData):
        def units(self, step):
            if step == self.steps[2]:
                small_disk.fill()
            return super().units(step)

    with pytest.raises(UserError, match=r"run.*: the disk is full"), Run(small_disk.folder / "run", TrainingConfig()) as run:
        train_six(run, Filling, checkpoint_every=1)
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert len(said.splitlines()) < 5
    small_disk.make_room()
    with Run(small_disk.folder / "run", TrainingConfig(), resume="auto") as run:
        train_six(run, CptData, model)
    for a, b in zip(expected, adapter(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_under_another_ones_name_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    checkpoints.save({"a": jnp.arange(3.0)}, 1)
    checkpoints.close()
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "2")
    try:
        found = str(Checkpoints(tmp_path / "checkpoints", {}).restore({"a": jnp.zeros(3)}))
    except UserError as refused:
        found = str(refused)
    assert found.endswith("checkpoints/2: holds the state after step 1; put it back under its name")


class Poisoned(CptData):
    """The rows of ``micro-batch 2`` of the third step give a loss that is no number."""

    def batches(self, step):
        found = super().batches(step)
        if step == self.steps[2]:
            found[1] = dataclasses.replace(found[1], share=np.asarray(np.nan))
        return found


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("position/metadata", b"null"),
        ("position/metadata", b'{"step": 1}'),
        ("state/_METADATA", b"[]"),
        ("state/array_metadatas/process_0", b"null"),
        ("state/manifest.ocdbt", b"another version's"),
        ("state/ocdbt.process_0/d/*", b"another version's"),
        ("_CHECKPOINT_METADATA", b"[]"),
    ],
)
def test_files_of_a_format_that_is_not_known_are_refused_in_a_line(tmp_path, name, holds):
    state = {"a": jnp.arange(4096.0)}  # too long to lie in an index
    written = Checkpoints(tmp_path, {"rows": 1})
    written.save(state, 1)
    written.close()
    for file in (tmp_path / "1").glob(name):
        file.write_bytes(holds)
    seal(tmp_path / "1", leave_out=("_CHECKPOINT_METADATA",))
    try:
        found = str(Checkpoints(tmp_path, {"rows": 1}).restore(state))
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    assert found.startswith(f"UserError: {tmp_path}")


def test_a_loss_that_is_no_number_is_named_with_its_data_and_saved_nowhere(tmp_path):
    run = Run(tmp_path / "run", TrainingConfig())
    named = r"step 3: .* by micro-batch 2 \(documents d\d\), first in loss; medllm replay .*; .*--training.on_nan skip"
    with pytest.raises(UserError, match=named):
        train_six(run, Poisoned, checkpoint_every=1)
    kept = read_batch(first_batch(run.path))
    assert (kept.stage, kept.step, [part.finite for part in kept.parts]) == ("cpt", 3, [True, False])
    assert np.isnan(kept.arrays[1]["share"])
    assert [line["step"] for line in run.metrics()] == [1, 2]
    assert sorted(folder.name for folder in (run.path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_step_that_is_left_out_changes_no_weight_and_the_others_are_taken(tmp_path, capsys):
    run, short = Run(tmp_path / "run", TrainingConfig()), Run(tmp_path / "short", TrainingConfig())
    model, before = small_model(), small_model()
    train_six(run, Poisoned, model, on_nan="skip", max_steps=3)
    train_six(short, CptData, before, max_steps=2)
    for a, b in zip(adapter(model), adapter(before), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = run.metrics()
    assert lines[2]["skipped"] == 1
    assert "loss" not in lines[2]
    assert "the step is left out" in capsys.readouterr().err
    train_six(run, Poisoned, on_nan="skip")
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert np.isfinite([line["loss"] for line in run.metrics() if line["step"] != 3]).all()


class Hopeless(CptData):
    """Steps 2, 4 and 5 give no number."""

    def batches(self, step):
        spoiled = self.steps.index(step) + 1 in (2, 4, 5)
        return [dataclasses.replace(one, share=np.asarray(np.nan)) if spoiled else one for one in super().batches(step)]


def test_so_many_steps_are_left_out_one_after_the_other_and_then_the_run_ends(tmp_path):
    one, two = Run(tmp_path / "one", TrainingConfig()), Run(tmp_path / "two", TrainingConfig())
    said = "it went on"
    try:
        train_six(one, Hopeless, on_nan="skip", max_skipped=1)
    except UserError as error:
        said = str(error)
    assert [line["step"] for line in one.metrics() if "skipped" in line] == [2, 4]
    assert re.search(r"step 5: .*; 1 before it were left out one after the other.*--training.max_skipped", said)
    train_six(two, Hopeless, on_nan="skip", max_skipped=2)
    assert [line["step"] for line in two.metrics() if "skipped" in line] == [2, 4, 5]
    assert sorted(file.stem for file in (two.path / "not_finite").iterdir()) == ["step-2", "step-4", "step-5"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on_bit_for_bit(tmp_path, number, capfd):
    class Signalled(CptData):
        def units(self, step):
            if step == self.steps[2]:
                signal.raise_signal(number)
            return super().units(step)

    whole, run = Run(tmp_path / "whole", TrainingConfig()), Run(tmp_path / "run", TrainingConfig())
    expected, model = session(whole), small_model()
    with pytest.raises(Stopped, match=r"stopped after step \d of 6, which is saved"):
        train_six(run, Signalled)
    done = run.metrics()[-1]["step"]
    assert 3 <= done <= 4
    assert (run.path / "checkpoints" / f"{done:.0f}" / CHECKSUMS).exists()
    assert f"medllm: {signal.Signals(number).name}: saving after this step" in capfd.readouterr().err
    train_six(run, CptData, model)
    for a, b in zip(expected, adapter(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert logged(run) == logged(whole)
