"""Many devices as one: every device runs the same program on its share of the environments.

What depends on all environments goes through `Shard`, whose methods return what they are given on a
single device. Parameters are the same on every device; gradients are summed.
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
    """This device's share, inside a program that several run together (`Devices.share`)."""

    num_shards: int = 1

    @property
    def index(self) -> Int[Array, ""] | int:
        """The number of this share, from 0."""
        return lax.axis_index(AXIS) if self.num_shards > 1 else 0

    def local_slice(self, x: Array, axis: int = 0) -> Array:
        """Return the local slice of an array that all devices have whole.

        Args:
            x: the whole array.
            axis: along which it is cut.
        """
        if self.num_shards == 1:
            return x
        size = x.shape[axis] // self.num_shards
        return lax.dynamic_slice_in_dim(x, self.index * size, size, axis)

    def gather(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Return whole arrays from the slices of all devices.

        Args:
            tree: pytree of local slices.
            axis: along which they are put together.
        """
        if self.num_shards == 1:
            return tree
        return jax.tree.map(lambda x: lax.all_gather(x, AXIS, axis=axis, tiled=True), tree)

    def sum(self, tree: PyTree) -> PyTree:
        """Sum over devices; not to be differentiated: sum the gradients of shares instead."""
        return lax.psum(tree, AXIS) if self.num_shards > 1 else tree

    def max(self, tree: PyTree) -> PyTree:
        """Take the maximum over devices."""
        return lax.pmax(tree, AXIS) if self.num_shards > 1 else tree


WHOLE = Shard()  # that of a single device


@dataclass(frozen=True)
class Devices:
    """The devices a run is spread over: those of all its processes."""

    num_devices: int = 1

    @property
    def shard(self) -> Shard:
        """The share of each."""
        return Shard(self.num_devices)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The 1-D device mesh."""
        return jax.make_mesh(
            (self.num_devices,),
            (AXIS,),
            (jax.sharding.AxisType.Auto,),
            devices=jax.devices()[: self.num_devices],
        )

    def share(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Make a function run on every device; with one device, return the function itself.

        Args:
            function: of local slices.
            in_specs: `jax.P` of its arguments, or prefixes: which axes are cut.
            out_specs: the same of what it returns.
        """
        if self.num_devices == 1:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def with_shardings(self, shapes: PyTree, specs: PyTree) -> PyTree:
        """Give shapes the shardings of their arrays; with one device, return them as they are.

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
