"""What `import mam` gives, and what it costs."""

import subprocess
import sys

import pytest

import mam

PROGRAM = """
import sys
before = set(sys.modules)
import mam
loaded = {name.partition(".")[0] for name in set(sys.modules) - before} \
- set(sys.stdlib_module_names)
assert loaded == {"mam"}, loaded
assert not [name for name in sys.modules if name.startswith("mam.")]
mam.Config, mam.preset("lbf"), mam.grid(policy=["mam", "mat"]), mam.presets.PRESETS
assert "jax" not in sys.modules
for name in mam.__all__:
    getattr(mam, name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""


def test_importing_loads_nothing_and_no_name_starts_a_backend():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_name_is_where_it_says():
    assert set(mam.__all__) == {*mam._HOME, *mam._MODULES}
    assert set(mam.__all__) <= set(dir(mam))
    for name, module in mam._HOME.items():
        assert getattr(mam, name) is getattr(sys.modules[module], name)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"^module 'mam' has no attribute 'trian'$"):
        mam.trian  # noqa: B018
