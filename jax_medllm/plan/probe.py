"""The probe of ``medllm plan --calibrate``: a few layers of a model, run on the device that is here.

Beside the time of each step stands what a plan counts of the same step, so that :mod:`medllm.plan.calibration` can say by how
much a plan's roofline is too short on this device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_medllm.mesh.layout import Layout
from jax_medllm.model.attention import matmul_precision
from jax_medllm.plan.compiled import measure
from jax_medllm.plan.programs import trace
from jax_medllm.train.batches import PreferenceData, cpt_step, plan_steps
from jax_medllm.train.loop import cpt_loss_fn, preference_loss_fn
from jax_medllm.train.timed_steps import call_seconds, copy_bytes, timed_training
from jax_medllm.weights.random import random_model
from medllm.architecture import Architecture
from medllm.config import PreferenceLoss, TrainingConfig
from medllm.corpus.packing import PackedRows
from medllm.errors import UserError
from medllm.plan.request import held_as, row_length
from medllm.preferences.pairs import Rank
from medllm.preferences.tokenization import TokenizedGroup

DEPTHS = (2, 4)
"""Layers of the two models that are run. Not one: a loop of one round is no loop, and is compiled as none."""
_KINDS = {"gpu": "cuda", "cuda": "cuda", "tpu": "tpu", "cpu": "cpu"}
_MOST_TOKENS = 4096
"""Rows of the products by which the matrix rate is measured."""


def probe(*, stage: str, settings: dict[str, Any], kind: str | None, seconds: float) -> dict[str, Any]:
    """Run the step of a stage at two depths, and the products and a copy it is made of.

    Args:
        stage: ``cpt`` or ``rpo``.
        settings: As :class:`medllm.plan.request.Request` has them, with ``model``.
        kind: Of device that is expected (``cuda``, ``tpu``, ``cpu``); whatever is here when None.
        seconds: For all steps that are timed.

    Returns:
        ``device``, ``versions``, ``matrix_flops`` and ``copy_bytes`` (a second), and ``probes``: for each depth ``layers``,
        ``step_s``, and the plan's ``flops``, ``bytes`` and ``gib``.

    Raises:
        UserError: the device here is of another kind.
    """
    device = jax.devices()[0]
    here = _KINDS.get(device.platform, device.platform)
    if kind is not None and kind != here:
        raise UserError(
            f"--target asks for a {kind} device, and JAX sees {device.platform} ({device.device_kind}) here; leave it out"
        )
    layout = Layout.of("fsdp=1", "", [device])
    on_host = here == "cpu"
    rates = product_rates(settings, repeats=3 if on_host else 7, calls=1 if on_host else 5)
    return {
        "device": {"kind": here, "name": device.device_kind},
        "versions": {"jax": version("jax"), "jaxlib": version("jaxlib")},
        "products": rates,
        "matrix_flops": sum(rate["flops"] for rate in rates) / sum(rate["seconds"] for rate in rates),
        "copy_bytes": copy_bytes(2**28 if on_host else 2**31),
        "probes": [_at_depth(stage, settings, layers, layout, seconds / len(DEPTHS)) for layers in DEPTHS],
    }


def product_rates(settings: Mapping[str, Any], *, repeats: int, calls: int) -> list[dict[str, Any]]:
    """The products of a layer in the step's own layouts: forward ``x Wᵀ`` and backward ``g W``, with operations and seconds."""
    projections = Architecture.from_hf(settings["model"]).projections
    dtype = jnp.dtype(held_as(settings["quantization"])[1])
    tokens = min(_MOST_TOKENS, settings["rows"] * row_length(settings))
    found = []
    for name in ("q_proj", "k_proj", "up_proj"):
        out, into = projections[name].shape
        keys = jax.random.split(jax.random.key(0), 3)
        weight, x, slope = (
            jax.random.normal(key, shape, dtype)
            for key, shape in zip(keys, ((out, into), (tokens, into), (tokens, out)), strict=True)
        )
        for way, letters, left in (("forward", "ni,oi->no", x), ("backward", "no,oi->ni", slope)):
            product = jax.jit(partial(jnp.einsum, letters, precision=matmul_precision(dtype)))
            took = call_seconds(product, left, weight, repeats=repeats, calls=calls)
            found.append({"name": f"{name} {way}", "flops": 2 * tokens * out * into, "seconds": took})
    return found


def planned(stage: str, settings: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """What a plan says of a step on the device that is here: ``layers``, ``flops``, ``bytes`` (None: not known), ``gib``."""
    found = measure(trace(stage, settings, layout), layout)
    return {
        "layers": Architecture.from_hf(settings["model"]).num_layers,
        "flops": found["flops"],
        "bytes": found.get("bytes"),
        "gib": sum(found["by_kind"].values()),
    }


def _at_depth(stage: str, settings: dict[str, Any], layers: int, layout: Layout, seconds: float) -> dict[str, Any]:
    model = replace(Architecture.from_hf(settings["model"]), num_layers=layers)
    settings = {**settings, "model": model.to_hf(), "accumulation": 1}
    loss_fn, batches = random_step(stage, settings)
    quantization, dtype = held_as(settings["quantization"])
    weights = random_model(
        model,
        quantization=quantization,
        dtype=dtype,
        rank=settings["rank"],
    )
    ran = timed_training(weights, loss_fn, batches, seconds)
    return {**planned(stage, settings, layout), **{name: ran[name] for name in ("step_s", "steps_s", "compile_s")}}


def random_step(stage: str, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The loss and the micro-batches of a step of random tokens."""
    config = TrainingConfig(epochs=1, batch_size=settings["rows"], accumulation=1)
    rng = np.random.default_rng(0)
    vocabulary = Architecture.from_hf(settings["model"]).vocab_size
    if stage == "cpt":
        shape = (settings["rows"], settings["length"])
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
        rows = PackedRows(rng.integers(1, vocabulary, shape).astype(np.int32), np.ones(shape, np.int32), positions)
        return partial(cpt_loss_fn, remat=settings["remat"]), cpt_step(rows, plan_steps(shape[0], config)[0])
    groups = [_group(rng, vocabulary, settings) for _ in range(settings["rows"])]
    data = PreferenceData(groups, config)
    loss_fn = partial(preference_loss_fn, loss_config=PreferenceLoss(), remat=settings["remat"])
    return loss_fn, data.batches(data.steps[0])


def _group(rng: np.random.Generator, vocabulary: int, settings: Mapping[str, Any]) -> TokenizedGroup:
    """A problem all of whose responses are paired."""
    count = settings["responses"]
    pairs = tuple(combinations(range(count), 2))
    return TokenizedGroup(
        problem_id="generated",
        prompt=tuple(rng.integers(1, vocabulary, settings["prompt"]).tolist()),
        responses=tuple(tuple(row) for row in rng.integers(1, vocabulary, (count, settings["response"])).tolist()),
        ranks=(Rank.GROUND_TRUTH, *[Rank.CHOSEN] * (count - 2), Rank.REJECTED),
        pairs=pairs,
        pair_starts=(0,) * len(pairs),
    )
