"""Signals that ask a training to end."""

import signal
import subprocess
import sys
import threading

import pytest

from medllm.host.stopping import SIGNALS, stop_requests

WAITS = """
import time
from medllm.host.stopping import stop_requests
with stop_requests() as request:
    print("ready", flush=True)
    while not request.asked:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_asks_and_the_second_ends_at_once(number):
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(number)
        assert process.wait(20) == -number
        assert (
            process.stderr.read()
            == f"medllm: {signal.Signals(number).name}: saving after this step; a second one ends at once\n"
        )


def test_the_handlers_of_before_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_requests() as request:
        assert [signal.getsignal(number) for number in SIGNALS] != before
        assert not request.asked
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_in_another_thread_nothing_is_asked():
    found = []

    def work():
        with stop_requests() as request:
            found.append(request.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
