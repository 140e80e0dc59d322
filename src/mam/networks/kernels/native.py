"""Kernels for CPUs, from the optional package `mam_native` (the folder native/): where it is and whether to use it.

What a kernel may not be part of, such as a program that is exported, is traced within `without_native()`.
"""

import functools
import importlib
import importlib.util
from typing import Any

import jax

from mam.errors import UserError

_allowed = jax.make_user_context(True)  # a part of every jitted function's key


def without_native() -> Any:
    """A context in which everything is traced as plain JAX: exported programs must not call this machine's library."""
    return _allowed(False)


def use_native() -> bool:
    """Whether to choose kernels for the CPU: the package is there, and no other device is."""
    return bool(_allowed.value) and is_installed() and all(device.platform == "cpu" for device in jax.devices())


@functools.cache
def is_installed() -> bool:
    """Whether the package is there; does not import it."""
    return importlib.util.find_spec("mam_native") is not None


@functools.cache
def library() -> Any:
    """The package, with its kernels registered.

    Raises:
        UserError: where it is not installed.
    """
    if not is_installed():
        raise UserError("the native kernels are not installed: run `make native`, which needs a C++ compiler")
    package = importlib.import_module("mam_native")
    for name, handler in package.HANDLERS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return package


def description() -> str:
    """In a few words what there is, for `mam --version`."""
    if not is_installed():
        return "no native kernels"
    package = library()
    return f"native kernels {package.__version__} ({package.isa()})"
