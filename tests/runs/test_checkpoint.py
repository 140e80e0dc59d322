import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mam.networks.sequence import SequenceMemory
from mam.runs import checkpoint
from mam.runs.checkpoint import CheckpointError, Writer, newest


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


def save(folder, *states, keep=2, after=None):
    """Saves states one after another; the metadata of each is its place."""
    with Writer(folder, keep=keep, after=after) as writer:
        for number, state in enumerate(states):
            writer.save(state, {"number": number})
    return newest(folder)


def flip(file, position, bit=0):
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(bytes(data))


def test_round_trip_is_exact(tmp_path):
    state, meta = make_state(1), {"update": 7, "nested": {"a": [1, 2.5, None]}}
    with Writer(tmp_path / "run" / "checkpoint") as writer:
        writer.save(state, meta)
    found = newest(tmp_path / "run" / "checkpoint")
    assert_same(found.restore(make_state(0)), state)
    assert found.meta == meta


class Now(eqx.Module):
    distribution: Layer
    image: Layer


class Before(eqx.Module):
    kind: Layer
    picture: Layer


def test_saves_from_before_a_part_was_renamed_are_read(tmp_path):
    layers = Layer(jnp.arange(3.0)), Layer(jnp.arange(2.0))
    assert_same(
        save(tmp_path, {"policy": Before(*layers)}).restore({"policy": Now(*layers)}),
        {"policy": Now(*layers)},
    )


class Acting(eqx.Module):
    memory: jax.Array | SequenceMemory


def test_saves_from_before_mixers_remembered_are_read(tmp_path):
    state = jnp.arange(3.0)
    now = {"actors": Acting(SequenceMemory(agents=state, encoder=((),), decoder=()))}
    assert_same(save(tmp_path, {"actors": Acting(state)}).restore(now), now)


def test_restores_into_shapes_alone(tmp_path):
    state = {"key": jax.random.key(3), "w": jnp.ones((2, 2)), "none": jnp.zeros((0,))}
    assert_same(save(tmp_path, state).restore(jax.eval_shape(lambda: state)), state)


def test_arrays_return_where_like_has_them(tmp_path):
    device = jax.devices()[0]
    placed = jax.sharding.NamedSharding(jax.make_mesh((1,), ("envs",)), jax.P("envs"))
    state = {
        "free": jnp.ones(2),
        "device": jax.device_put(jnp.ones(2), device),
        "mesh": jnp.ones(2),
    }
    state["mesh"] = jax.device_put(state["mesh"], placed)
    restored = save(tmp_path, state).restore(state)
    assert [restored[name].committed for name in ("free", "device", "mesh")] == [False, True, True]
    assert restored["mesh"].sharding == placed


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(tmp_path, keep):
    found = save(tmp_path, *(make_state(number) for number in range(5)), keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(n) for n in range(6 - keep, 6)]
    assert found.meta == {"number": 4}
    assert_same(found.restore(make_state()), make_state(4))
    after = save(tmp_path, make_state(9), keep=keep, after=found)
    assert after.path.name == "6"


def test_the_state_may_be_donated_and_changed_while_it_is_written(tmp_path, monkeypatch):
    begin = threading.Event()
    write = Writer._write
    monkeypatch.setattr(Writer, "_write", lambda *args: begin.wait() and write(*args))
    state = {"jax": jnp.arange(1000.0), "numpy": np.arange(1000)}
    expected = jax.tree.map(np.array, state)
    with Writer(tmp_path) as writer:
        writer.save(state, {})
        jax.jit(lambda x: x + 1, donate_argnums=0)(state["jax"]).block_until_ready()
        state["numpy"][:] = 0
        assert state["jax"].is_deleted()
        writer.wait(timeout=0.01)  # returns without it
        assert not (tmp_path / "1").exists()
        begin.set()
    restored = newest(tmp_path).restore(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


@pytest.mark.parametrize(
    "step",
    ["pathlib.Path.rename", "mam.runs.checkpoint._write_arrays", "mam.runs.checkpoint._open"],
)
def test_a_save_that_fails_leaves_the_previous_one(tmp_path, monkeypatch, step):
    first = save(tmp_path, make_state(1))
    with monkeypatch.context() as patch:
        patch.setattr(step, _fail)
        writer = Writer(tmp_path, after=first)
        writer.save(make_state(2), {})
        with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*: .*disk full"):
            writer.close()
    assert_same(newest(tmp_path).restore(make_state()), make_state(1))
    assert_same(save(tmp_path, make_state(3), after=first).restore(make_state()), make_state(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1",
        "2",
    ]  # what the failure left is gone


@pytest.mark.parametrize("file", ["arrays.safetensors", "manifest.json"])
def test_a_save_that_cannot_be_read_back_is_none_and_deletes_none(tmp_path, monkeypatch, file):
    first = save(tmp_path, make_state(1), keep=1)
    fsync = os.fsync

    def lose(descriptor):
        """A disk that says that all is written, and has other bytes."""
        fsync(descriptor)
        if (written := Path(os.readlink(f"/proc/self/fd/{descriptor}"))).name == file:
            flip(written, 3)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lose)
        writer = Writer(tmp_path, keep=1, after=first)
        writer.save(make_state(2), {})
        with pytest.raises(
            CheckpointError,
            match=rf"cannot write a checkpoint to .*: .*2.partial is damaged: {file} has changed",
        ):
            writer.close()
    assert_same(newest(tmp_path).restore(make_state()), make_state(1))


@pytest.mark.parametrize("step", ["_write_arrays", "_write_manifest", "_open"])
def test_a_folder_that_vanishes_at_any_step_is_one_that_cannot_be_written(
    tmp_path, monkeypatch, step
):
    folder = tmp_path / "checkpoint"
    function = getattr(checkpoint, step)

    def vanish(*arguments):
        result = function(*arguments)
        folder.rename(tmp_path / "gone")
        return result

    monkeypatch.setattr(checkpoint, step, vanish)
    writer = Writer(folder)
    writer.save(make_state(), {})
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*No such file"):
        writer.close()


def _fail(*_, **__):
    raise OSError("disk full")


def test_a_save_that_runs_into_the_time_limit_of_a_network_is_no_success(tmp_path, monkeypatch):
    def late(*_):
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr("mam.runs.checkpoint._write_arrays", late)
    writer = Writer(tmp_path)
    writer.save(make_state(), {})
    with pytest.raises(CheckpointError, match="Connection timed out"):
        writer.close()


def test_a_failed_save_shows_at_the_next(tmp_path, monkeypatch):
    writer = Writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", _fail)
        writer.save(make_state(), {})
        with pytest.raises(CheckpointError, match="disk full"):
            writer.save(make_state(), {})


def test_every_flipped_bit_is_detected_and_the_save_before_it_is_used(tmp_path):
    original, copy = tmp_path / "original", tmp_path / "copy"
    save(original, make_state(1), make_state(2))
    files = sorted(f.relative_to(original) for f in (original / "2").rglob("*") if f.is_file())
    rng, warnings = np.random.default_rng(0), []
    for trial in range(200):
        shutil.copytree(original, copy)
        file = copy / files[trial % len(files)]
        if size := file.stat().st_size:
            flip(file, rng.integers(size), rng.integers(8))
        else:
            file.write_bytes(b"x")
        found = newest(copy, warn=warnings.append)
        assert (found.path, found.meta) == (copy / "1", {"number": 0})
        if trial == 0:
            assert_same(found.restore(make_state()), make_state(1))
        shutil.rmtree(copy)
    assert len(warnings) == 200
    assert all(
        "is damaged: " in line and "using the one before it, " in line and "\n" not in line
        for line in warnings
    )


ODD_NAMES = [
    *(
        "lr=[0.1]",
        "[!a]",
        "a[b",
        "a]b",
        "{a,b}",
        "*",
        "**",
        "a?b",
        "100%",
        "%20",
        "a#b",
        "$HOME",
        "${cwd}",
        "a b",
        " ",
    ),
    *(
        "~",
        "ü🐍",
        "a\nb",
        "\t",
        "\x01",
        "a\\b",
        "a|zip:",
        "a:b",
        "gs:",
        "s3:",
        "file:",
        "'",
        '"',
        "&;",
        "..a",
    ),
    *("x" * 255, "a\udcffb"),
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_saves_are_found_again_under_any_name(tmp_path, name):
    folder = tmp_path / name / "checkpoint"
    assert_same(save(folder, SMALL, SMALL, SMALL).restore(SMALL), SMALL)
    assert [path.name for path in sorted(folder.iterdir())] == ["2", "3"]


SMALL = {"w": np.arange(3.0)}


def test_a_name_that_matches_another_folder_does_not_mix_them(tmp_path):
    save(tmp_path / "run1", make_state(1))
    save(tmp_path / "run?", make_state(2))
    assert_same(newest(tmp_path / "run1").restore(make_state()), make_state(1))
    assert_same(newest(tmp_path / "run?").restore(make_state()), make_state(2))


JUNK = {
    "file": lambda folder: (folder / "99").write_text("x"),
    "next": lambda folder: (folder / "3").write_text("x"),
    "dangling link": lambda folder: (folder / "99").symlink_to(folder / "none"),
    "link to itself": lambda folder: (folder / "99").symlink_to(folder / "99"),
    "link to a file": lambda folder: (folder / "99").symlink_to(folder / "2" / "manifest.json"),
    "partial link": lambda folder: (folder / "7.partial").symlink_to(folder / "1"),
    "partial dangling link": lambda folder: (folder / "7.partial").symlink_to(folder / "none"),
    "partial file": lambda folder: (folder / "7.partial").write_text("x"),
    "partial folder": lambda folder: (folder / "7.partial" / "deep").mkdir(parents=True),
    "other digits": lambda folder: (folder / "٣").mkdir(),
    "superscript": lambda folder: (folder / "²").mkdir(),
    "leading zero": lambda folder: (folder / "007").mkdir(),
    "sign": lambda folder: (folder / "-5").mkdir(),
    "empty folder": lambda folder: (folder / "99").mkdir(),
    "very large": lambda folder: (folder / ("9" * 250)).mkdir(),
    "pipe": lambda folder: os.mkfifo(folder / "99"),
    "copy": lambda folder: shutil.copytree(folder / "1", folder / "99"),
    "link to an older save": lambda folder: (folder / "99").symlink_to(folder / "1"),
    "hidden": lambda folder: (folder / ".nfs000123").write_text("x"),
}


@pytest.mark.parametrize("junk", JUNK)
def test_junk_among_the_saves_is_passed_over(tmp_path, junk):
    save(tmp_path, SMALL, {"w": SMALL["w"] + 1})
    JUNK[junk](tmp_path)
    found = newest(tmp_path)
    assert (found.path.name, found.meta) == ("2", {"number": 1})
    assert save(tmp_path, SMALL, after=found).path.name == "3"
    assert newest(tmp_path).meta == {"number": 0}
    assert (tmp_path / "2").is_dir()


MANIFESTS = [
    *("[]", "{}", "null", "3", '"x"', "", "\xff", "[" * 100_000, '{"a":' * 2000 + "1" + "}" * 2000),
    *(
        '{"number": 2}',
        '{"number": 1e999}',
        '{"sha256": null, "number": 2, "leaves": {}, "meta": {}}',
    ),
    '{"sha256": "", "number": 2, "leaves": [], "meta": 1}',
    '{"sha256": "x", "number": 2, "leaves": {"state": 3}, "meta": {}}',
]


@pytest.mark.parametrize("text", MANIFESTS, ids=lambda text: text[:40])
def test_manifests_of_another_shape_are_passed_over(tmp_path, text):
    save(tmp_path, SMALL, SMALL)
    data = text.encode("latin-1")
    (tmp_path / "2" / "manifest.json").write_bytes(
        data + f"\n{hashlib.sha256(data).hexdigest()}\n".encode()
    )
    warnings = []
    assert newest(tmp_path, warn=warnings.append).path.name == "1"
    (line,) = warnings
    assert "2 is damaged: " in line
    assert "\n" not in line
    assert len(line) < 500


@pytest.mark.parametrize("file", ["manifest.json", "arrays.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_files_that_cannot_be_read_to_an_end_are_passed_over(tmp_path, file, make):
    save(tmp_path, SMALL, SMALL)
    (tmp_path / "2" / file).unlink()
    make(tmp_path / "2" / file)
    assert newest(tmp_path).path.name == "1"


def test_swapped_saves_are_noticed(tmp_path):
    save(tmp_path, make_state(1), make_state(2))
    for old, new in (("1", "x"), ("2", "1"), ("x", "2")):
        (tmp_path / old).rename(tmp_path / new)
    with pytest.raises(
        CheckpointError, match=r"2 is damaged: it is save 1, renamed; .*1 is damaged: it is save 2"
    ):
        newest(tmp_path)


def test_saves_with_metadata_of_another_kind_are_passed_over(tmp_path):
    save(tmp_path, make_state(1), make_state(2))
    assert newest(tmp_path, valid=lambda meta: meta["number"] == 0).path.name == "1"


@pytest.mark.parametrize("damage", ["missing file", "empty folder", "cut manifest"])
def test_other_damage_is_detected_too(tmp_path, damage):
    save(tmp_path, make_state(1), make_state(2))
    manifest = tmp_path / "2" / "manifest.json"
    if damage == "missing file":
        (tmp_path / "2" / "arrays.safetensors").unlink()
    elif damage == "empty folder":
        shutil.rmtree(tmp_path / "2")
        (tmp_path / "2").mkdir()
    else:
        manifest.write_bytes(manifest.read_bytes()[:70])
    found = newest(tmp_path)
    assert found.path.name == "1"
    # Who goes on from there clears the damaged one away, and does not count it among those to keep.
    assert save(tmp_path, make_state(3), after=found).path.name == "2"
    assert_same(newest(tmp_path).restore(make_state()), make_state(3))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "policy",
            Layer(jnp.ones((3, 4))),
            r"state\['policy'\]\.kernel is float32\[3,2\] in .* float32\[3,4\] here",
        ),
        (
            "half",
            jnp.ones(3),
            r"state\['half'\] is bfloat16\[3\] in the checkpoint, float32\[3\] here",
        ),
        (
            "keys",
            jax.eval_shape(lambda: jax.random.split(jax.random.key(0))),
            r"is key<rbg>\[2\] in .* key<fry>\[2\]",
        ),
        ("new", jnp.ones(3), r"state\['new'\] is missing in the checkpoint"),
        ("mask", None, r"state\['mask'\] is bool\[2\] in the checkpoint, missing here"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, name, value, message):
    found = save(tmp_path, make_state())
    with pytest.raises(CheckpointError, match=message):
        found.restore(make_state() | {name: value})


def test_refuses_a_folder_without_an_intact_save(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        newest(tmp_path / "none")
    save(tmp_path, make_state(1), make_state(2))
    for path in tmp_path.iterdir():
        flip(path / "manifest.json", 5)
    with pytest.raises(
        CheckpointError, match=r"2 is damaged: manifest.json has changed; .*1 is damaged"
    ):
        newest(tmp_path)


def test_refuses_a_leaf_that_is_no_array(tmp_path):
    writer = Writer(tmp_path)
    with pytest.raises(CheckpointError, match=r"state\['name'\] is neither an array nor a number"):
        writer.save({"name": "x"}, {})
    assert not list(tmp_path.iterdir())


def test_import_is_quiet_and_lazy():
    code = (
        "import sys, mam.runs.checkpoint, mam.runs.sinks, mam.study.report; "
        "from jax._src import xla_bridge; "
        "assert not xla_bridge._backends; "
        "assert not {'matplotlib', 'tensorboardX'} & set(sys.modules), 'eager'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
