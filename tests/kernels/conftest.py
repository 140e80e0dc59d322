"""What the tests of the native kernels share."""

import pytest

try:
    import mam_native
except ImportError:  # whose tests are skipped
    mam_native = None


@pytest.fixture(params=mam_native.available() if mam_native else ())
def isa(request):
    """Every instruction set, one after another."""
    in_use = mam_native.isa()
    mam_native.choose(request.param)
    yield request.param
    mam_native.choose(in_use)
