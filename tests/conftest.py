"""Every test runs with shapes and types checked at run time, and with the compilation cache on.

Programs are compiled with few optimisations, in the processes that tests start, too.
"""

import gc
import os
import signal

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# Most tests run their programs once, and cores have tests of their own to compile. Read when the
# first is compiled; what the environment says comes last, and wins.
_QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
_GIVEN = os.environ.get("XLA_FLAGS", "")
if _QUICK not in _GIVEN:  # workers have it already, and twice would be another key of kept programs
    os.environ["XLA_FLAGS"] = f"{_QUICK} {_GIVEN}".strip()

gc.set_threshold(200_000, 50, 100)  # a quarter of the time of tracing goes to looking for garbage

LONG = ("test_tutorials.py", "test_training_contract.py")

install_import_hook("mam", "beartype.beartype")

from mam.runs.process import enable_compilation_cache  # noqa: E402

enable_compilation_cache()
signal.signal(
    signal.SIGHUP, signal.SIG_DFL
)  # what starts the tests may ignore it (nohup), and its children would


def pytest_collection_modifyitems(items):
    """Start with files of a few long tests: a file is one process's, and must not be the last."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture
def symbolic_sizes():
    """Let sizes be symbolic, as exported programs' are, which are no integers to such checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Free what a file compiled: programs of all files together take many gigabytes."""
    yield
    jax.clear_caches()
