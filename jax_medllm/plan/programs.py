"""The programs of a stage, traced from shapes: the very functions that train and generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jax_medllm.generate.cached_decoder import CHUNK, Decoder, Fill, by_axes
from jax_medllm.mesh.layout import Layout, shardings
from jax_medllm.model.attention import Backend, backend_for, using
from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.model.logprobs import cut
from jax_medllm.model.rows import ResponseBatch
from jax_medllm.train.batches import CptBatch, PreferenceBatch
from jax_medllm.train.loop import cpt_loss_fn, make_step, preference_loss_fn
from jax_medllm.weights.blueprint import Blueprint
from jax_medllm.weights.code_layout import laid_codes
from medllm.architecture import Architecture
from medllm.config import LoraConfig, OptimizerConfig, PreferenceLoss, Sampling
from medllm.plan.request import held_as
from medllm.quantization import Quantization

_ROWS = ("batch",)
STEPS = 1000
"""Of a run, for its schedule; of no influence on the program."""


@dataclass(frozen=True)
class Traced:
    """One program.

    Attributes:
        name: What it does.
        traced: What compiles.
        takes: Kinds of arrays that are its arguments, as :class:`Stage` calls them.
        beside: Kinds that lie in memory meanwhile.
        runs: How often it runs for one run of the stage's unit of work.
        while_trips: Rounds of its loop whose end depends on what is computed.
    """

    name: str
    traced: jax.stages.Traced
    takes: tuple[str, ...]
    beside: tuple[str, ...] = ()
    runs: float = 1
    while_trips: int = 1


@dataclass(frozen=True)
class Stage:
    """What is planned.

    Attributes:
        programs: What runs.
        held: Arrays that stay in memory, by kind.
        tokens: Tokens of one run of the programs, over all devices.
    """

    programs: list[Traced]
    held: dict[str, Any]
    tokens: int


def trace(stage: str, settings: Mapping[str, Any], layout: Layout) -> Stage:
    """The programs of ``stage``, under a layout.

    Args:
        stage: ``cpt``, ``rpo`` or ``generate``.
        settings: As :class:`medllm.plan.request.Request` has them.
        layout: Of the devices planned for.
    """
    with layout.in_use(), using(_attention(settings, layout)):
        return _STAGES[stage](settings, layout)


def _attention(settings: Mapping[str, Any], layout: Layout) -> Backend | None:
    """The attention backend that the settings name, or that of the device planned for; None where the layout in use says it.

    A layout of one device is not in use, and attention would be that of the machine which plans.
    """
    if layout.mesh.size > 1 or "attention" in settings:
        return settings.get("attention")
    dtype = jnp.dtype(_types(settings)[1])
    with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):
        return backend_for(jax.ShapeDtypeStruct((1, 1, 1, Architecture.from_hf(settings["model"]).head_dim), dtype))


def _cpt(settings: Mapping[str, Any], layout: Layout) -> Stage:
    rows, length = settings["rows"] * layout.shards("batch"), settings["length"]
    tokens = _laid(jax.ShapeDtypeStruct((rows, length), jnp.int32), _ROWS, layout)
    batch = CptBatch(tokens, tokens, tokens, _laid(jax.ShapeDtypeStruct((), jnp.float32), (), layout))
    return _training(settings, layout, partial(cpt_loss_fn, remat=settings["remat"]), batch, (rows, length), length - 1)


def _rpo(settings: Mapping[str, Any], layout: Layout) -> Stage:
    rows, responses = settings["rows"] * layout.shards("batch"), settings["responses"]
    length = settings["prompt"] + responses * settings["response"]
    pairs = responses * (responses - 1) // 2

    def of(*shape: int, dtype: Any = jnp.int32) -> Any:
        return _laid(jax.ShapeDtypeStruct((rows, *shape), dtype), _ROWS, layout)

    batch = PreferenceBatch(
        ResponseBatch(of(length), of(length), of(length), of(length)), of(pairs, 2), of(pairs), of(pairs, dtype=jnp.float32)
    )
    loss_fn = partial(preference_loss_fn, loss_config=PreferenceLoss(), remat=settings["remat"])
    return _training(settings, layout, loss_fn, batch, (rows, length), responses * settings["response"])


def trace_step(settings: Mapping[str, Any], layout: Layout, loss_fn: Callable[..., Any], batch: Any) -> Stage:
    """The programs of an optimizer step over this very ``batch``, whose rows the layout divides."""
    shapes = jax.tree.map(lambda leaf: _laid(leaf, _ROWS if np.ndim(leaf) else (), layout), batch)
    shape = max((np.shape(leaf) for leaf in jax.tree.leaves(batch)), key=len)[:2]
    with layout.in_use(), using(_attention(settings, layout)):
        return _training(settings, layout, loss_fn, shapes, shape, shape[1])


def _training(
    settings: Mapping[str, Any],
    layout: Layout,
    loss_fn: Callable[..., Any],
    batch: Any,
    shape: tuple[int, int],
    predicted: int,
) -> Stage:
    """Gradients and update, of rows of this ``shape`` with so many ``predicted`` tokens each: the head runs over no others."""
    rows, length = shape
    model = _model(settings)
    pieces, chunk = cut(rows, length, model.config.vocab_size)
    head_rounds = -(-min(predicted, length // pieces) // chunk)
    graph, *states = nnx.split(model, LoraParam, ...)
    trainable, frozen = (_placed(state, layout) for state in states)
    frozen = laid_codes(frozen, lambda codes, form: jax.ShapeDtypeStruct(codes.shape, codes.dtype, sharding=form))
    step = make_step(graph, loss_fn, OptimizerConfig(), STEPS)
    # A moment lies where its parameter does.
    moments = jax.tree.map(
        lambda part: _placed(part, layout) if isinstance(part, nnx.State) else _laid(part, (), layout),
        jax.eval_shape(step.init, trainable),
        is_leaf=lambda part: isinstance(part, nnx.State),
    )
    index = _laid(jax.ShapeDtypeStruct((), jnp.int32), (), layout)
    gradients, update = step.trace(trainable, moments, index, frozen, batch)
    times = settings["accumulation"]
    beside = ("moments", "gradients") if times > 1 else ("moments",)
    programs = [
        Traced("gradients", gradients, ("base", "adapters"), beside, times, head_rounds),
        Traced("update", update, ("adapters", "moments", "gradients"), ("base",)),
    ]
    held = {"base": frozen, "adapters": trainable, "moments": moments, "gradients": trainable}
    return Stage(programs, held, rows * length * times)


def _generate(settings: Mapping[str, Any], layout: Layout) -> Stage:
    slots, length, prompt = settings["rows"], settings["length"], settings["prompt"]
    decoder = Decoder(_model(settings), ends=(0,))
    adapters, base = nnx.split_state(decoder.state, LoraParam, ...)
    adapters, base = _placed(adapters, layout), _placed(base, layout)
    shapes = jax.eval_shape(partial(decoder.empty, slots, length - CHUNK))
    cache = by_axes(lambda leaf, names: _laid(leaf, names, layout), shapes)
    few = max(1, slots // 4)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), few))
    tokens, numbers = (_laid(jax.ShapeDtypeStruct(shape, jnp.int32), (), layout) for shape in ((few, prompt), (few,)))
    fill = Fill(tokens, numbers, numbers, numbers, _laid(keys, (), layout))
    state = nnx.merge_state(adapters, base)
    filling, extending = decoder.trace(state, cache, fill, Sampling(max_new_tokens=length - prompt))
    held = {"base": base, "adapters": adapters, "cache": cache}
    kinds = tuple(held)
    programs = [Traced("extend", extending, kinds, while_trips=CHUNK), Traced("fill", filling, kinds, runs=0)]
    return Stage(programs, held, slots * CHUNK)


_STAGES: dict[str, Callable[[Mapping[str, Any], Layout], Stage]] = {"cpt": _cpt, "rpo": _rpo, "generate": _generate}


def _model(settings: Mapping[str, Any]) -> DenseDecoder:
    config = Architecture.from_hf(settings["model"])
    quantization, dtype = _types(settings)
    dense = tuple((kind, tuple(layers)) for kind, layers in settings.get("dense", {}).items())
    return Blueprint(config, LoraConfig(rank=settings["rank"]), quantization=quantization, dense=dense, dtype=dtype).model()


def _types(settings: Mapping[str, Any]) -> tuple[Quantization, Literal["float32", "bfloat16"]]:
    """How the linear layers are held, and the type of everything else, which ``dtype`` may name by itself."""
    quantization, dtype = held_as(settings["quantization"])
    return quantization, settings.get("dtype", dtype)


def _placed(state: nnx.State, layout: Layout) -> nnx.State:
    """Parameters' shapes, each where it is stored."""
    alone = layout.sharding(PartitionSpec()) if layout.mesh.size == 1 else None  # no layout is in use on one device
    where = shardings(state) if alone is None else jax.tree.map(lambda _: alone, state)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, where)


def _laid(leaf: Any, names: Sequence[str | None], layout: Layout) -> jax.ShapeDtypeStruct:
    """An array's shape on the mesh; axes without a name are whole."""
    names = (*names, *(None,) * (len(leaf.shape) - len(names)))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(layout.activation(leaf.shape, names)))
