"""Keeps off the screen what the libraries print and a user can do nothing about; to be imported before any of them.

Progress bars stay on a terminal, where loading 72B takes minutes, and only in the process that prints.
"""

import logging
import os

import datasets
from transformers.utils import logging as transformers_logging

from medllm.host.processes import is_primary_process
from medllm.host.progress import on_terminal

# bitsandbytes looks for an optional inference kernel when it is imported on a CPU with AVX512-BF16; it is never used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# A model that does not match its config fills the screen with a table; torch_ref.model refuses it in one line.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())

if not (on_terminal() and is_primary_process()):
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TQDM_DISABLE", "1")  # TRL's own bar, while it computes the reference ahead
