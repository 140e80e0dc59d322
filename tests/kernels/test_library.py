"""Which of several functions is traced, by the platforms that there are."""

import jax
import jax.numpy as jnp
import pytest

from mam.kernels.native import library


def refuse(x):
    raise AssertionError("traced")


@pytest.mark.parametrize(
    "functions",
    [
        {"cpu": jnp.sin, "cuda": refuse, "default": refuse},
        {"cuda": refuse, "default": jnp.sin},
    ],
)
def test_where_there_is_but_a_cpu_nothing_else_is_traced(functions, monkeypatch):
    monkeypatch.setattr(library, "is_cpu_alone", lambda: True)
    program = jax.make_jaxpr(lambda x: library.by_platform(x, **functions))(1.0)
    assert str(program) == str(jax.make_jaxpr(jnp.sin)(1.0))


def test_elsewhere_the_program_chooses(monkeypatch):
    monkeypatch.setattr(library, "is_cpu_alone", lambda: False)
    program = jax.make_jaxpr(lambda x: library.by_platform(x, cuda=jnp.sin, default=jnp.cos))(1.0)
    assert all(name in str(program) for name in ("platform_index", "sin", "cos"))
