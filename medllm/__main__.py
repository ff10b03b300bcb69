"""``python -m medllm``: the same command, for launchers that start a module (accelerate, torchrun)."""

import sys

from medllm.cli import main

sys.exit(main())
