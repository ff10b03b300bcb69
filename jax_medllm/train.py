"""The training loop of both stages, and the loss of one micro-batch of each.

``cpt_loss_fn`` and ``preference_loss_fn`` take a model and a batch and return the loss with what is logged; they are what a
parity test differentiates. ``train`` steps an optimizer over them. Only ``LoraParam`` arrays are trained: the base weights
enter the compiled step as an argument, are never copied and have no gradient.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import Progress

from jax_medllm.batches import CptBatch, PreferenceBatch, Step, target_mask
from jax_medllm.checkpoint import Checkpoints
from jax_medllm.logprobs import response_logprobs, token_logprobs
from jax_medllm.losses import PreferenceMetrics, cpt_loss, pair_logprobs, rpo_loss
from jax_medllm.model import LoraParam, Qwen2
from jax_medllm.optimizer import learning_rate, make_optimizer
from medllm.config import OptimizerConfig, PreferenceLoss, TrainingConfig
from medllm.errors import UserError
from medllm.run import Run


class CptMetrics(NamedTuple):
    """What continued pretraining logs: the token mean of the negative log-likelihood."""

    loss: Float[Array, ""]


class StepMetrics(NamedTuple):
    """Metrics of one optimizer step: those of the loss, the gradient norm before clipping, the learning rate it took."""

    loss: CptMetrics | PreferenceMetrics
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


_LOGGED_AS = {name: f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}


@dataclass(frozen=True)
class Task:
    """What is trained on.

    Attributes:
        loss_fn: Loss and metrics of one micro-batch; both add up over the micro-batches of a step.
        steps: The plan of the whole run.
        batch: Arrays of a step, with a leading axis of micro-batches.
        units: Tokens or pairs in a step, for the rate.
        unit: Their name.
        settings: What the trajectory depends on, for the check on resuming.
    """

    loss_fn: Callable[[Qwen2, Any], tuple[Array, Any]]
    steps: Sequence[Step]
    batch: Callable[[Step], Any]
    units: Callable[[Step], int]
    unit: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """How a run went: steps done, last logged loss, seconds in all, units a second without compilation."""

    steps: int
    loss: float
    seconds: float
    rate: float


def cpt_loss_fn(model: Qwen2, batch: CptBatch, *, remat: bool = False) -> tuple[Float[Array, ""], CptMetrics]:
    """Negative log-likelihood of packed rows, as a share of the token mean of the whole optimizer step."""
    hidden = model.hidden(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, remat=remat)
    logprobs = token_logprobs(hidden[:, :-1], model.head_weight(), batch.tokens[:, 1:])
    mask = target_mask(batch.segment_ids).astype(logprobs.dtype)
    loss = cpt_loss(logprobs, mask, 1.0) * batch.share
    return loss, CptMetrics(loss)


def preference_loss_fn(
    model: Qwen2, batch: PreferenceBatch, loss_config: PreferenceLoss, *, remat: bool = False
) -> tuple[Float[Array, ""], PreferenceMetrics]:
    """DPO or RPO of a batch of problems. The reference is the same model with its trained adapter off."""
    responses = batch.responses
    policy = response_logprobs(model, responses, remat=remat)
    reference = jax.lax.stop_gradient(response_logprobs(model, responses, adapter=False))
    mask = responses.response_mask.reshape(policy.shape).astype(policy.dtype)
    policy_sums, lengths = pair_logprobs(policy, mask, batch.pairs, batch.starts)
    reference_sums, _ = pair_logprobs(reference, mask, batch.pairs, batch.starts)
    return rpo_loss(
        policy_sums,
        reference_sums,
        lengths[:, 0],
        batch.weights,
        beta=loss_config.beta,
        alpha=loss_config.alpha,
        nll_reduction=loss_config.nll_reduction,
    )


def make_step(
    graph: nnx.GraphDef[Qwen2],
    loss_fn: Callable[[Qwen2, Any], tuple[Array, Any]],
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
) -> Callable[..., tuple[nnx.State, Any, StepMetrics]]:
    """The jitted optimizer step ``(trainable, optimizer state, step, frozen, batches) -> (trainable, state, metrics)``.

    Gradients of the micro-batches along the leading axis of ``batches`` are added up; the first two arguments are donated.
    """

    def loss_of(trainable, frozen, batch):
        return loss_fn(nnx.merge(graph, trainable, frozen), batch)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, optimizer_state, index, frozen, batches):
        def one(batch):
            (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable, frozen, batch)
            return gradients, metrics

        first = jax.tree.map(lambda leaf: leaf[0], batches)
        if jax.tree.leaves(batches)[0].shape[0] == 1:
            gradients, metrics = one(first)
        else:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, first))
            add = lambda total, batch: (jax.tree.map(jnp.add, total, one(batch)), None)  # noqa: E731
            (gradients, metrics), _ = jax.lax.scan(add, zeros, batches)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, trainable)
        logged = StepMetrics(metrics, optax.global_norm(gradients), schedule(index))
        return optax.apply_updates(trainable, updates), optimizer_state, logged

    return step


def train(
    model: Qwen2, task: Task, optimizer_config: OptimizerConfig, config: TrainingConfig, run: Run, *, resume: bool = False
) -> Trained:
    """Train the adapter of ``model`` in place, logging to and checkpointing into ``run``.

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
    trainable = jax.tree.map(jnp.copy, trainable)  # the step takes its arguments' memory; the model keeps its own until the end
    state = (trainable, optimizer.init(trainable))
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


class _Loop:
    """Steps, compiled once a shape, and their metrics, fetched only when they are logged."""

    def __init__(self, task: Task, step_fn: Any, frozen: Any, config: TrainingConfig, run: Run, checkpoints: Checkpoints):
        self._task = task
        self._step_fn = step_fn
        self._frozen = frozen
        self._config = config
        self._run = run
        self._checkpoints = checkpoints
        self._compiled: dict[Any, Any] = {}
        self._compile_seconds = 0.0
        self._pending: list[tuple[int, StepMetrics]] = []
        self._loss = math.nan

    def run_steps(self, state: tuple[Any, Any], start: int, last: int) -> tuple[tuple[Any, Any], Trained]:
        """Steps ``start`` … ``last - 1``; answers with the new state."""
        task, config = self._task, self._config
        started = mark = time.perf_counter()
        stepping = 0.0
        units = pending_units = 0
        batch = self._arrays(start) if start < last else None
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            shown = bar.add_task(f"training, {last} steps", total=last, completed=start)
            for index in range(start, last):
                *new, metrics = self._call(*state, jnp.int32(index), self._frozen, batch)
                state = (new[0], new[1])
                self._pending.append((index + 1, metrics))
                pending_units += task.units(task.steps[index])
                # The next batch is laid out while the device still works on this one.
                batch = self._arrays(index + 1) if index + 1 < last else None
                done = index + 1
                saving = config.checkpoint_every and done % config.checkpoint_every == 0
                if done % config.log_every == 0 or done == last or saving:
                    fetched = self._fetch()
                    seconds = time.perf_counter() - mark - self._compile_seconds
                    self._run.log(done, **fetched, **{f"{task.unit}_per_second": pending_units / max(seconds, 1e-9)})
                    units, stepping = units + pending_units, stepping + seconds
                    pending_units, self._compile_seconds = 0, 0.0
                    if saving:
                        self._checkpoints.save(state, done)
                    mark = time.perf_counter()
                bar.update(shown, completed=done)
        if start >= last:
            self._loss = self._logged_loss()
        elapsed = time.perf_counter() - started
        return state, Trained(steps=max(start, last), loss=self._loss, seconds=elapsed, rate=units / max(stepping, 1e-9))

    def _arrays(self, index: int) -> Any:
        return jax.tree.map(jnp.asarray, self._task.batch(self._task.steps[index]))

    def _call(self, *arguments: Any) -> Any:
        """The step compiled for these shapes; the time that takes is no part of the rate."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments[-1]))
        if shapes not in self._compiled:
            jax.block_until_ready(arguments[0])
            started = time.perf_counter()
            self._compiled[shapes] = self._step_fn.lower(*arguments).compile()
            self._compile_seconds += time.perf_counter() - started
        return self._compiled[shapes](*arguments)

    def _fetch(self) -> dict[str, float]:
        """Mean over the pending steps of the loss metrics and of the gradient norm, and the last learning rate."""
        steps = [(step, jax.tree.map(float, jax.device_get(metrics))) for step, metrics in self._pending]
        self._pending = []
        for step, metrics in steps:
            if not (math.isfinite(metrics.loss.loss) and math.isfinite(metrics.grad_norm)):
                raise UserError(
                    f"step {step}: the loss is {metrics.loss.loss} and its gradient's norm {metrics.grad_norm}; "
                    "lower optimizer.learning_rate or look at the data of that step"
                )
        mean = {
            _LOGGED_AS.get(name, name): sum(getattr(metrics.loss, name) for _, metrics in steps) / len(steps)
            for name in steps[0][1].loss._fields
        }
        self._loss = mean["loss"]
        norm = sum(metrics.grad_norm for _, metrics in steps) / len(steps)
        return {**mean, "learning_rate": steps[-1][1].learning_rate, "grad_norm": norm}

    def _logged_loss(self) -> float:
        """The last loss of an earlier session, for a run that was already complete."""
        lines = [line for line in self._run.metrics() if "loss" in line]
        return lines[-1]["loss"] if lines else math.nan
