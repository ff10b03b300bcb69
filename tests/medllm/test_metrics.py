"""The log of a run that was ended anywhere, and what is told of its lines."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from medllm.errors import UserError
from medllm.metrics import METRICS, Metrics, Watch


def write(folder, text):
    (folder / METRICS).write_text(text)
    return Metrics(folder)


def events(folder):
    """Steps of the scalars in all event files: records of length, checksum, bytes, checksum."""
    found = []
    for file in sorted((folder / "events").iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            found += [(event.step, value.tag) for value in event.summary.value]
            data = data[16 + size :]
    return found


@pytest.mark.parametrize("torn", ['{"st', '{"step": 2, "loss": 1.5}', "\x00\x00"])
def test_a_torn_last_line_is_dropped_and_its_step_written_again(tmp_path, torn):
    log = write(tmp_path, '{"step": 1, "loss": 2.0}\n' + torn)
    assert log.lines() == [{"step": 1, "loss": 2.0}]
    log.append(2, {"loss": 1.5})
    assert [json.loads(line) for line in (tmp_path / METRICS).open()] == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]


def test_a_line_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is no line of metrics"):
        write(tmp_path, '{"step": 1}\n{"st\n{"step": 3}\n').lines()


def test_lines_and_events_hold_each_step_once_over_two_sessions(tmp_path):
    first = Metrics(tmp_path)
    for step in (1, 2, 3):
        first.append(step, {"loss": 9.0})
    first.close()
    second = Metrics(tmp_path)
    second.forget_after(1)
    for step in (2, 3, 4):
        second.append(step, {"loss": 1.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in second.lines()] == [(1, 9.0), (2, 1.0), (3, 1.0), (4, 1.0)]
    assert events(tmp_path) == [(step, "loss") for step in (1, 2, 3, 4)]


def test_a_loss_far_outside_of_what_it_was_is_told_of_once(capsys):
    watch = Watch()
    for step in range(1, 31):
        watch(step, {"loss": 2.0 + 0.1 * (step % 3)})
    assert capsys.readouterr().err == ""
    watch(31, {"loss": 2.7})
    assert capsys.readouterr().err == ""  # within three times the range of 0.2 above 2.2
    for step in (32, 33):
        watch(step, {"loss": 9.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medllm: step 32: the loss is 9, and was between 2 and 2.7 in the 20 lines before; if it stays")


def rewards(margin, chosen=0.0, learning_rate=1e-5):
    return {"loss": 1.0, "rewards/margins": margin, "rewards/chosen": chosen, "learning_rate": learning_rate}


def test_a_dpo_loss_that_stays_at_ln_2_is_told_of_once_when_the_warmup_is_over(capsys):
    watch = Watch()
    for step in range(1, 31):
        watch(step, rewards(0.0, learning_rate=step * 1e-6))
    for step in range(31, 50):
        watch(step, rewards(1e-6))
    assert capsys.readouterr().err == ""  # a rising rate has moved little, and 19 lines are not 20
    for step in (50, 51):
        watch(step, rewards(0.0))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medllm: step 50: DPO's loss has been ln 2 for 20 lines")
    assert "--optimizer.learning_rate" in line


def test_pairs_that_are_told_apart_are_nothing_to_tell(capsys):
    watch = Watch()
    for step in range(1, 60):
        watch(step, rewards(2e-3, chosen=-0.9))
    assert capsys.readouterr().err == ""


def test_chosen_responses_that_become_unlikely_are_told_of_once(capsys):
    watch = Watch()
    for step in range(1, 60):
        watch(step, rewards(2.0, chosen=-0.1 * step))
    (line,) = capsys.readouterr().err.splitlines()
    # the mean of 0.1 times the steps s - 19 to s is 0.1 (s - 9.5)
    assert line.startswith("medllm: step 20: chosen responses have become less likely: rewards/chosen is -1.05")
    assert "raise --loss.alpha" in line


def test_a_gradient_of_exactly_nothing_is_told_of_once(capsys):
    watch = Watch()
    for step, norm in enumerate([1e-30, 0.0, 0.0], 1):
        watch(step, {"loss": 1.0, "grad_norm": norm})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medllm: step 2: the gradient's norm is exactly 0")
