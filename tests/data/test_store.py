"""Datasets on disk: what was appended is read, bit for bit, whatever happened to who wrote it."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from mam.cli.main import main
from mam.data import store
from mam.data.steps import concatenate, to_rows, with_ids, without_ids
from mam.data.store import Dataset, Writer, cut
from mam.data.summary import open_dataset, summarise
from mam.data.vault import Vault
from mam.errors import UserError
from mam.types import EnvSpec, Observation, Transition

PLAIN = EnvSpec("own/plain", num_agents=2, obs_dim=3, num_actions=4, time_limit=None)
SPECS = {
    "plain": PLAIN,
    "state": replace(PLAIN, state_dim=5),
    "image": replace(PLAIN, obs_dim=0, grid_shape=(2, 3, 1)),
    "real": replace(PLAIN, continuous=True),
    "several": replace(PLAIN, action_components=(1, 3)),
}


def episode(spec, length, seed=0, *, terminated=True):
    """Random steps, in which agent 0 is truncated alone after the first."""
    rng, shape = np.random.default_rng(seed), (length + 1, spec.num_agents)
    view = rng.normal(size=(*shape, spec.obs_dim)).astype(np.float32)
    action = spec.joint_action
    alive = np.ones(shape, bool)
    alive[1:, 0] = False
    grid = spec.grid_shape and rng.integers(0, 255, (*shape, *spec.grid_shape)).astype(np.uint8)
    state = spec.state_dim and rng.normal(size=(length + 1, spec.state_dim)).astype(np.float32)
    seen = Observation(view, np.ones((*shape, spec.num_actions), bool), alive, grid, state)
    now, final = (jax.tree.map(lambda x, k=k: x[k:][:length].copy(), seen) for k in (0, 1))
    final.alive[0, 0] = True
    last = np.arange(length) == length - 1
    numbers = rng.normal(size=(length, spec.num_agents)).astype(np.float32)
    return Transition(
        observation=now,
        reset=np.arange(length) == 0,
        action=rng.uniform(0, 1, (length, *action.shape)).astype(action.dtype),
        log_prob=numbers,
        value=numbers + 1,
        order=np.tile(np.arange(2, dtype=np.int32)[::-1], (length, 1)),
        reward=np.sign(numbers),
        terminated=last & terminated,
        truncated=last & (not terminated),
        final_observation=final,
        metrics={},
    )


def write(path, *episodes, spec=PLAIN, optional=store.OPTIONAL):
    with Writer(path, spec, optional=optional, provenance={"who": "tests"}) as writer:
        for one in episodes:
            writer.append(one)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_was_written_is_read_bit_for_bit(spec, tmp_path):
    episodes = [episode(spec, n, n, terminated=n != 3) for n in (3, 1, 5)]
    write(tmp_path / "d", *episodes[:2], spec=spec)
    write(tmp_path / "d", episodes[2], spec=spec)
    data = Dataset.open(tmp_path / "d")
    assert (data.spec, data.provenance["who"]) == (spec, "tests")
    assert data.lengths.tolist() == [3, 1, 5]
    np.testing.assert_allclose(data.returns, [e.reward.mean(1).sum() for e in episodes])
    assert_same(data.read(), concatenate(episodes))
    assert_same(data.read([2]), episodes[2])  # a part, and parts in any order
    assert_same(data.read([1, 0]), concatenate([episodes[1], episodes[0]]))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_dataset_is_read_bit_for_bit_from_a_vault(spec, tmp_path):
    spec = replace(spec, time_limit=7, agent_names=("a", "b"))
    episodes = [episode(spec, n, n, terminated=n != 3) for n in (3, 1, 5)]
    write(tmp_path / "d", *episodes, spec=spec)
    out = tmp_path / "d.vlt" / "Good"
    assert main(["data", "export", str(tmp_path / "d"), "--out", str(out)]) == 0
    data, vault = open_dataset(tmp_path / "d"), open_dataset(out)
    assert isinstance(vault, Vault)
    assert (vault.spec, vault.optional, vault.provenance["who"]) == (spec, data.optional, "tests")
    assert vault.returns.tolist() == data.returns.tolist()
    assert_same(vault.read(), data.read())
    assert_same(vault.read([2, 0]), data.read([2, 0]))
    assert summarise(vault).missing == summarise(data).missing


def test_a_vault_is_written_where_nothing_is(tmp_path, capsys):
    write(tmp_path / "d", episode(PLAIN, 2))
    for args, message in (
        (["export", str(tmp_path / "d")], "mam data export DIR --out FOLDER writes a Vault"),
        (["info", str(tmp_path / "d"), "--out", "x"], "info writes nothing"),
        (["export", str(tmp_path / "d"), "--out", str(tmp_path / "d")], "d is not empty: choose"),
    ):
        assert main(["data", *args]) == 2
        assert message in capsys.readouterr().err


def test_what_only_a_policy_knows_may_be_missing(tmp_path):
    write(tmp_path / "d", episode(PLAIN, 4), optional=())
    steps = Dataset.open(tmp_path / "d").read()
    assert steps.log_prob is None
    assert steps.value is None
    assert steps.order.tolist() == [[0, 1], [1, 0], [1, 0], [1, 0]]  # the living first


def test_ids_are_put_in_front_and_taken_away(tmp_path):
    steps = episode(PLAIN, 2)
    named, spec = with_ids(steps, PLAIN, "one_hot")
    assert (spec.obs_dim, spec.id_dim) == (5, 2)
    again, plain = without_ids(named, spec)
    assert plain == PLAIN
    assert_same(again, steps)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["resized", "array", "line", "half a line"])
def test_a_killed_writer_leaves_whole_episodes_each_of_them_once(moment, tmp_path, monkeypatch):
    """Killed in its second append, then begun anew."""
    path, (first, second) = tmp_path / "d", (episode(PLAIN, n, n) for n in (3, 5))
    write(path, first)
    writer = Writer(path, PLAIN, optional=store.OPTIONAL)
    whole = Writer._write

    def dies(self, rows, one):
        if moment == "resized":
            for array in self._arrays.values():
                array.resize(exclusive_max=[array.shape[0] + 9, *array.shape[1:]]).result()
        elif moment == "array":
            rest = {name: x for name, x in rows.items() if name != "reward"}
            whole(self, rest | {"reward": rows["reward"] * 0}, one)
        else:
            whole(self, rows, one)
        raise Killed

    monkeypatch.setattr(Writer, "_write", dies)
    writer.append(second)
    with pytest.raises(Killed):
        writer.flush()
    writer._file.close()  # as the system does
    if moment == "half a line":
        with (path / store.LINES).open("a") as file:
            file.write('{"first": 3, "first_succ')
    monkeypatch.undo()
    assert_same(Dataset.open(path).read(), first)
    write(path, second)
    assert_same(Dataset.open(path).read(), concatenate([first, second]))


def damage(path, how):
    if how == "bytes":
        chunk = next((path / "arrays" / "reward").glob("0*"))
        chunk.write_bytes(bytes(byte ^ 255 for byte in chunk.read_bytes()))
    elif how == "values":
        (path / "arrays/reward/0.0").unlink()
    elif how == "line":
        lines = path / store.LINES
        lines.write_text(lines.read_text().replace('"first": 0', '"first": 1'))
    elif how == "array":
        (path / "arrays/reward/.zarray").unlink()
    elif how == "facts":
        (path / store.FACTS).write_text('{"format": 1, "spec": {"num_agents": "two"}}')
    elif how == "future":
        facts = json.loads((path / store.FACTS).read_text())
        (path / store.FACTS).write_text(json.dumps(facts | {"format": 99}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("bytes", "damaged"),
        ("values", "is damaged: steps 0 to 3 have changed"),
        ("line", "is damaged: line 1 of episodes.jsonl has changed"),
        ("array", "is damaged"),
        ("facts", "is damaged"),
        ("future", "is damaged: its format is 99, this version reads 1"),
    ],
)
def test_damage_is_one_line(how, message, tmp_path, capsys):
    write(tmp_path / "d", episode(PLAIN, 3))
    damage(tmp_path / "d", how)
    assert main(["data", "info", str(tmp_path / "d")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mam: the dataset {tmp_path / 'd'} is damaged")
    assert message in line


def test_no_dataset_and_an_empty_one(tmp_path):
    with pytest.raises(UserError, match=r"holds no dataset: there is no dataset\.json in it"):
        open_dataset(tmp_path)
    with Writer(tmp_path / "d", PLAIN), pytest.raises(UserError, match="holds no episodes"):
        summarise(open_dataset(tmp_path / "d"))
    assert not (tmp_path / "d").exists()  # what nothing was written to is taken away
    write(tmp_path / "d", episode(SPECS["real"], 2), spec=SPECS["real"])


def test_only_whole_episodes_of_the_same_task_are_appended(tmp_path):
    path = tmp_path / "d"
    write(path, episode(PLAIN, 2))
    with pytest.raises(UserError, match="choose another folder"):
        write(path, episode(SPECS["real"], 2), spec=SPECS["real"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(UserError, match="holds other things than a dataset"):
        write(tmp_path / "other")
    with Writer(path, PLAIN, optional=store.OPTIONAL) as writer:
        with pytest.raises(UserError, match="another process appends to the dataset"):
            Writer(path, PLAIN, optional=store.OPTIONAL)
        with pytest.raises(UserError, match="only whole episodes are recorded"):
            writer.append(cut(episode(PLAIN, 3), 0, 2))
        with pytest.raises(UserError, match=r"own/plain: action is int32\[2\] at a step"):
            writer.append(replace(episode(PLAIN, 2), action=np.zeros((2, 3), np.int32)))
    assert len(Dataset.open(path).lengths) == 1


def test_a_successor_is_stored_where_it_is_not_the_next_observation():
    own = to_rows(episode(PLAIN, 4), PLAIN, ())["has_successor"]
    assert own.tolist() == [True, False, False, True]


def test_the_summary_counts(tmp_path):
    one = episode(PLAIN, 4, terminated=False)
    one = replace(one, action=np.tile(np.int32([1, 2]), (4, 1)))
    one.observation.action_mask[0, 1, 2] = False
    one.observation.agents_view[0, 0, 0] = np.nan
    write(tmp_path / "d", one, optional=("order",))
    summary = summarise(open_dataset(tmp_path / "d"))
    assert (summary.terminated, summary.truncated) == (0, 1)
    assert summary.alive.tolist() == [0.25, 1.0]
    assert summary.actions.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert (summary.illegal, summary.non_finite) == (1, 1)
    assert summary.missing == ("log_prob", "value", "state", "grid")
