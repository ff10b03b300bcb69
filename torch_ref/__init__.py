"""The reference engine: transformers, bitsandbytes NF4, PEFT and TRL, used the way their documentation describes.

It is what the JAX engine is measured against, and what someone with A100s runs. Each file is one recipe::

    model.py     open a model, quantized or not; put an adapter on it
    cpt.py       continued pretraining with transformers' Trainer
    rpo.py       RPO and DPO with TRL's DPOTrainer
    generate.py  continuations and their log-probabilities
    shares.py    batches shared out among the processes of a launch
    switches.py  which of the engine's own settings can be had on this machine
    trainer.py   what the two training recipes share: arguments, the log, the summary
    console.py   what the libraries may print
    engine.py    these behind what medllm asks of an engine: Generates, Scores, Trains
"""

import torch_ref.console  # noqa: F401  (first: it quietens what the imports below print)

# isort: split
from torch_ref.cpt import train_cpt
from torch_ref.engine import TorchEngine
from torch_ref.generate import generate, logprobs
from torch_ref.model import add_adapter, open_model, open_tokenizer, peft_config
from torch_ref.rpo import train_preferences

__all__ = [
    "TorchEngine",
    "add_adapter",
    "generate",
    "logprobs",
    "open_model",
    "open_tokenizer",
    "peft_config",
    "train_cpt",
    "train_preferences",
]
