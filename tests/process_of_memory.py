"""Child process of the tests of several processes: a command of ``medllm`` whose devices have as many bytes as one says.

``python -m tests.process_of_memory BYTES WORD …``
"""

import sys

from jax_medllm.train import auto_remat as remat
from medllm.cli import main

if __name__ == "__main__":
    available = float(sys.argv[1])
    remat.device_memory = lambda: available
    sys.exit(main(sys.argv[2:]))
