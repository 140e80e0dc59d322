"""Kernels for CPUs, from the optional package `mam_native` (the folder native/): where it is and whether to use it.

What a kernel may not be part of, such as a program that is exported, is traced within `without_native()`.
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
from jaxtyping import Array

from mam import errors
from mam.errors import UserError

VERSION = "0.5"  # of the package; with others kernels take other arguments
LANES = 16  # floats in the widest vector: kMaxLanes in native/src/cpp/kernels.h
MAX_BLOCKS = 32  # of sequences or rows: each has its own sums for the gradients of weights
_allowed = jax.make_user_context(True)  # a part of every jitted function's key


def without_native() -> Any:
    """A context in which everything is traced as plain JAX: exported programs must not call this machine's library."""
    return _allowed(False)


def use_native() -> bool:
    """Whether to choose kernels for the CPU: the package is there, and no other device is."""
    return (
        bool(_allowed.value)
        and is_installed()
        and all(device.platform == "cpu" for device in jax.devices())
    )


def on_cpu(native: Callable[..., Sequence], other: Callable[..., Sequence], *args: Any) -> tuple:
    """The two results of `native` on CPU, of `other` elsewhere; one that nobody reads is not computed."""
    return tuple(
        lax.platform_dependent(
            *args, cpu=lambda *a, i=i: native(*a)[i], default=lambda *a, i=i: other(*a)[i]
        )
        for i in range(2)
    )


@functools.cache
def is_installed() -> bool:
    """Whether the package is there, in the version whose kernels are called here; does not import it."""
    return installed_version().startswith(f"{VERSION}.")


def installed_version() -> str:
    """Of the package; empty if it is not there."""
    there = importlib.util.find_spec("mam_native") is not None
    return (there and errors.installed_version(errors.NATIVE)) or ""


@functools.cache
def library() -> Any:
    """The package, with its kernels registered.

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
    """A kernel's outputs, of these shapes. In its arguments no elements stand for None, 1 for True.

    Mapped over, kernels take all leading axes as one batch, of which each element has its own weights.
    """
    library()
    arrays = [jnp.zeros(0, jnp.float32) if v is None else v for v in arguments]
    arrays = [v.astype(jnp.float32) if v.dtype == bool else v for v in arrays]
    outputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(name, outputs, vmap_method="broadcast_all")(*arrays, **attributes)


def num_blocks(x: Array) -> np.int64:
    """Into how many blocks the first axis is cut."""
    return np.int64(min(x.shape[0], MAX_BLOCKS))


def block_sums(x: Array, weight: Array | None) -> tuple[int, ...]:
    """The shape of the sums of a weight's gradient over blocks."""
    return (0,) if weight is None else (int(num_blocks(x)), *weight.shape)


def description() -> str:
    """In a few words what there is, for `mam --version`."""
    if not is_installed():
        version = installed_version()
        return f"native kernels {version}, not {VERSION}" if version else "no native kernels"
    package = library()
    return f"native kernels {package.__version__} ({package.isa()})"
