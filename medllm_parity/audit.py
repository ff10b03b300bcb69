"""The audit behind ``medllm parity``: a model in both stacks and in float64, one layer at a time.

A layer is read, run and dropped in one stack before it is read in the next, so a model needs no more memory than one layer
of it and its vocabulary tables. Each layer runs twice at once in every stack: on what that stack's own layers before it made,
which shows how errors add up (the drift), and on the truth's state rounded to the audit's type, the same for all. Verdicts are
taken on the latter: a fault shows where it is and not in everything after it.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoTokenizer

import torch_ref.console  # noqa: F401  (keeps the libraries of the torch stack quiet)
from medllm.architecture import layer_path
from medllm.config import ModelConfig
from medllm.errors import UserError
from medllm.host.progress import Progress
from medllm.model.adapter import check_adapter, read_adapter
from medllm.model.directory import ModelDirectory
from medllm.model.quantities import LAYER, quantities
from medllm.model.tokenizer import encode, load_tokenizer
from medllm.stage_config import AuditConfig
from medllm_parity import ends, gradients, nf4_codes
from medllm_parity.collector import seeing_only_what_is_new
from medllm_parity.directories import check_directory, check_same_shape, read_hf_config
from medllm_parity.ends import States, as_numpy
from medllm_parity.jax_layer import JaxLayer
from medllm_parity.layer_view import LayerView
from medllm_parity.measure import Audit, Check, Drift, Values, judge
from medllm_parity.rows import Rows, make_rows
from medllm_parity.tolerances import AUDIT, Allowance
from medllm_parity.torch_layer import TorchLayer
from torch_ref.model import DTYPES

_SAMPLE = "発熱と咳嗽を主訴に来院した72歳の男性。 BP 130/80 mmHg, SpO₂ 96 % (room air).\n\n\t次に行うべき検査はどれか？"
"""Both tokenizers read this where no text is given: scripts, digits, runs of blanks, a character of several bytes."""


def run_audit(config: AuditConfig, progress: Progress = lambda done, total, doing="": None) -> Audit:
    """Audit a model.

    Raises:
        UserError: a folder cannot be read, or the two models have other sizes. Nothing has been written then.
    """
    sweep = _Sweep(config, progress)
    with seeing_only_what_is_new():
        return sweep.run()


@dataclass
class _Stream:
    """The residual stream with the adapters on, or off."""

    adapter: bool
    states: States

    @property
    def label(self) -> str:
        return "" if self.adapter else "adapter off"


class _Divergence(Exception):
    """Ends a bisection."""


class _Sweep:
    def __init__(self, config: AuditConfig, progress: Progress):
        model = config.model
        self.settings = config
        self.progress = progress
        self.ours = ModelDirectory(model.path)
        self.theirs = ModelDirectory(config.reference) if config.reference else self.ours
        self.config = self.ours.architecture
        for directory in dict.fromkeys((self.ours, self.theirs)):
            check_directory(directory, model.quantization)
        check_same_shape(self.ours, self.theirs)
        self.hf_config = read_hf_config(self.theirs.path)
        on_theirs = dataclasses.replace(model, adapter=config.reference_adapter or model.adapter)
        self.our_adapters, self.their_adapters = ([read_adapter(path) for path in on.adapters] for on in (model, on_theirs))
        for directory, adapters in ((self.ours, self.our_adapters), (self.theirs, self.their_adapters)):
            for adapter in adapters:
                check_adapter(adapter, directory)
        # The matrices of two adapters of another make have no counterparts.
        self.differentiable = [a.lora for a in self.our_adapters] == [a.lora for a in self.their_adapters] != []
        self.kept: gradients.KeptStates | None = None
        self.adapted = bool(self.our_adapters and self.their_adapters)  # a merged model cannot be switched off
        self.allowance = AUDIT[model.dtype]
        self.dtype = DTYPES[model.dtype]
        self.audit = Audit(self.config.num_layers, facts=_facts(config))
        self.rows = self._rows()

    def run(self) -> Audit:
        with tempfile.TemporaryDirectory() as folder:
            self.kept = gradients.KeptStates(folder) if self.differentiable else None
            return self._run()

    def _run(self) -> Audit:
        try:
            self._tokens()
            streams = self._embedding()
            for index in range(self.config.num_layers):
                self.progress(index, self.config.num_layers + 1)
                self._layer(index, streams)
            for stream in streams:
                self._head(stream)
            if self.kept is not None:
                self._gradients(streams[0].states.truth)
            self.progress(self.config.num_layers + 1, self.config.num_layers + 1)
        except _Divergence:
            self.audit.stopped = True
        return self.audit

    # --- what is read -------------------------------------------------------------------------------------------------

    def _rows(self) -> Rows:
        settings = self.settings
        count = settings.rows * settings.tokens
        if settings.tokens > self.config.max_positions:
            raise UserError(f"--tokens is {settings.tokens}; {self.ours.path} has {self.config.max_positions} positions")
        if settings.text is None:
            ids = np.random.default_rng(settings.seed).integers(0, self.config.vocab_size, count)
        else:
            text = _read_text(settings.text)
            ids = np.resize(_text_ids(text, settings.model, self.config.vocab_size), count)
        return make_rows(ids, settings.rows, settings.tokens)

    def _tokens(self) -> None:
        """Both tokenizers on the same text: the study's own way, and a plain call of the reference folder's."""
        folder = Path(self.settings.model.tokenizer or self.ours.path)
        folders = [folder, folder if self.theirs is self.ours else self.theirs.path]
        if self.settings.text is None and not all(
            (f / "tokenizer.json").exists() or (f / "vocab.json").exists() for f in folders
        ):
            return
        text = _read_text(self.settings.text) if self.settings.text else _SAMPLE
        ours = encode(load_tokenizer(folders[0]), text)
        theirs = AutoTokenizer.from_pretrained(str(folders[1]), trust_remote_code=False, local_files_only=True)(text)[
            "input_ids"
        ]
        pairs = list(zip(ours, theirs, strict=False))
        wrong = [i for i, (a, b) in enumerate(pairs) if a != b] + list(range(len(pairs), max(len(ours), len(theirs))))
        share = len(wrong) / max(1, len(ours), len(theirs))
        where = f"token {wrong[0]}" if wrong else ""
        self._add(Check("tokenizer: token ids", share, 0.0, not wrong, None, "tokenizer", "token ids", where=where))

    # --- the computation ----------------------------------------------------------------------------------------------

    def _embedding(self) -> list[_Stream]:
        states, distance = ends.embed(self.ours, self.theirs, self.rows, self.settings.model.dtype)
        exact = Allowance(0.0, 0.0, 0.0, "rows of the table, looked up and not computed")
        where = f"the row of token {distance.token}"
        self._add(judge(exact, distance.errors, quantity="embedding", module="model.embed_tokens", where=where))
        streams = [_Stream(True, states)]
        if self.adapted:
            streams.append(_Stream(False, states))
        for stream in streams:
            self._drifted(None, "embedding", distance.errors, stream)
        return streams

    def _layer(self, index: int, streams: list[_Stream]) -> None:
        inputs = [stream.states.with_common_input() for stream in streams]
        if self.kept is not None:
            self.kept.keep(index, streams[0].states.truth)
        jax_values = self._jax_layer(index, streams, inputs)
        torch_values, truth_values = self._torch_layer(index, streams, inputs)
        for stream, ours, theirs, truth in zip(streams, jax_values, torch_values, truth_values, strict=True):
            half = self.rows.tokens.shape[0]
            last = LAYER[-1].name
            stream.states = States(ours[last][:half], theirs[last][:half], truth[last][:half])
            for quantity in quantities(self.config):
                values = [_real(part.pop(quantity.name), self.rows) for part in (ours, theirs, truth)]
                own, common = (Values(*(value[copy] for value in values)) for copy in (0, 1))
                self._drifted(index, quantity.name, own.errors(), stream)
                check = judge(
                    self.allowance,
                    common.errors(),
                    quantity=quantity.name,
                    module=quantity.module_of(index),
                    layer=index,
                    label=stream.label,
                )
                if not check.ok:
                    check = dataclasses.replace(check, where=self._place(common.worst(check.stack)))
                self._add(check)

    def _torch_layer(self, index: int, streams: list[_Stream], inputs: list[States]) -> tuple[list[Any], list[Any]]:
        layer = self._read_torch(index)
        values = [layer.run(given.torch, self.rows, adapter=s.adapter) for s, given in zip(streams, inputs, strict=True)]
        layer.lift()
        truth = [layer.run(given.truth, self.rows, adapter=s.adapter) for s, given in zip(streams, inputs, strict=True)]
        del layer
        gc.collect()
        return values, truth

    def _jax_layer(self, index: int, streams: list[_Stream], inputs: list[States]) -> list[Any]:
        view = self._view(index)
        for check in nf4_codes.compare(view, index):
            self._add(check)
        layer = self._read_jax(index, view)
        values = [dict(layer.run(given.jax, self.rows, adapter=s.adapter)) for s, given in zip(streams, inputs, strict=True)]
        jax.block_until_ready(values)
        del layer
        gc.collect()
        return values

    def _read_torch(self, index: int) -> TorchLayer:
        quantization = self.settings.model.quantization
        return TorchLayer(self.theirs, self.hf_config, index, self.dtype, quantization, adapters=self.their_adapters)

    def _read_jax(self, index: int, view: LayerView | None = None) -> JaxLayer:
        model = self.settings.model
        return JaxLayer(view or self._view(index), index, model.dtype, model.quantization, adapters=self.our_adapters)

    def _view(self, index: int) -> LayerView:
        return LayerView(self.ours, index, self.settings.model.quantization, self.dtype)

    def _gradients(self, state: torch.Tensor) -> None:
        """Walk the truth back from its last state, and hold each layer's adapter gradients against it."""
        assert self.kept is not None
        both = (self.config, self.hf_config)
        values, gradient = gradients.of_last_state(self.ours, self.theirs, state, self.rows, both, self.dtype)
        self._add(judge(self.allowance, values.errors(), quantity="gradient of the last state", module="model.norm"))
        for index in reversed(range(self.config.num_layers)):
            self.progress(index, self.config.num_layers)
            found = gradients.of_layer(
                partial(self._read_jax, index), partial(self._read_torch, index), self.kept.take(index), gradient, self.rows
            )
            gc.collect()
            gradient = found.inputs
            for module, quantity, values in gradients.names(found):
                name = f"{layer_path(index)}.{module}"
                self._add(judge(self.allowance, values.errors(), quantity=quantity, module=name, layer=index))

    def _head(self, stream: _Stream) -> None:
        both = (self.config, self.hf_config)
        states = ends.final_norm(self.ours, self.theirs, stream.states.with_common_input(), both)
        own, common = (
            Values(*(_real(part, self.rows)[copy] for part in (states.jax, states.torch, states.truth))) for copy in (0, 1)
        )
        label = stream.label
        self._add(judge(self.allowance, common.errors(), quantity="final norm", module="model.norm", label=label))
        self._drifted(None, "final norm", own.errors(), stream)
        result = ends.head(self.ours, self.theirs, states, self.rows)
        token = f"token {result.common.token} of the vocabulary"
        self._add(judge(self.allowance, result.common.errors, quantity="logits", module="lm_head", label=label, where=token))
        # Over all layers errors add up in both stacks, and how large they may become is the model's own affair.
        whole = dataclasses.replace(self.allowance, ceiling=float("inf"))
        logprobs = result.logprobs.errors()
        for quantity, errors in (
            ("logits", result.own.errors),
            ("log-probs", logprobs),
            ("loss", _scalar_errors(result.losses)),
        ):
            self._add(judge(whole, errors, quantity=quantity, module="model", label=", ".join(filter(None, ["whole", label]))))
            if quantity != "loss":
                self._drifted(None, quantity, errors, stream)

    # --- what is noted ------------------------------------------------------------------------------------------------

    def _add(self, check: Check) -> None:
        self.audit.checks.append(check)
        if self.settings.bisect and not check.ok:
            raise _Divergence

    def _drifted(self, layer: int | None, quantity: str, errors: tuple[float, float, float], stream: _Stream) -> None:
        self.audit.drift.append(Drift(layer, quantity, errors[0], errors[1], stream.adapter))

    def _place(self, index: tuple[int, ...]) -> str:
        row, position = (int(axis[index[0]]) for axis in np.nonzero(self.rows.real))
        return f"row {row}, token {position}, channel {index[1]}"


def _real(value: Any, rows: Rows) -> np.ndarray:
    """The values of real tokens in float64: [copies, tokens, n]."""
    array = as_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)
    return array.reshape(-1, *rows.tokens.shape, array.shape[-1])[:, rows.real].astype(np.float64)


def _scalar_errors(values: tuple[float, float, float]) -> tuple[float, float, float]:
    return Values(*(np.array([value]) for value in values)).errors()


def _facts(config: AuditConfig) -> dict[str, Any]:
    return {
        "model": config.model.path,
        "reference": config.reference,
        "adapters": list(config.model.adapters),
        "reference_adapters": [config.reference_adapter]
        if isinstance(config.reference_adapter, str)
        else list(config.reference_adapter or ()),
        "quantization": config.model.quantization,
        "dtype": config.model.dtype,
        "text": config.text,
        "rows": config.rows,
        "tokens": config.tokens,
        "seed": config.seed,
    }


def _read_text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--text {path}: cannot be read ({error.strerror}); give a UTF-8 text file") from error
    except UnicodeDecodeError:
        raise UserError(f"--text {path}: is not UTF-8 text") from None
    if not text.strip():
        raise UserError(f"--text {path}: is empty")
    return text


def _text_ids(text: str, model: ModelConfig, vocab_size: int) -> np.ndarray:
    folder = model.tokenizer or model.path
    ids = np.array(encode(load_tokenizer(folder), text))
    if ids.max(initial=0) >= vocab_size:
        raise UserError(f"{folder}: the tokenizer gives id {ids.max()}, the model's vocabulary ends at {vocab_size - 1}")
    return ids
