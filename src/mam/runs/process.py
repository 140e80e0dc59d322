"""Settings of the whole process, made before JAX starts: compilation cache, allocator, hosts."""

import ctypes
import logging
import os
import platform
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mam.errors import UserError

_log = logging.getLogger("mam")


@dataclass(frozen=True)
class Hosts:
    """Several processes as one run, started with the same command on each of them."""

    join: bool = False
    """Find the others by what Slurm, Open MPI or Kubernetes say of them."""
    coordinator: str | None = None
    """Address and port of the first process, such as node0:1234, where nobody says."""
    num_processes: int | None = None
    """How many there are, with a coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0, with a coordinator."""


def configure(*, keep_programs: bool = True, hosts: Hosts = Hosts()) -> None:
    """Turn on the compilation cache and, on Linux, tune the allocator.

    The command line calls this; an import does not.

    Args:
        keep_programs: whether compiled programs are kept on disk.
        hosts: the other processes of this run.

    Raises:
        UserError: the other processes are not there, or the devices that JAX_PLATFORMS asks for are
            not.
    """
    if keep_programs and os.environ.get("MAM_COMPILATION_CACHE") != "0":
        enable_compilation_cache()
    if platform.libc_ver()[0] == "glibc":
        _keep_freed_memory()
    join(hosts)
    if asked := os.environ.get("JAX_PLATFORMS"):
        _check_devices(asked)


def _check_devices(asked: str) -> None:
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        # Of a platform without its plugin JAX says nothing more.
        reason = " ".join(str(error).split()) or "JAX finds no such device here"
        raise UserError(
            f"JAX_PLATFORMS={asked}: {reason}; leave it out, or set it to cpu"
        ) from error


def cache_folder() -> Path:
    """Return where compiled programs are kept: mam/xla in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mam" / "xla"


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the second run of a configuration starts in seconds.

    JAX_COMPILATION_CACHE_DIR chooses another folder; MAM_COMPILATION_CACHE=0 turns the cache off.
    Where the folder cannot be made, nothing is kept, and that is said.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # the latter where the user has no home
            _log.warning(
                "compiled programs are not kept: %s; XDG_CACHE_HOME names a place for them", error
            )
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        _remove_damaged(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _remove_damaged(folder: Path) -> None:
    """Remove programs that cannot be read, such as half-written ones, when JAX warns of them.

    JAX compiles them anew, but would never write them again, and warn at every start.
    """
    show = warnings.showwarning

    def shown(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        found = re.match(
            r"Error reading persistent compilation cache entry for '(\w+)'", str(message)
        )
        if found:
            for entry in folder.glob(f"{found[1]}-*"):
                with suppress(OSError):
                    entry.unlink()
            _log.warning(
                "a compiled program in %s is damaged: %s is compiled anew", folder, found[1]
            )
        else:
            show(message, *args, **kwargs)

    warnings.showwarning = shown


def _keep_freed_memory() -> None:
    """Stop glibc from returning a step's buffers to the system, only to fault them in again.

    On CPU a training step is 1.3 to 1.6 times faster for it. The constants are those of <malloc.h>.
    """
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)
    libc.mallopt(m_top_pad, 64 * 1024 * 1024)
    libc.mallopt(m_arena_max, 1)


def join(hosts: Hosts) -> None:
    """Make this process one of several, if it is to be.

    Raises:
        UserError: if the others are not described, or not there.
    """
    given = (hosts.coordinator, hosts.num_processes, hosts.process_id)
    if not hosts.join and all(value is None for value in given):
        return
    if not hosts.join and any(value is None for value in given):
        raise UserError(
            "--hosts.coordinator, --hosts.num-processes and --hosts.process-id go together"
        )
    import jax

    try:
        jax.distributed.initialize(*given)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error
