"""Child process of the tests of several processes: command lines of ``medllm``, one after the other.

``python -m tests.process_engine FILE BYTES`` runs those in a JSON file, a list of words each, where devices have as many bytes
as one says, and stops at the first that fails.
"""

import json
import sys
from pathlib import Path

from jax_medllm.train import auto_remat
from medllm.cli import main

if __name__ == "__main__":
    auto_remat.device_memory = lambda: float(sys.argv[2])
    for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if code := main(words):
            sys.exit(code)
