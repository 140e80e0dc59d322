"""CPU kernels for `mam`, as handlers of XLA's foreign function interface.

`mam` finds and registers them by itself (`mam.kernels.native.library`). They are compiled for
several instruction sets, of which the best that the processor has is used; the environment
variable MAM_NATIVE_ISA chooses another.
"""

import ctypes
import itertools
import os
from importlib import metadata
from pathlib import Path

__version__ = metadata.version("multi-agent-mamba-native")

_library = ctypes.CDLL(str(Path(__file__).parent / "libmam_native.so"))
_library.mam_native_isa.restype = ctypes.c_char_p
_library.mam_native_available.restype = ctypes.c_char_p
_library.mam_native_choose.restype = ctypes.c_bool
_library.mam_native_scan_scratch.restype = ctypes.c_int64
_library.mam_native_scan_scratch.argtypes = [ctypes.c_int64] * 4

HANDLERS = {
    f"mam_native_{name}": getattr(_library, f"mam_native_{name}")
    for name in [
        "scan",
        "scan_backward",
        "conv",
        "conv_backward",
        "norm",
        "norm_backward",
        "weight_gradient",
        "attention",
        "attention_backward",
        "decode",
    ]
}


def isa() -> str:
    """Return the name of the instruction set in use."""
    return _library.mam_native_isa().decode()


def available() -> tuple[str, ...]:
    """List the instruction sets of this processor that kernels are compiled for, the best last."""
    names = map(_library.mam_native_available, itertools.count())
    return tuple(
        name.decode() for name in itertools.takewhile(lambda name: name is not None, names)
    )


def choose(name: str) -> None:
    """Use this instruction set from the next call of a kernel on.

    Raises:
        ValueError: for one that is not in `available()`.
    """
    if not _library.mam_native_choose(name.encode()):
        raise ValueError(f"no kernels for {name!r} here: choose one of {', '.join(available())}")


def scan_scratch(channels: int, states: int, rank: int, tiles: int) -> int:
    """Return how many floats of scratch memory a scan needs per thread, forward or backward.

    Args:
        channels: D.
        states: S, per channel.
        rank: features that step sizes are made of; 0 if step sizes are given.
        tiles: into which the channels are cut.
    """
    return _library.mam_native_scan_scratch(channels, states, rank, tiles)


if wanted := os.environ.get("MAM_NATIVE_ISA"):
    choose(wanted)
