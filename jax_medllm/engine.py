"""The JAX engine: what :class:`medllm.engine.Generates`, ``Scores`` and :class:`medllm.training.Trains` ask for."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_medllm.generate.cached_decoder import Decoder
from jax_medllm.generate.queue import generate
from jax_medllm.generate.scorer import Scorer
from jax_medllm.mesh.layout import Layout, on_all_devices, place_rows
from jax_medllm.mesh.processes import everywhere, join
from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.train.auto_remat import fitting_policy
from jax_medllm.train.batches import CptData, PreferenceData, TrainingData, digest, plan_steps, single_pairs
from jax_medllm.train.checkpoint import restore_before
from jax_medllm.train.device_memory import peak_device_bytes
from jax_medllm.train.loop import cpt_loss_fn, preference_loss_fn, train
from jax_medllm.train.optimizer import make_optimizer
from jax_medllm.train.preference_losses import objective
from jax_medllm.train.reference_cache import ReferenceFile, compute_reference
from jax_medllm.train.replay import LossFn, batch_of, replay
from jax_medllm.weights.adapters import adapter_tensors
from jax_medllm.weights.code_layout import lay_codes
from jax_medllm.weights.read import load_model
from medllm.config import LoraConfig, MeshConfig, ModelConfig, PreferenceRecipe, Recipe, Sampling
from medllm.corpus.packing import PackedRows
from medllm.engine import Continuation, Generation, whole_characters
from medllm.errors import UserError
from medllm.forecast import Devices, Work, announce, held_words
from medllm.host.memory import watch_device
from medllm.host.processes import is_primary_process
from medllm.host.progress import Progress, Say
from medllm.model.adapter import Adapter, open_adapters, write_adapter
from medllm.model.directory import ModelDirectory
from medllm.model.endings import read_endings
from medllm.model.tokenizer import Prompt, check_vocabulary, decode, encode_prompt, load_tokenizer
from medllm.preferences.tokenization import TokenizedPreferences
from medllm.replay import Batch, Replay, adapter_words
from medllm.run import Run
from medllm.stage_config import FREE_ON_RESUME
from medllm.stages.handover import continued_adapter
from medllm.training import TrainSummary


class JaxEngine:
    """A model opened with JAX. Weights are read at the first use.

    Args:
        model: Which weights.
        mesh: The devices they are spread over; one device when unset. The config of the stage, where there is one.

    Raises:
        UserError: the stage asks for a loss that there is not, the mesh does not fit the devices, there are other processes
            that cannot be joined, the model is of no supported family, an adapter does not fit it, or its tokenizer does not
            fit its vocabulary.
    """

    name = "jax"

    def __init__(self, model: ModelConfig, mesh: MeshConfig | None = None):
        _keep_compilations()
        if isinstance(mesh, PreferenceRecipe):
            objective(mesh.loss)  # else it would be said when stage 1's adapter has been merged
        if mesh is not None and mesh.rules and not mesh.mesh:
            raise UserError(f"--rules {mesh.rules} spreads arrays over a mesh, and there is none; add --mesh")
        join(mesh.mesh if mesh is not None else "")
        watch_device(peak_device_bytes)
        self._layout = Layout.of(mesh.mesh, mesh.rules) if mesh is not None and mesh.mesh else None
        self._config = model
        directory = ModelDirectory(model.path)
        sizes = directory.architecture
        self.context = sizes.max_positions
        open_adapters(model.adapters, directory)
        self.tokenizer = load_tokenizer(model.tokenizer or model.path)
        check_vocabulary(self.tokenizer, sizes.vocab_size, model.tokenizer or model.path)
        self._endings = read_endings(self.tokenizer, model.path)

    @cached_property
    def model(self) -> DenseDecoder:
        """The model without an adapter to train."""
        with self._on_mesh():
            return load_model(self._config)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.model, self._endings.ids)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.model)

    @property
    def place(self) -> str:
        """See :class:`medllm.engine.Placed`."""
        return f"{self.name} on {self._devices().words()}: {held_words(self._config)}"

    def with_weights(self, folder: str) -> JaxEngine:
        """See :class:`medllm.training.Trains`."""
        other = copy.copy(self)
        other._release()
        other._config = dataclasses.replace(self._config, path=folder, adapter=None)
        return other

    def train_cpt(self, rows: PackedRows, recipe: Recipe, run: Run) -> TrainSummary:
        """See :class:`medllm.training.Trains`.

        Raises:
            UserError: what :func:`jax_medllm.train.loop.train` raises.
        """
        data = CptData(rows, plan_steps(len(rows.tokens), recipe.training))
        count, length = rows.tokens.shape
        self._announce(recipe, recipe.lora, run, data, f"{count:,} rows of {length:,} tokens", rows.tokens.size)
        contents = digest(rows.tokens.tobytes(), rows.segment_ids.tobytes())
        facts = {"rows": len(rows.tokens), "length": rows.tokens.shape[1], "data": contents}
        return self._train(self._trainable(recipe.lora), cpt_loss_fn, data, recipe, run, facts)

    def train_preferences(self, preferences: TokenizedPreferences, recipe: PreferenceRecipe, run: Run) -> TrainSummary:
        """See :class:`medllm.training.Trains`.

        Raises:
            UserError: the model has an adapter that is to be merged, or what :func:`jax_medllm.train.loop.train` raises.
        """
        groups = preferences.groups
        if (preferences.dropped_pairs or preferences.truncated) and not run.metrics():
            run.log(0, dropped_pairs=preferences.dropped_pairs, truncated_responses=preferences.truncated)
        data = PreferenceData(single_pairs(groups) if recipe.pairs.unit == "pair" else groups, recipe.training)
        continued = continued_adapter(self._config, recipe)
        lora = continued.lora if continued else recipe.lora
        self._announce(recipe, lora, run, data, preferences.words(), preferences.tokens)
        model = self._trainable(continued or recipe.lora)
        folder = _reference_folder(recipe, data, run) if objective(recipe.loss).reference else None
        if folder is not None:
            kept = ReferenceFile(folder, self._config, data.groups)
            sums = kept.read()
            if not everywhere(sums is not None):
                with self._on_mesh():
                    sums = compute_reference(model, data)
                if is_primary_process():
                    kept.write(sums)
            assert sums is not None  # read in every process, or computed in all of them
            data = data.with_reference(sums)
        facts = {"groups": len(data.groups), "pairs": preferences.pairs, "data": digest(repr(groups).encode())}
        facts |= {"loss": dataclasses.asdict(recipe.loss), "pairing": dataclasses.asdict(recipe.pairs)}
        return self._train(model, partial(preference_loss_fn, loss_config=recipe.loss), data, recipe, run, facts)

    def replay(self, batch: Batch, recipe: Recipe, run: Path, say: Say) -> Iterator[Replay]:
        """See :class:`medllm.training.Trains`."""
        lora: LoraConfig | Adapter = recipe.lora
        loss_fn: LossFn = cpt_loss_fn
        if isinstance(recipe, PreferenceRecipe):
            lora = continued_adapter(self._config, recipe) or lora
            loss_fn = partial(preference_loss_fn, loss_config=recipe.loss)
        model = self._trainable(lora)
        with self._on_mesh():
            trainable = nnx.state(model, LoraParam)
            state = trainable, on_all_devices(make_optimizer(recipe.optimizer, 1).init(trainable))
            (restored, _), done = restore_before(run / "checkpoints", state, batch.step)
            nnx.update(model, restored)
            say(adapter_words(done, batch.step))
            for part, arrays in zip(batch.parts, batch.arrays, strict=True):
                yield replay(model, loss_fn, batch_of(batch, arrays), part)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> list[list[Generation]]:
        """See :class:`medllm.engine.Generates`.

        Raises:
            UserError: an empty prompt or one that does not fit the context, or a stop string no text can show.
        """
        endings = self._endings.with_stops(self.tokenizer, sampling.stop)
        sampling = dataclasses.replace(sampling, stop=endings.strings)
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        text_of = partial(decode, self.tokenizer)
        with self._on_mesh():
            generated = generate(self._decoder, ids, sampling, text_of, batch_size, progress, stop_ids=endings.ids)
        return [[whole_characters(self.tokenizer, one) for one in of_prompt] for of_prompt in generated]

    def logprobs(self, continuations: Sequence[Continuation], batch_size: int = 32) -> list[np.ndarray]:
        """See :class:`medllm.engine.Scores`.

        Raises:
            UserError: an empty prompt, or one that does not fit the context.
        """
        with self._on_mesh():
            return self._scorer.logprobs(continuations, batch_size)

    def _trainable(self, lora: LoraConfig | Adapter) -> DenseDecoder:
        """The model with a fresh adapter on top of those it has, or to train the last of these (``handover: continue``)."""
        opened = self._config
        if isinstance(lora, Adapter):
            opened = dataclasses.replace(opened, adapter=opened.adapters[:-1])
        self._release()
        with self._on_mesh():
            model = load_model(opened, lora=lora)
            lay_codes(model)
        return model

    def _devices(self) -> Devices:
        first = jax.devices()[0]
        sizes = {} if self._layout is None else self._layout.mesh.shape
        mesh = ",".join(f"{name}={size}" for name, size in sizes.items())
        return Devices(math.prod(sizes.values()), first.platform, first.device_kind, mesh)

    def _announce(self, recipe: Recipe, lora: LoraConfig, run: Run, data: TrainingData, what: str, tokens: int) -> None:
        epochs = data.steps[-1].epoch + 1 if data.steps else 0
        steps = min(recipe.training.max_steps or len(data.steps), len(data.steps))
        share = steps / max(1, len(data.steps))
        work = Work(what, round(tokens * epochs * share), steps)
        announce(self.name, self._config, recipe, lora, run.path, self._devices(), work)

    def _release(self) -> None:
        """Let go of the weights: there is one copy of the base at a time."""
        for held in ("model", "_decoder", "_scorer"):
            self.__dict__.pop(held, None)

    def _settings(self, recipe: Recipe, facts: dict[str, Any]) -> dict[str, object]:
        """What a trajectory depends on, in JSON's types."""
        loop = {
            name: value
            for name, value in dataclasses.asdict(recipe.training).items()
            if f"training.{name}" not in FREE_ON_RESUME
        }
        lora = dataclasses.asdict(recipe.lora)
        adapter = {name: list(value) if isinstance(value, tuple) else value for name, value in lora.items()}
        optimizer = dataclasses.asdict(recipe.optimizer)
        optimizer["betas"] = list(optimizer["betas"])
        weights = {"quantization": self._config.quantization, "dtype": self._config.dtype}
        return {**facts, "training": loop, "lora": adapter, "optimizer": optimizer, **weights}

    def _on_mesh(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._layout is None else self._layout.in_use()

    def _train(
        self,
        model: DenseDecoder,
        loss_fn: Callable[..., Any],
        data: TrainingData,
        recipe: Recipe,
        run: Run,
        facts: dict[str, Any],
    ) -> TrainSummary:
        """Train ``model`` and write its adapter; ``facts`` are what a trajectory depends on beside the settings."""
        training, settings = recipe.training, self._settings(recipe, facts)
        with self._on_mesh():
            chosen = None
            remat = training.remat
            if remat == "auto":
                batch = place_rows(data.largest())
                remat = chosen = fitting_policy(model, loss_fn, batch, accumulates=training.accumulation > 1)
            loss_fn = partial(loss_fn, remat=remat)
            trained = train(model, loss_fn, data, recipe.optimizer, training, run, settings=settings)
        folder = run.path / "adapter"
        assert model.lora is not None
        tensors = adapter_tensors(model)
        if is_primary_process():
            write_adapter(folder, model.lora, tensors, self._config.path)
        return TrainSummary(
            trained.steps,
            trained.loss,
            trained.seconds,
            trained.rate,
            str(folder),
            trained.compile_seconds,
            data.padding,
            chosen,
        )


def _reference_folder(recipe: PreferenceRecipe, data: PreferenceData, run: Run) -> Path | None:
    """Where the reference's log-probabilities are kept: where asked for, or in the run where a second epoch reads them."""
    if recipe.reference_cache is not None:
        return Path(recipe.reference_cache)
    steps = data.steps[: recipe.training.max_steps or None]
    return run.path if steps[-1].epoch > 0 else None


def _keep_compilations() -> None:
    """Keep compiled programs between processes, unless the user chose a place (or none) for them already."""
    if jax.config.jax_compilation_cache_dir is not None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "medllm" / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
