"""Where arrays lie: logical axes, the rules that spread them over a mesh, and the gathers of a step.

A parameter has the logical axes that :mod:`medllm.architecture` or the layer gives it, an activation names its own where it is
made. :data:`medllm.axes.RULES` says over which axes of the mesh each is spread; what it does not name stays whole.

A weight may be spread over the mesh axes that also hold rows or positions. It is *stored* so; where it is *used* every device
needs all of what those axes hold, and gathers it: an NF4 weight as its packed codes, a quarter of the bytes of the bf16 weight
they stand for, before it is dequantized (:func:`gathered`). The same array is gathered anew in the backward pass.

Nothing here changes what is computed. Without a layout in use (:meth:`Layout.in_use`) every function returns its argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from medllm.axes import MESH_AXES, RULES, Axis
from medllm.errors import UserError

Batch = TypeVar("Batch")
State = TypeVar("State")

_IN_USE = jax.make_user_context(default_value=None)


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that spread arrays over it.

    Attributes:
        mesh: The devices; they need not be there, as long as nothing runs.
        rules: Logical axis → mesh axes, as items, so that layouts compare.
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...] = tuple(RULES.items())

    @classmethod
    def of(cls, mesh: str, rules: str = "", devices: Sequence[Any] | None = None) -> Layout:
        """From what a command line says.

        Args:
            mesh: ``fsdp=8,tensor=2``. One axis may be ``-1``: the devices that are left.
            rules: Changes to the table: ``mlp=tensor,embed=fsdp+data``; nothing after the sign keeps an axis whole.
            devices: All there are, when unset.

        Raises:
            UserError: an unknown name, or sizes that do not multiply to the number of devices.
        """
        devices = list(jax.devices() if devices is None else devices)
        sizes = _sizes(mesh, len(devices))
        # An axis of one device would only add collectives among one.
        shape = {name: size for name, size in sizes.items() if size > 1} or {next(iter(MESH_AXES)): 1}
        array = _arranged(devices, tuple(shape.values()))
        return cls(Mesh(array, tuple(shape), axis_types=(AxisType.Auto,) * len(shape)), _parsed_rules(rules))

    def in_use(self) -> AbstractContextManager[None]:
        """Arrays are laid out so in what is traced within."""
        return _IN_USE(self)

    def shards(self, name: str) -> int:
        """Pieces a logical axis is cut into."""
        return self._count(self._mesh_axes(name))

    def pieces(self, part: Any) -> int:
        """Pieces that an entry of a ``PartitionSpec`` cuts an axis into."""
        return self._count(entry(part))

    def stored(self, axes: Sequence[Axis], array: str = "an array") -> PartitionSpec:
        """How a parameter with these axes is kept.

        Args:
            axes: Its axes.
            array: What an error calls it.

        Raises:
            UserError: two axes are spread over the same mesh axis, or an axis does not divide.
        """
        taken: dict[str, str] = {}
        entries = []
        for axis in axes:
            over = self._mesh_axes(axis.name)
            for mesh_axis in over:
                if mesh_axis in taken:
                    raise UserError(
                        f"{array}: its axes {taken[mesh_axis]} and {axis.name} are both spread over the mesh axis {mesh_axis}; "
                        f"give one of them another, as in --rules {axis.name}="
                    )
                taken[mesh_axis] = axis.name
            entries.append(self._divided(axis, over, array))
        return _spec(entries)

    def used(self, axes: Sequence[Axis]) -> PartitionSpec:
        """How a parameter is laid out where it is used: whole along the mesh axes that hold rows and positions."""
        stored = self.stored(axes)
        return _spec([tuple(mesh_axis for mesh_axis in entry(part) if mesh_axis not in self._held) for part in stored])

    def activation(self, shape: Sequence[int], names: Sequence[str | None], first: str | None = None) -> PartitionSpec:
        """How an activation is laid out: mesh axes that hold rows and positions hold nothing else, but for those of ``first``,
        which has them before all others. An axis that its mesh axes do not divide stays whole."""
        to_first = frozenset(self._mesh_axes(first)) if first else frozenset()
        entries: list[tuple[str, ...]] = []
        for size, name in zip(shape, names, strict=True):
            elsewhere = frozenset() if name == first else to_first if name in ("batch", "sequence") else to_first | self._held
            over = tuple(mesh_axis for mesh_axis in (self._mesh_axes(name) if name else ()) if mesh_axis not in elsewhere)
            entries.append(() if size % self._count(over) else over)
        return _spec(entries)

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """On this mesh."""
        return NamedSharding(self.mesh, spec)

    def _mesh_axes(self, name: str) -> tuple[str, ...]:
        return tuple(mesh_axis for mesh_axis in dict(self.rules).get(name, ()) if self.mesh.shape.get(mesh_axis, 1) > 1)

    def _divided(self, axis: Axis, over: tuple[str, ...], array: str) -> tuple[str, ...]:
        while over and axis.may_stay_whole and axis.size % self._count(over):
            over = over[:-1]
        in_use = tuple(mesh_axis for mesh_axis in over if mesh_axis not in self._held)
        for size, what, spread in ((axis.size, f"{axis.size}", over), (axis.parts or 0, f"{axis.parts} heads", in_use)):
            if size % self._count(spread):
                would = [n for n in range(1, 2 * self._count(spread) + 1) if size % n == 0]
                raise UserError(
                    f"{array}: its axis {axis.name} of {what} does not divide over {'+'.join(spread)}={self._count(spread)}; "
                    f"it would over {', '.join(map(str, would))}; another --mesh, or --rules {axis.name}= with fewer mesh axes"
                )
        return over

    def _count(self, mesh_axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[mesh_axis] for mesh_axis in mesh_axes)

    @property
    def _held(self) -> frozenset[str]:
        """Mesh axes that hold rows and positions."""
        return frozenset((*self._mesh_axes("batch"), *self._mesh_axes("sequence")))


def in_use() -> Layout | None:
    """The layout of what is being traced; None where there is none, or its mesh has one device."""
    layout: Layout | None = _IN_USE.value
    return None if layout is None or layout.mesh.size == 1 else layout


def constrain(x: Array, *names: str | None, first: str | None = None) -> Array:
    """``x``, an activation with these logical axes (None: whole), laid out by :meth:`Layout.activation`."""
    layout = in_use()
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(layout.activation(x.shape, names, first)))


def gathered(x: Array, axes: Sequence[Axis], used_as: Sequence[Axis] | None = None) -> Array:
    """A parameter where it is used (:meth:`Layout.used`, of ``used_as`` where its axes are others there). Its gradient goes
    back to where the parameter is stored."""
    layout = in_use()
    if layout is None:
        return x
    stored, used = (layout.sharding(spec) for spec in (layout.stored(axes), layout.used(used_as or axes)))
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.lax.with_sharding_constraint(x, used)
    return _gather(stored, used, x)


def shardings(state: nnx.State) -> nnx.State:
    """Where the parameters of ``state`` are stored under the layout in use, in its structure.

    Raises:
        UserError: as :meth:`Layout.stored`.
    """
    return nnx.from_flat_state(
        {path: variable.replace(placement(variable, path)) for path, variable in nnx.to_flat_state(state)}
    )


def placement(variable: nnx.Variable, path: Sequence[Any]) -> Sharding:
    """Where a parameter is stored: under the layout in use, else on the default device.

    Raises:
        UserError: as :meth:`Layout.stored`; the path says which parameter.
    """
    layout = in_use()
    if layout is None:
        return SingleDeviceSharding(jax.config.jax_default_device or jax.local_devices()[0])
    return layout.sharding(layout.stored(variable.axes, ".".join(map(str, path))))


def device_bytes(arrays: Any) -> int:
    """Bytes on one device of arrays, or of their shapes with where they lie."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def place_parameter(array: np.ndarray, variable: nnx.Variable, path: Sequence[Any]) -> Array:
    """A host array as the value of a parameter, each device with its part."""
    if in_use() is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, placement(variable, path), lambda index: array[index])


def laid_out(state: nnx.State) -> nnx.State:
    """Parameters, or what has their axes, kept where parameters are stored."""
    return state if in_use() is None else jax.tree.map(jax.lax.with_sharding_constraint, state, shardings(state))


def place_rows(batch: Batch) -> Batch:
    """Host arrays whose first axis are rows, on the devices that compute them; scalars on all.

    Where the devices do not divide the rows, rows of zeros are added: no token, no target, no weight. Every process calls this
    with the whole batch and sends its own devices theirs.
    """
    layout = in_use()
    if layout is None:
        return jax.tree.map(jnp.asarray, batch)

    def place(array: Any) -> Array:
        array = np.asarray(array, jax.dtypes.canonicalize_dtype(np.asarray(array).dtype))
        if array.ndim:
            array = np.pad(array, ((0, -len(array) % layout.shards("batch")), *[(0, 0)] * (array.ndim - 1)))
        spec = layout.activation(array.shape, ("batch", *[None] * (array.ndim - 1))[: array.ndim])
        return jax.make_array_from_callback(array.shape, layout.sharding(spec), lambda index: array[index])

    return jax.tree.map(place, batch)


def on_all_devices(state: State) -> State:
    """``state`` with what lies on one device alone, an optimizer's counters, on all of them: no process has all devices."""
    layout = in_use()
    if layout is None:
        return state
    all_devices = layout.sharding(PartitionSpec())

    def spread(leaf: Array) -> Array:
        return leaf if len(leaf.sharding.device_set) > 1 else jax.device_put(leaf, all_devices)

    return jax.tree.map(spread, state)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(stored: NamedSharding, used: NamedSharding, x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, used)


def _gather_forward(stored: NamedSharding, used: NamedSharding, x: Array) -> tuple[Array, None]:
    return _gather(stored, used, x), None


def _gather_backward(stored: NamedSharding, used: NamedSharding, _: None, slope: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(slope, stored),)


_gather.defvjp(_gather_forward, _gather_backward)


def entry(part: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a ``PartitionSpec`` names."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _spec(entries: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(over[0] if len(over) == 1 else over or None for over in entries))


def _arranged(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices in the form of a mesh; the chips of a TPU slice in the order that JAX recommends for the links between them."""
    if devices[0].platform == "tpu" and len({getattr(device, "slice_index", 0) for device in devices}) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(shape)


def _parsed_mesh(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in MESH_AXES:
            raise UserError(f"--mesh {text}: no mesh axis is called {name!r}; there are {', '.join(MESH_AXES)}")
        if name in sizes:
            raise UserError(f"--mesh {text}: {name} comes twice")
        if not (size.isdigit() and int(size) > 0) and size != "-1":
            raise UserError(f"--mesh {text}: {name} is {size!r}; a number of devices is needed, or -1 for those that are left")
        sizes[name] = int(size)
    return sizes


def _sizes(text: str, devices: int) -> dict[str, int]:
    """All axes in the order of MESH_AXES, the open one filled in."""
    given = _parsed_mesh(text)
    open_axes = [name for name, size in given.items() if size == -1]
    known = math.prod(size for size in given.values() if size != -1)
    if len(open_axes) > 1:
        raise UserError(f"--mesh {text}: only one axis can be -1")
    if devices % known or (not open_axes and known != devices):
        raise UserError(f"--mesh {text}: its sizes multiply to {known}, and there are {devices} devices; they must agree")
    return {name: devices // known if given.get(name) == -1 else given.get(name, 1) for name in MESH_AXES}


def _parsed_rules(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    rules = dict(RULES)
    for part in filter(None, text.split(",")):
        name, sign, over = (word.strip() for word in part.partition("="))
        if name not in RULES:
            raise UserError(f"--rules {text}: no logical axis is called {name!r}; there are {', '.join(RULES)}")
        mesh_axes = tuple(filter(None, over.split("+")))
        unknown = [axis for axis in mesh_axes if axis not in MESH_AXES]
        if unknown or not sign:
            raise UserError(
                f"--rules {text}: {name} is spread over {over!r}; name mesh axes ({', '.join(MESH_AXES)}) joined by +, or none"
            )
        if len(set(mesh_axes)) < len(mesh_axes):
            raise UserError(f"--rules {text}: {name} names a mesh axis twice")
        rules[name] = mesh_axes
    return tuple(rules.items())
