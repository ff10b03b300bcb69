"""The training loop of both stages, and the loss of one micro-batch of each.

``cpt_loss_fn`` and ``preference_loss_fn`` take a model and a batch and return the loss with what is logged; they are what a
parity test differentiates. ``train`` steps an optimizer over them. Only ``LoraParam`` arrays are trained: the base weights
enter the compiled step as an argument, are never copied and have no gradient.

The device never waits for the host: batches are laid out by threads ahead of time and put on the device a step early, and a
step's metrics are fetched when the next one is under way.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import Progress

from jax_medllm.batches import CptBatch, PreferenceBatch, Step, target_mask
from jax_medllm.checkpoint import Checkpoints
from jax_medllm.host_memory import release_free_memory
from jax_medllm.logprobs import response_logprobs, token_logprobs
from jax_medllm.losses import PreferenceMetrics, cpt_loss, pair_logprobs, rpo_loss
from jax_medllm.model import LoraParam, Qwen2
from jax_medllm.optimizer import learning_rate, make_optimizer
from jax_medllm.sharding import laid_out, on_all_devices, place_rows
from medllm.config import OptimizerConfig, PreferenceLoss, RematPolicy, TrainingConfig
from medllm.errors import UserError
from medllm.processes import is_primary_process
from medllm.run import Run


class CptMetrics(NamedTuple):
    """What continued pretraining logs: the token mean of the negative log-likelihood."""

    loss: Float[Array, ""]


class StepMetrics(NamedTuple):
    """Metrics of one optimizer step: those of the loss, the gradient norm before clipping, the learning rate it took."""

    loss: CptMetrics | PreferenceMetrics
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


_AHEAD = 2
"""Steps given to the device whose results are not there yet: one at work and one waiting."""
_LAID_OUT = 4
"""Steps whose arrays are laid out ahead of time."""

_LOGGED_AS = {name: f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}


@dataclass(frozen=True)
class Task:
    """What is trained on.

    Attributes:
        loss_fn: Loss and metrics of one micro-batch; both add up over the micro-batches of a step.
        steps: The plan of the whole run.
        batches: Arrays of each micro-batch of a step. Called from several threads.
        units: Tokens or pairs in a step, for the rate.
        unit: Their name.
        settings: What the trajectory depends on, for the check on resuming.
    """

    loss_fn: Callable[..., tuple[Array, Any]]
    steps: Sequence[Step]
    batches: Callable[[Step], Sequence[Any]]
    units: Callable[[Step], int]
    unit: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """How a run went: steps done, last logged loss, seconds in all, units a second after the first step and without
    compilation, seconds of that."""

    steps: int
    loss: float
    seconds: float
    rate: float
    compile_seconds: float


def cpt_loss_fn(model: Qwen2, batch: CptBatch, *, remat: RematPolicy = "none") -> tuple[Float[Array, ""], CptMetrics]:
    """Negative log-likelihood of packed rows, as a share of the token mean of the whole optimizer step."""
    hidden = model.hidden(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, remat=remat)
    # The row keeps its length, which devices may share out; its last position predicts nothing.
    mask = jnp.pad(target_mask(batch.segment_ids), ((0, 0), (0, 1)))
    logprobs = token_logprobs(hidden, model.head_weight(), jnp.roll(batch.tokens, -1, axis=1), mask)
    loss = cpt_loss(logprobs, mask.astype(logprobs.dtype), 1.0) * batch.share
    return loss, CptMetrics(loss)


def preference_loss_fn(
    model: Qwen2, batch: PreferenceBatch, loss_config: PreferenceLoss, *, remat: RematPolicy = "none"
) -> tuple[Float[Array, ""], PreferenceMetrics]:
    """DPO or RPO of a batch of problems. The reference is the same model with its trained adapter off."""
    responses = batch.responses
    policy = response_logprobs(model, responses, remat=remat)
    policy_sums, lengths = _sums(policy, batch)
    reference_sums = batch.reference
    if reference_sums is None:
        reference_sums = reference_logprobs(model, batch)
    policy_sums, reference_sums = (sums.reshape(-1, 2) for sums in (policy_sums, reference_sums))
    return rpo_loss(
        policy_sums,
        reference_sums,
        lengths[..., 0].reshape(-1),
        batch.weights.reshape(-1),
        beta=loss_config.beta,
        alpha=loss_config.alpha,
        nll_reduction=loss_config.nll_reduction,
    )


def reference_logprobs(model: Qwen2, batch: PreferenceBatch) -> Float[Array, "n k 2"]:
    """Summed log-probabilities of both responses of each pair with the trained adapter off; no gradient flows."""
    return jax.lax.stop_gradient(_sums(response_logprobs(model, batch.responses, adapter=False), batch)[0])


def _sums(logprobs: Float[Array, "n s"], batch: PreferenceBatch) -> tuple[Float[Array, "n k 2"], Float[Array, "n k 2"]]:
    return pair_logprobs(logprobs, batch.responses.responses, batch.responses.offsets, batch.pairs, batch.starts)


class TrainingStep(NamedTuple):
    """The optimizer step, as jitted parts: micro-batches of different shapes compile ``gradients`` alone anew.

    Attributes:
        gradients: ``(trainable, frozen, batch) -> (gradients, metrics)`` of one micro-batch.
        add: ``(total, part) -> total``, into the memory of the first.
        update: ``(trainable, optimizer state, step, total) -> (trainable, state, metrics)``; the first two are donated.
    """

    gradients: jax.stages.Wrapped
    add: jax.stages.Wrapped
    update: jax.stages.Wrapped

    def __call__(
        self, trainable: nnx.State, optimizer_state: Any, index: Array, frozen: Any, batches: Sequence[Any]
    ) -> tuple[nnx.State, Any, StepMetrics]:
        """One optimizer step over the summed gradients of its micro-batches; the first two arguments are donated."""
        total = None
        for batch in batches:
            part = self.gradients(trainable, frozen, batch)
            total = part if total is None else self.add(total, part)
        return self.update(trainable, optimizer_state, index, total)

    def trace(
        self, trainable: nnx.State, optimizer_state: Any, index: Any, frozen: Any, batch: Any
    ) -> tuple[jax.stages.Traced, jax.stages.Traced]:
        """``gradients`` and ``update`` for one micro-batch, traced and ready to lower; of all arguments the shapes suffice."""
        _, metrics = jax.eval_shape(self.gradients, trainable, frozen, batch)
        total = (trainable, metrics)  # a gradient lies where its parameter does
        return self.gradients.trace(trainable, frozen, batch), self.update.trace(trainable, optimizer_state, index, total)


def make_gradients(graph: nnx.GraphDef[Qwen2], loss_fn: Callable[[Qwen2, Any], tuple[Array, Any]]) -> jax.stages.Wrapped:
    """``(trainable, frozen, batch) -> (gradients, metrics)`` of one micro-batch."""

    @jax.jit
    def gradients(trainable, frozen, batch):
        def loss_of(trainable):
            return loss_fn(nnx.merge(graph, trainable, frozen), batch)

        (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        return laid_out(gradients), metrics

    return gradients


def make_step(
    graph: nnx.GraphDef[Qwen2],
    loss_fn: Callable[[Qwen2, Any], tuple[Array, Any]],
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
) -> TrainingStep:
    """The optimizer step ``(trainable, optimizer state, step, frozen, batches) -> (trainable, state, metrics)``."""

    @partial(jax.jit, donate_argnums=0)
    def add(total, part):
        return jax.tree.map(jnp.add, total, part)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(trainable, optimizer_state, index, total):
        gradients, metrics = total
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, trainable)
        logged = StepMetrics(metrics, optax.global_norm(gradients), schedule(index))
        return optax.apply_updates(trainable, updates), optimizer_state, logged

    return TrainingStep(make_gradients(graph, loss_fn), add, update)


def train(
    model: Qwen2, task: Task, optimizer_config: OptimizerConfig, config: TrainingConfig, run: Run, *, resume: bool = False
) -> Trained:
    """Train the adapter of ``model`` in place, logging to and checkpointing into ``run``.

    The step takes its arguments' memory: until the end, and where training fails, the model has no adapter to compute with.

    Raises:
        UserError: there is nothing to train on, the loss is no longer finite, or the checkpoint is of another run.
    """
    total = len(task.steps)
    if not total:
        raise UserError(f"there are no {task.unit} to train on: the data gave no unit")
    last = min(total, config.max_steps) if config.max_steps else total
    graph, trainable, *others = nnx.split(model, LoraParam, ...)
    optimizer = make_optimizer(optimizer_config, total)
    step_fn = make_step(graph, task.loss_fn, optimizer, partial(learning_rate, optimizer_config, total))
    state = (trainable, on_all_devices(optimizer.init(trainable)))
    checkpoints = Checkpoints(run.path / "checkpoints", {**task.settings, "steps": total})
    loop = _Loop(task, step_fn, others[0], config, run, checkpoints)
    try:
        start = 0
        restored = checkpoints.restore(state) if resume else None
        if restored is not None:
            state, position = restored
            start = position.step
            run.forget_after(start)
        state, trained = loop.run_steps(state, start, last)
        checkpoints.save(state, trained.steps)
    finally:
        checkpoints.close()
    nnx.update(model, state[0])
    return trained


class _Compiled:
    """A jitted function, compiled once for each shape of its last argument; how long that took is no part of the rate."""

    def __init__(self, function: Any):
        self._function = function
        self._programs: dict[Any, Any] = {}
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments[-1]))
        if shapes not in self._programs:
            jax.block_until_ready(arguments)
            started = time.perf_counter()
            self._programs[shapes] = self._function.lower(*arguments).compile()
            release_free_memory()
            self.seconds += time.perf_counter() - started
        return self._programs[shapes](*arguments)


class _Loop:
    """Steps and their metrics. The host runs ahead of the device by :data:`_AHEAD` steps at most."""

    def __init__(
        self, task: Task, step_fn: TrainingStep, frozen: Any, config: TrainingConfig, run: Run, checkpoints: Checkpoints
    ):
        self._task = task
        self._parts = [_Compiled(part) for part in step_fn]
        self._step_fn = TrainingStep(*self._parts)
        self._frozen = frozen
        self._config = config
        self._checkpoints = checkpoints
        self._log = _Log(run, task.unit)

    def run_steps(self, state: tuple[Any, Any], start: int, last: int) -> tuple[tuple[Any, Any], Trained]:
        """Steps ``start`` … ``last - 1``; answers with the new state."""
        config, log = self._config, self._log
        log.start()
        started = time.perf_counter()
        under_way: deque[StepMetrics] = deque()
        batches = self._batches(start, last)
        batch = next(batches, ())
        watched = sys.stderr.isatty() and is_primary_process()
        with Progress(console=Console(stderr=True), transient=True, disable=not watched) as bar:
            shown = bar.add_task(f"training, {last} steps", total=last, completed=start)
            for done in range(start + 1, last + 1):
                *new, metrics = self._step_fn(*state, np.int32(done - 1), self._frozen, batch)
                state = (new[0], new[1])
                batch = next(batches, ())
                log.write(self._compile_seconds)  # of earlier steps, with this one under way
                log.add(done, metrics, self._task.units(self._task.steps[done - 1]))
                if done == start + 1:
                    jax.block_until_ready(metrics)  # the one time that the host waits: to know when the first step was over
                    log.first_is_done(self._compile_seconds)
                if done % config.log_every == 0:
                    log.close()
                if done == last or (config.checkpoint_every and done % config.checkpoint_every == 0):
                    log.close()
                    log.write(self._compile_seconds)
                    self._checkpoints.save(state, done)
                under_way.append(metrics)
                if len(under_way) > _AHEAD:
                    jax.block_until_ready(under_way.popleft())
                bar.update(shown, completed=done)
        return state, Trained(
            steps=max(start, last),
            loss=log.last_loss(),
            seconds=time.perf_counter() - started,
            rate=log.rate,
            compile_seconds=self._compile_seconds,
        )

    def _batches(self, start: int, last: int) -> Iterator[Sequence[Any]]:
        """Each step's micro-batches on the device, laid out ahead of time, in the order of the plan."""
        steps = grain.MapDataset.source(list(self._task.steps[start:last])).map(self._task.batches)
        read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_LAID_OUT)
        return ([place_rows(batch) for batch in batches] for batches in steps.to_iter_dataset(read))

    @property
    def _compile_seconds(self) -> float:
        return sum(part.seconds for part in self._parts)


@dataclass
class _Window:
    """Steps that share a line of the log, and the tokens or pairs in them."""

    steps: list[tuple[int, StepMetrics]]
    units: int = 0


@dataclass(frozen=True)
class _Rated:
    """From where on the rate counts: the time, and the seconds of compilation and the units there were until then."""

    began: float
    compiled: float = 0.0
    units: int = 0


class _Log:
    """Lines of ``metrics.jsonl``: means over windows of steps, fetched from the device when they are written."""

    def __init__(self, run: Run, unit: str):
        self._run = run
        self._unit = unit
        self._open, self._closed = _Window([]), _Window([])
        self._units = 0
        self._loss: float | None = None
        self._compiled = 0.0
        self._mark = time.perf_counter()
        self._rated = _Rated(self._mark)
        self._after_first: _Rated | None = None

    def start(self) -> None:
        """Time runs from here."""
        self._mark = time.perf_counter()
        self._rated = _Rated(self._mark)

    def first_is_done(self, compile_seconds: float) -> None:
        """The first step, just added and over, pays for allocations: where another follows, the rate counts from here."""
        self._after_first = _Rated(time.perf_counter(), compile_seconds, self._open.units)

    def add(self, step: int, metrics: StepMetrics, units: int) -> None:
        """A step that was started."""
        self._open.steps.append((step, metrics))
        self._open.units += units

    def close(self) -> None:
        """What was added since the last line makes the next."""
        if self._open.steps:
            self._closed, self._open = self._open, _Window([])

    def write(self, compile_seconds: float) -> None:
        """Write the closed window's line, where there is one: waits until its steps are done.

        Raises:
            UserError: a loss or a gradient is not finite.
        """
        if not self._closed.steps:
            return
        window, self._closed = self._closed, _Window([])
        steps = [(step, jax.tree.map(float, jax.device_get(metrics))) for step, metrics in window.steps]
        now = time.perf_counter()
        seconds = max(now - self._mark - (compile_seconds - self._compiled), 1e-9)
        self._mark, self._compiled = now, compile_seconds
        self._units += window.units
        if self._after_first is not None and self._units > self._after_first.units:  # there is a second step
            self._rated = self._after_first
        means = _means(steps)
        self._loss = means["loss"]
        self._run.log(steps[-1][0], **means, **{f"{self._unit}_per_second": window.units / seconds})

    @property
    def rate(self) -> float:
        """Units a second over all steps but the first, without compilation; of the first if it is the only one."""
        since = self._rated
        seconds = self._mark - since.began - (self._compiled - since.compiled)
        return (self._units - since.units) / max(seconds, 1e-9)

    def last_loss(self) -> float:
        """The last loss of this session, or of an earlier one that completed the run."""
        if self._loss is not None:
            return self._loss
        lines = [line for line in self._run.metrics() if "loss" in line]
        return lines[-1]["loss"] if lines else math.nan


def _means(steps: Sequence[tuple[int, StepMetrics]]) -> dict[str, float]:
    """Means over steps of the loss metrics and of the gradient norm, and the last learning rate."""
    for step, metrics in steps:
        if not (math.isfinite(metrics.loss.loss) and math.isfinite(metrics.grad_norm)):
            raise UserError(
                f"step {step}: the loss is {metrics.loss.loss} and its gradient's norm {metrics.grad_norm}; "
                "lower optimizer.learning_rate or look at the data of that step"
            )
    found = [metrics for _, metrics in steps]
    means = {
        _LOGGED_AS.get(name, name): sum(getattr(metrics.loss, name) for metrics in found) / len(found)
        for name in found[0].loss._fields
    }
    norm = sum(metrics.grad_norm for metrics in found) / len(found)
    return {**means, "learning_rate": found[-1].learning_rate, "grad_norm": norm}
