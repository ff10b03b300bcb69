"""What is before the first layer and after the last: embedding, final norm, logits, log-probabilities, loss.

The two tables of a vocabulary are read in slices of their rows. Only the log-probabilities of the JAX stack take its table as a
whole, because that is how the product computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jaxtyping import Array
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import PreTrainedConfig as HfConfig

from jax_medllm.model.decoder import RMSNorm, head_logits
from jax_medllm.model.logprobs import token_logprobs
from medllm.architecture import EMBEDDING, HEAD, NORM, Architecture
from medllm.model.directory import ModelDirectory
from medllm_parity.measure import Values, magnitude, relative
from medllm_parity.oracle import lift
from medllm_parity.rows import Rows
from medllm_parity.tables import JaxTable, TorchTable
from medllm_parity.torch_layer import StockParts, to_torch
from torch_ref.model import DTYPES

_SLICE_VALUES = 2**22


@dataclass(frozen=True)
class States:
    """The residual stream in the three computations, [b, s, d] each."""

    jax: Array
    torch: torch.Tensor
    truth: torch.Tensor

    def with_common_input(self) -> States:
        """Each computation's own stream, and below it the truth's, rounded: the same input for all three. [2·b, s, d]."""
        rounded = self.truth.to(self.torch.dtype)
        ours = jnp.asarray(as_numpy(rounded), self.jax.dtype)
        return States(
            jnp.concatenate([self.jax, ours]),
            torch.cat([self.torch, rounded]),
            torch.cat([self.truth, rounded.double()]),
        )


@dataclass(frozen=True)
class Distance:
    """Relative errors of JAX and torch and their difference, and the vocabulary's row with the largest one."""

    errors: tuple[float, float, float]
    token: int


@dataclass(frozen=True)
class HeadResult:
    """What the head gives: distances of the logits on the common input and on each stack's own, log-probs, losses."""

    common: Distance
    own: Distance
    logprobs: Values
    losses: tuple[float, float, float]


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values; bfloat16 widened to fp32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def embed(ours: ModelDirectory, theirs: ModelDirectory, rows: Rows, dtype: str) -> tuple[States, Distance]:
    """Look the tokens up, and compare the whole tables: the distance is 0 where every row is the same in the audit's type."""
    our_table, their_table = JaxTable(ours, EMBEDDING, dtype), TorchTable(theirs, EMBEDDING, DTYPES[dtype])
    vocab, width = our_table.shape
    shape = (*rows.tokens.shape, width)
    jax_hidden, torch_hidden = jnp.zeros(shape, dtype), torch.zeros(shape, dtype=DTYPES[dtype])
    worst = _Worst()
    for start, stop in _slices(vocab, width):
        a, b = our_table.rows(start, stop), their_table.rows(start, stop)
        truth = b.double().numpy()
        worst.add(np.asarray(a, np.float64), truth, truth, axis_start=start, axis=0)
        here = (rows.tokens >= start) & (rows.tokens < stop)
        jax_hidden = jnp.where(here[..., None], a[np.where(here, rows.tokens - start, 0)], jax_hidden)
        torch_hidden[torch.from_numpy(here)] = b[torch.from_numpy(rows.tokens[here] - start).long()]
    return States(jax_hidden, torch_hidden, torch_hidden.double()), worst.distance()


def final_norm(ours: ModelDirectory, theirs: ModelDirectory, states: States, configs: tuple[Architecture, HfConfig]) -> States:
    """The last norm, in each stack."""
    weight = jnp.asarray(ours.read(NORM)).astype(states.jax.dtype)
    normed = torch_norm(theirs, configs[1], states.torch.dtype)(states.torch)
    exact = torch_norm(theirs, configs[1], states.torch.dtype, lifted=True)(states.truth)
    return States(RMSNorm(nnx.Param(weight), configs[0].rms_norm_eps)(states.jax), normed, exact)


def torch_norm(theirs: ModelDirectory, config: HfConfig, dtype: torch.dtype, *, lifted: bool = False) -> torch.nn.Module:
    """transformers' last norm, with the weight rounded to ``dtype``; lifted, it computes in float64."""
    stem: Any = torch.nn.Module()
    stem.config = config
    weight = to_torch(theirs.read(NORM), dtype)
    stem.norm = StockParts.of(config).norm(len(weight), config.rms_norm_eps)
    stem.norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return (lift(stem).double() if lifted else stem).norm


def read_table(directory: ModelDirectory, dtype: Any) -> Array:
    """The output table of the JAX stack, read in slices into its place."""
    table = JaxTable(directory, table_name(directory), dtype)
    whole = jnp.zeros(table.shape, dtype)
    for start, stop in _slices(*table.shape):
        whole = _write_rows(whole, table.rows(start, stop), start)
    return whole


def head(ours: ModelDirectory, theirs: ModelDirectory, states: States, rows: Rows) -> HeadResult:
    """Logits slice by slice, log-probabilities and loss, of normed hidden states [2·b, s, d] (own, then common input)."""
    real = np.concatenate([rows.real, rows.real])
    place = torch.from_numpy(real)
    jax_hidden, torch_hidden, truth_hidden = states.jax[real], states.torch[place], states.truth[place]
    half = len(truth_hidden) // 2
    our_table = JaxTable(ours, table_name(ours), jax_hidden.dtype)
    their_table = TorchTable(theirs, hf_table_name(theirs.path), torch_hidden.dtype)
    targets = _next_tokens(rows)
    own, common = _Worst(), _Worst()
    reference, exact = _Logprobs(targets, torch.float32), _Logprobs(targets, torch.float64)
    for start, stop in _slices(*our_table.shape):
        a, b = our_table.rows(start, stop), their_table.rows(start, stop)
        x = np.asarray(_logits(jax_hidden, a), np.float64)
        y = torch.nn.functional.linear(torch_hidden, b)
        z = truth_hidden @ b.double().T
        for worst, part in ((own, slice(None, half)), (common, slice(half, None))):
            worst.add(x[part], y[part].double().numpy(), z[part].numpy(), axis_start=start, axis=1)
        reference.add(y[:half], start)
        exact.add(z[:half], start)
    del their_table  # a packed one is held dense: not beside the whole of ours
    counted = rows.predicted
    padded = np.pad(counted, ((0, 0), (0, 1)))[rows.real]
    b, s = rows.tokens.shape
    table = read_table(ours, jax_hidden.dtype)
    found = token_logprobs(states.jax[:b, : s - 1], table, jnp.asarray(rows.tokens[:, 1:]))
    logprobs = (np.asarray(found)[counted], reference.values()[padded], exact.values()[padded])
    a_loss, b_loss, c_loss = (float(-part.mean()) for part in logprobs)  # in each stack's own type
    values = Values(*(part.astype(np.float64) for part in logprobs))
    return HeadResult(common.distance(), own.distance(), values, (a_loss, b_loss, c_loss))


def table_name(directory: ModelDirectory) -> str:
    """The output table's name for the JAX stack: the embedding's where the two are tied."""
    return EMBEDDING if directory.architecture.tie_embeddings else HEAD


@cache
def hf_table_name(path: Path) -> str:
    """The output table's name for the torch stack: transformers opens the folder's tables, and says whether they are tied.

    Where ``config.json`` ties none, nothing is opened; else memory holds the two tables, until they are compared.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if not config.tie_word_embeddings:
        return HEAD
    without_layers = {**config.to_dict(), "num_hidden_layers": 0, "layer_types": None, "quantization_config": None}
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, config=type(config).from_dict(without_layers), dtype="auto", local_files_only=True, use_safetensors=True
    )
    return EMBEDDING if model.lm_head.weight is model.model.embed_tokens.weight else HEAD


def _next_tokens(rows: Rows) -> np.ndarray:
    """For each real token the one after it in its row (any, where there is none that counts)."""
    return np.roll(rows.tokens, -1, axis=1)[rows.real]


def _slices(vocab: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, _SLICE_VALUES // width)
    return ((start, min(vocab, start + step)) for start in range(0, vocab, step))


@jax.jit
def _logits(hidden: Array, table: Array) -> Array:
    """The product's own logits, of a part of the vocabulary."""
    return head_logits(hidden, table, hidden.dtype)


@partial(jax.jit, donate_argnums=0)
def _write_rows(table: Array, rows: Array, start: Any) -> Array:
    return jax.lax.dynamic_update_slice(table, rows, (start, 0))


class _Worst:
    """Largest differences over slices of one large array."""

    def __init__(self) -> None:
        self._apart = [0.0, 0.0, 0.0]
        self._scale = 0.0
        self._token, self._largest = 0, -1.0

    def add(self, ours: np.ndarray, theirs: np.ndarray, truth: np.ndarray, *, axis_start: int, axis: int) -> None:
        """Take a slice in; ``axis`` runs over the vocabulary from ``axis_start`` on."""
        pairs = ((ours, truth), (theirs, truth), (ours, theirs))
        apart = [np.nan_to_num(np.abs(a - b), nan=np.inf) for a, b in pairs]
        self._apart = [max(old, magnitude(new)) for old, new in zip(self._apart, apart, strict=True)]
        self._scale = max(self._scale, magnitude(truth))
        per_token = np.maximum(apart[0], apart[1]).max(axis=1 - axis)
        if per_token.max() > self._largest:
            self._largest, self._token = float(per_token.max()), axis_start + int(per_token.argmax())

    def distance(self) -> Distance:
        """What was found."""
        a, b, c = (relative(apart, self._scale) for apart in self._apart)
        return Distance((a, b, c), self._token)


class _Logprobs:
    """Log-probabilities of one target a row, from logits that come slice by slice."""

    def __init__(self, targets: np.ndarray, dtype: torch.dtype):
        self._targets = torch.from_numpy(targets).long()
        self._total = torch.full((len(targets),), -torch.inf, dtype=dtype)
        self._picked = torch.zeros(len(targets), dtype=dtype)

    def add(self, logits: torch.Tensor, start: int) -> None:
        """Take the logits of the vocabulary from ``start`` on."""
        logits = logits.to(self._total.dtype)
        self._total = torch.logaddexp(self._total, torch.logsumexp(logits, dim=1))
        here = (self._targets >= start) & (self._targets < start + logits.shape[1])
        self._picked[here] = logits[here, self._targets[here] - start]

    def values(self) -> np.ndarray:
        """Log-probability of each target."""
        return (self._picked - self._total).numpy()
