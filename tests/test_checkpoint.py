import logging
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mam.checkpoint import CheckpointError, read_meta, restore, save


class Layer(eqx.Module):
    kernel: jax.Array
    memory: tuple = ()


def make_state(seed: int = 0):
    layer = Layer(jax.random.normal(jax.random.key(seed), (3, 2)))
    return {
        "policy": layer,
        "opt_state": optax.adam(1e-3).init({"w": layer.kernel}),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 2),
        "key": jax.random.key(seed + 1),
        "odd": jnp.array([-0.0, jnp.nan, jnp.inf, 1e-45]),
        "half": jnp.arange(3, dtype=jnp.bfloat16) + seed,
        "mask": jnp.array([True, False]),
        "empty": jnp.zeros((0, 3)),
        "array": np.arange(4) + seed,
        "scalar": np.float64(0.1 + seed),
        "number": 2**40 + seed,
        "nothing": None,
    }


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b)
        if isinstance(b, jax.Array) and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_round_trip_is_exact(tmp_path):
    state = make_state(1)
    save(tmp_path / "run" / "checkpoint", state, {"update": 7, "nested": {"a": [1, 2.5, None]}})
    assert_same(restore(tmp_path / "run" / "checkpoint", make_state(0)), state)
    assert read_meta(tmp_path / "run" / "checkpoint") == {"update": 7, "nested": {"a": [1, 2.5, None]}}


def test_restores_into_shapes_alone(tmp_path):
    state = {"key": jax.random.key(3), "w": jnp.ones((2, 2)), "none": jnp.zeros((0,))}
    save(tmp_path, state, {})
    assert_same(restore(tmp_path, jax.eval_shape(lambda: state)), state)


def test_arrays_return_where_like_has_them(tmp_path):
    device = jax.devices()[0]
    placed = jax.sharding.NamedSharding(jax.make_mesh((1,), ("envs",)), jax.P("envs"))
    state = {"free": jnp.ones(2), "device": jax.device_put(jnp.ones(2), device), "mesh": jnp.ones(2)}
    state["mesh"] = jax.device_put(state["mesh"], placed)
    save(tmp_path, state, {})
    restored = restore(tmp_path, state)
    assert [restored[name].committed for name in ("free", "device", "mesh")] == [False, True, True]
    assert restored["mesh"].sharding == placed


def test_only_the_newest_is_kept(tmp_path):
    for update in range(3):
        folder = save(tmp_path, make_state(update), {"update": update})
    assert list(tmp_path.iterdir()) == [folder]
    assert read_meta(tmp_path) == {"update": 2}
    assert_same(restore(tmp_path, make_state()), make_state(2))


@pytest.mark.parametrize("step", ["rename", "write"])
def test_a_save_that_fails_leaves_the_previous_one(tmp_path, monkeypatch, step):
    save(tmp_path, make_state(1), {"update": 1})
    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr("os.rename", _fail)
        else:
            patch.setattr("orbax.checkpoint.StandardCheckpointHandler.finalize", _fail)
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, make_state(2), {"update": 2})
    assert read_meta(tmp_path) == {"update": 1}
    assert_same(restore(tmp_path, make_state()), make_state(1))
    save(tmp_path, make_state(3), {"update": 3})  # tidies up what the failure left
    assert read_meta(tmp_path) == {"update": 3}
    assert len(list(tmp_path.iterdir())) == 1


def _fail(*_, **__):
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("policy", Layer(jnp.ones((3, 4))), r"state\['policy'\]\.kernel is float32\[3,2\] in .* float32\[3,4\] here"),
        ("half", jnp.ones(3), r"state\['half'\] is bfloat16\[3\] in the checkpoint, float32\[3\] here"),
        ("keys", jax.eval_shape(lambda: jax.random.split(jax.random.key(0))), r"is key<rbg>\[2\] in .* key<fry>\[2\]"),
        ("new", jnp.ones(3), r"state\['new'\] is missing in the checkpoint"),
        ("mask", None, r"state\['mask'\] is bool\[2\] in the checkpoint, missing here"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, name, value, message):
    save(tmp_path, make_state(), {})
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path, make_state() | {name: value})


def test_refuses_a_missing_or_damaged_checkpoint(tmp_path):
    for read in (lambda: restore(tmp_path / "none", {}), lambda: read_meta(tmp_path / "none")):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            read()
    folder = save(tmp_path, make_state(), {})
    for file in (folder / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore(tmp_path, make_state())


def test_refuses_a_leaf_that_is_no_array(tmp_path):
    with pytest.raises(CheckpointError, match=r"state\['name'\] is neither an array nor a number"):
        save(tmp_path, {"name": "x"}, {})
    assert not list(tmp_path.iterdir())


def test_logs_nothing_and_leaves_the_logger_alone(tmp_path, caplog):
    logger = logging.getLogger("absl")
    level = logger.level
    with caplog.at_level(logging.DEBUG, logger="absl"):
        save(tmp_path, make_state(), {})
        restore(tmp_path, make_state())
    assert [record for record in caplog.records if record.name == "absl"] == []
    assert logger.level == level


def test_import_is_quiet_and_lazy():
    code = (
        "import sys, mam.checkpoint, mam.logging, mam.report; from jax._src import xla_bridge; "
        "assert not xla_bridge._backends; "
        "assert not {'orbax', 'matplotlib', 'tensorboardX'} & set(sys.modules), 'eager'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
