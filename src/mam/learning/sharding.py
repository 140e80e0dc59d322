"""Many devices as one: every device runs the same program on its share of the environments.

What is to be known of all environments is asked of `Shard`, which on a single device answers with
what it is given. Parameters are the same on every device; gradients are summed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Int, PyTree

AXIS = "devices"


@dataclass(frozen=True)
class Shard:
    """This device's share, inside a program that `num_shards` devices run together (`Devices.share`)."""

    num_shards: int = 1

    @property
    def index(self) -> Int[Array, ""] | int:
        """Which share this is."""
        return lax.axis_index(AXIS) if self.num_shards > 1 else 0

    def part(self, x: Array, axis: int = 0) -> Array:
        """This device's part of an array that all have whole."""
        if self.num_shards == 1:
            return x
        size = x.shape[axis] // self.num_shards
        return lax.dynamic_slice_in_dim(x, self.index * size, size, axis)

    def gather(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Arrays whole, from everybody's part."""
        if self.num_shards == 1:
            return tree
        return jax.tree.map(lambda x: lax.all_gather(x, AXIS, axis=axis, tiled=True), tree)

    def sum(self, tree: PyTree) -> PyTree:
        """Sum over devices. Not to be differentiated: take gradients of shares, and sum those."""
        return lax.psum(tree, AXIS) if self.num_shards > 1 else tree

    def max(self, tree: PyTree) -> PyTree:
        """Maxima over devices."""
        return lax.pmax(tree, AXIS) if self.num_shards > 1 else tree


WHOLE = Shard()  # that of a single device


@dataclass(frozen=True)
class Devices:
    """The devices a run is spread over: those of all its processes, in one row."""

    num_devices: int = 1

    @property
    def shard(self) -> Shard:
        """The share of each."""
        return Shard(self.num_devices)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The row."""
        return jax.make_mesh(
            (self.num_devices,),
            (AXIS,),
            (jax.sharding.AxisType.Auto,),
            devices=jax.devices()[: self.num_devices],
        )

    def share(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Run a function on every device; specs say which axes are dealt out. With one device, the function itself."""
        if self.num_devices == 1:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def place(self, shapes: PyTree, specs: PyTree) -> PyTree:
        """Shapes that know where their arrays lie; with one device, as they are.

        Args:
            shapes: pytree of `jax.ShapeDtypeStruct`.
            specs: a prefix of it, of `jax.P`.
        """
        if self.num_devices == 1:
            return shapes
        mesh = self.mesh

        def placed(spec: jax.sharding.PartitionSpec, tree: PyTree) -> PyTree:
            sharding = jax.sharding.NamedSharding(mesh, spec)
            return jax.tree.map(
                lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
            )

        return jax.tree.map(
            placed, specs, shapes, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
        )
