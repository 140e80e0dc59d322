"""Every test runs with shapes and types checked at run time, and with the compilation cache on.

Programs are compiled with few optimisations, in the processes that tests start, too.
"""

import os
import signal

import jax
import pytest
from jaxtyping import install_import_hook

from quick import QUICK

# Read when the first program is compiled; what the environment says comes last, and wins.
_FLAGS = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()

install_import_hook("mam", "beartype.beartype")

from mam.runs.process import enable_compilation_cache  # noqa: E402

enable_compilation_cache()
signal.signal(
    signal.SIGHUP, signal.SIG_DFL
)  # what starts the tests may ignore it (nohup), and its children would


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Free what a file compiled: programs of all files together take many gigabytes."""
    yield
    jax.clear_caches()
