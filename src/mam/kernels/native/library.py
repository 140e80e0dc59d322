"""Kernels for CPUs, from the optional package `mam_native`: where it is and whether to use it.

Its source is the folder native/. What a kernel may not be part of is traced within
`without_native()`; what is to be one program for all platforms, within `portable()`.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.backend import backends
from jaxtyping import Array

from mam import errors
from mam.errors import UserError

VERSION = "0.6"  # of the package; with others kernels take other arguments
LANES = 16  # floats in the widest vector: kMaxLanes in native/src/cpp/kernels.h
MAX_BLOCKS = 32  # of sequences or rows: each has its own sums for the gradients of weights
# A part of every jitted function's key: "kernels", "plain", "portable" or "unrolled"
_tracing = jax.make_user_context("kernels")


def without_native() -> Any:
    """Return a context in which everything is traced without this package's kernels."""
    return _tracing("plain")


def portable(*, loops: bool = True) -> Any:
    """Return a context in which everything is traced as one program, the same for all platforms.

    Exported programs are traced so: they may call no library of this machine, and not every format
    knows a choice by platform.

    Args:
        loops: whether a recurrence may be a loop; its steps are written out if not, for runtimes
            that are slow at loops.
    """
    return _tracing("portable" if loops else "unrolled")


def is_portable() -> bool:
    """Say whether what is traced is to be one program for all platforms."""
    return _tracing.value == "portable" or avoids_loops()


def avoids_loops() -> bool:
    """Say whether what is traced is to write out recurrences."""
    return _tracing.value == "unrolled"


def named(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function a name in portable programs, whose format may have an operator for it."""
    jitted = jax.jit(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return (jitted if is_portable() else function)(*args)

    return call


def by_platform(*args: Any, default: Callable[..., Any], **kernels: Callable[..., Any]) -> Any:
    """Return the result of one of several functions of `args`, by the platform it runs on.

    Where there is no device but the CPU, none of the others is traced, which saves time.

    Args:
        *args: arrays, or None.
        default: the function in plain JAX, the only one within `portable()`.
        **kernels: those that replace it on a platform.
    """
    if is_portable():
        return default(*args)
    if is_cpu_alone():
        return kernels.get("cpu", default)(*args)
    return lax.platform_dependent(*args, default=default, **kernels)


def is_cpu_alone() -> bool:
    """Say whether whatever this process compiles runs on the CPU."""
    return backends().keys() == {"cpu"}


def use_native() -> bool:
    """Say whether to choose kernels for the CPU: the package is there, and no other device is.

    XLA cannot partition them: they are not for arrays that it spreads over devices by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_whole = all(mesh.shape[axis] == 1 for axis in mesh.auto_axes)
    return _tracing.value == "kernels" and is_whole and is_installed() and is_cpu_alone()


@functools.cache
def is_installed() -> bool:
    """Say, without importing it, whether the package is there in the version called here."""
    return installed_version().startswith(f"{VERSION}.")


def installed_version() -> str:
    """Return the version of the package; empty if it is not there."""
    there = importlib.util.find_spec("mam_native") is not None
    return (there and errors.installed_version(errors.NATIVE)) or ""


@functools.cache
def library() -> Any:
    """Import the package and register its kernels.

    Raises:
        UserError: where it is not installed.
    """
    if not is_installed():
        raise UserError(f"{description()}: run `make native`, which needs a C++ compiler")
    package = importlib.import_module("mam_native")
    for name, handler in package.HANDLERS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return package


def call(
    name: str, shapes: Sequence[tuple[int, ...]], *arguments: Array | None, **attributes: Any
) -> Sequence[Array]:
    """Call a kernel and return its outputs.

    Mapped over, kernels take all leading axes as one batch, of which each element has its own
    weights.

    Args:
        name: of the kernel, a key of `mam_native.HANDLERS`.
        shapes: of the outputs, all in float32.
        *arguments: arrays; the kernel gets no elements for None, and 1 for True.
        **attributes: numbers, of the types that the kernel declares.

    Raises:
        UserError: where the package is not installed.
    """
    library()
    arrays = [jnp.zeros(0, jnp.float32) if v is None else v for v in arguments]
    arrays = [v.astype(jnp.float32) if v.dtype == bool else v for v in arrays]
    outputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(name, outputs, vmap_method="broadcast_all")(*arrays, **attributes)


def num_blocks(x: Array) -> np.int64:
    """Return into how many blocks the first axis is cut."""
    return np.int64(min(x.shape[0], MAX_BLOCKS))


def block_sums(x: Array, weight: Array | None) -> tuple[int, ...]:
    """Return the shape of the gradient of a weight per block of x, (0,) for a weight of None."""
    return (0,) if weight is None else (int(num_blocks(x)), *weight.shape)


def description() -> str:
    """Describe in a few words what is installed, for `mam --version`."""
    if not is_installed():
        version = installed_version()
        return f"native kernels {version}, not {VERSION}" if version else "no native kernels"
    package = library()
    return f"native kernels {package.__version__} ({package.isa()})"
