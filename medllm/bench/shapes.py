"""The work that ``medllm bench`` measures: sizes, and input made of them, the same for both engines.

The defaults suit two cores: a model whose head is a quarter of its work, as in the larger ones, prompts and answers as long as
three-shot exam questions are, and rows long enough to fill a matrix unit. Texts are words of one token each, drawn at random,
so that a length in words is a length in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from medllm.architecture import Architecture
from medllm.config import ModelConfig
from medllm.corpus.packing import PackedRows
from medllm.errors import UserError
from medllm.model.directory import write_model
from medllm.model.random import random_tensors
from medllm.preferences.records import Preference, Sample
from medllm.published import qwen2
from medllm.quantization import Quantization

_END = "</s>"


@dataclass(frozen=True)
class ModelShape:
    """A Qwen2 with random weights and a LoRA adapter on all its linear layers.

    Args:
        layers: Decoder layers.
        width: Of the residual stream.
        mlp: Width inside the feed-forward block.
        heads: Query heads.
        kv_heads: Key/value heads.
        vocabulary: Rows of the embedding and of the head.
        rank: Of the adapter.
        dtype: Type of weights and computation.
        quantization: How the linear layers are held.
    """

    layers: int = 8
    width: int = 512
    mlp: int = 1408
    heads: int = 8
    kv_heads: int = 2
    vocabulary: int = 16384
    rank: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        _at_least(1, self, "layers", "width", "mlp", "heads", "kv_heads", "rank", of="model.")
        _at_least(4, self, "vocabulary", of="model.")
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise UserError(
                f"model: width {self.width}, {self.heads} heads and {self.kv_heads} key/value heads do not go together; "
                "the width must divide into heads of an even size, and the heads into key/value heads"
            )

    @classmethod
    def of(cls, model: Architecture, **held: Any) -> ModelShape:
        """The sizes of ``model``; ``held`` are the other settings."""
        return cls(
            layers=model.num_layers,
            width=model.hidden_size,
            mlp=model.intermediate_size,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            vocabulary=model.vocab_size,
            **held,
        )

    @property
    def architecture(self) -> Architecture:
        """The model, with a head of its own."""
        return qwen2(self.layers, self.width, self.mlp, self.heads, self.kv_heads, self.vocabulary)

    def write(self, folder: Path) -> ModelConfig:
        """The model directory, its tokenizer included, and how an engine opens it."""
        rng = np.random.default_rng(0)
        kind = np.float32 if self.dtype == "float32" else ml_dtypes.bfloat16

        def normal(*shape: int) -> np.ndarray:
            return (0.02 * rng.standard_normal(shape, np.float32)).astype(kind)

        words = folder / "words"
        _write_tokenizer(words, self.vocabulary)
        model = self.architecture
        config = model.to_hf() | {"torch_dtype": self.dtype, "eos_token_id": 0, "pad_token_id": 0}
        write_model(folder / "model", config, random_tensors(model, normal))
        # Apart from the model: beside a Qwen2's config.json transformers would cut words as Qwen2 does.
        return ModelConfig(str(folder / "model"), None, str(words), self.quantization, self.dtype)


@dataclass(frozen=True)
class CptShape:
    """Continued pretraining: ``steps`` optimizer steps over ``rows`` packed rows of ``length`` tokens, two documents each.

    Args:
        model: The model.
        rows: In one step.
        length: Tokens of a row.
        steps: Optimizer steps.
    """

    model: ModelShape = field(default_factory=ModelShape)
    rows: int = 8
    length: int = 256
    steps: int = 4

    def __post_init__(self) -> None:
        _at_least(1, self, "rows")
        _at_least(4, self, "length")
        _at_least(2, self, "steps")

    def data(self) -> PackedRows:
        """Rows without padding; documents of unequal length."""
        rng = np.random.default_rng(0)
        shape = (self.rows * self.steps, self.length)
        first = rng.integers(2, self.length - 1, (shape[0], 1))
        places = np.broadcast_to(np.arange(self.length), shape)
        second = places >= first
        return PackedRows(
            tokens=rng.integers(1, self.model.vocabulary, shape).astype(np.int32),
            segment_ids=(1 + second).astype(np.int32),
            positions=(places - second * first).astype(np.int32),
        )


@dataclass(frozen=True)
class RpoShape:
    """Preference training: ``steps`` optimizer steps over ``problems`` with all pairs of their responses.

    Args:
        model: The model.
        problems: In one step.
        prompt: Tokens of a prompt (three worked examples and the question).
        response: Tokens of a response, end of text included.
        chosen: Chosen samples of a problem, below its ground truth.
        rejected: Rejected samples.
        steps: Optimizer steps.
    """

    model: ModelShape = field(default_factory=ModelShape)
    problems: int = 2
    prompt: int = 768
    response: int = 192
    chosen: int = 1
    rejected: int = 1
    steps: int = 3

    def __post_init__(self) -> None:
        _at_least(1, self, "problems", "prompt", "chosen", "rejected")
        _at_least(2, self, "response", "steps")

    @property
    def pairs(self) -> int:
        """Pairs of one problem."""
        return self.chosen + self.rejected + self.chosen * self.rejected

    def data(self) -> list[Preference]:
        """Problems with equal lengths, so that nobody pads."""
        text = _Texts(self.model.vocabulary)

        def sample() -> Sample:
            return Sample(f" {text(self.response - 1)}", "a")

        def preference(index: int) -> Preference:
            chosen, rejected = (tuple(sample() for _ in range(count)) for count in (self.chosen, self.rejected))
            return Preference(f"problem-{index}", text(self.prompt), sample(), chosen, rejected)

        return [preference(index) for index in range(self.problems * self.steps)]


@dataclass(frozen=True)
class GenerateShape:
    """Evaluation with explanation: ``problems`` prompts that begin with the same worked examples, answered greedily.

    Args:
        model: The model.
        problems: Prompts.
        header: Tokens of the worked examples, common to all prompts.
        question: Tokens of the longest question; the shortest has half of them.
        answer: Tokens of each answer. All are of one length, which favours a batch that waits for its longest.
        batch_size: Answers the JAX engine generates at a time.
    """

    model: ModelShape = field(default_factory=ModelShape)
    problems: int = 64
    header: int = 1536
    question: int = 256
    answer: int = 256
    batch_size: int = 64

    def __post_init__(self) -> None:
        _at_least(1, self, "problems", "question", "answer", "batch_size")
        _at_least(0, self, "header")

    def data(self) -> list[str]:
        """The prompts."""
        text = _Texts(self.model.vocabulary)
        header = text(self.header)
        lengths = np.linspace(max(1, self.question // 2), self.question, self.problems).astype(int)
        return [f"{header} {text(length)}".strip() for length in np.random.default_rng(0).permutation(lengths)]


class _Texts:
    """Random texts of a given number of tokens; the end-of-text token is not among them."""

    def __init__(self, vocabulary: int):
        self._rng = np.random.default_rng(0)
        self._vocabulary = vocabulary

    def __call__(self, tokens: int) -> str:
        return " ".join(f"w{word}" for word in self._rng.integers(1, self._vocabulary, tokens))


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {_END: 0, **{f"w{word}": word for word in range(1, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=_END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END, unk_token=_END).save_pretrained(
        str(folder)
    )


def _at_least(least: int, shape: Any, *names: str, of: str = "") -> None:
    for name in names:
        if (value := getattr(shape, name)) < least:
            raise UserError(f"--{of}{name} is {value}; at least {least} is needed")
