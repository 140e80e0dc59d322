"""Settings of the process: where compiled programs are kept."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mam.runs.process import cache_folder, enable_compilation_cache


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("home", "cache"), [("/proc/nope", ""), ("", "/proc/nope"), ("", "/dev/null/x"), (None, "")]
)
def test_programs_are_not_kept_where_nothing_can_be(monkeypatch, caplog, home, cache):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    if home is None:  # a user that the system does not know, as in containers
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    else:
        monkeypatch.setenv("HOME", home)
    enable_compilation_cache()
    (message,) = caplog.messages
    assert message.startswith("compiled programs are not kept: ")
    assert "\n" not in message
    assert jax.config.jax_compilation_cache_dir == before


def test_programs_are_kept_in_the_users_cache(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable_compilation_cache()
    assert (
        jax.config.jax_compilation_cache_dir == str(cache_folder()) == str(tmp_path / "mam" / "xla")
    )
    assert not caplog.messages


@pytest.mark.parametrize(
    "damaged", [lambda data: b"", lambda data: data[:-9], lambda data: bytes(len(data))]
)
def test_a_damaged_program_is_compiled_anew_and_replaced(monkeypatch, caplog, tmp_path, damaged):
    def program(x):
        return jnp.sin(x) + 1

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation_cache.reset_cache()
    enable_compilation_cache()
    expected = jax.jit(program)(1.0)
    (entry,) = cache_folder().glob("jit_program-*")
    intact = entry.read_bytes()
    entry.write_bytes(damaged(intact))
    with warnings.catch_warnings():
        warnings.filterwarnings("default", "Error reading persistent", UserWarning)
        for _ in range(2):
            jax.clear_caches()
            assert jax.jit(program)(1.0) == expected
    assert caplog.messages == [
        f"a compiled program in {cache_folder()} is damaged: jit_program is compiled anew"
    ]
