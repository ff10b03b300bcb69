"""What a collection sees while layers come and go."""

import gc
import subprocess
import sys

_SEEN = """
import gc
from medllm_parity.collector import seeing_only_what_is_new

def seen(one):
    return any(other is one for other in gc.get_objects())

class Circle:
    def __init__(self):
        self.itself = self

before = Circle()
with seeing_only_what_is_new():
    inside = Circle()
    print(seen(before), seen(inside))
print(seen(before), seen(inside))
"""


def test_what_was_there_is_out_of_sight_inside_and_seen_again_afterwards():
    assert gc.get_freeze_count() > 0, "these tests' own process has frozen what it imported, so another one is looked at"
    done = subprocess.run([sys.executable, "-c", _SEEN], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False True", "True True"]
