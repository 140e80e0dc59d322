"""Environments in worker processes: the same as without them, whatever happens to them."""

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import host_environments as hosts
import jax
import numpy as np
import pytest
from host_environments import EXITS, KILLED, LIMIT, LIVES, RAISES, STUCK, Faulty, Lives

from mam.config import WorkerConfig
from mam.envs.external import process as parent_end
from mam.envs.external import worker as child
from mam.envs.external.factories import find_factory
from mam.envs.external.pettingzoo import PettingZooEnv
from mam.envs.external.pool import ExternalPool
from mam.errors import RunError, UserError
from mam.types import Environment, ExternalEnvironments

NUM_ENVS = 4
ACTIONS = np.random.default_rng(0).integers(0, 5, (20, NUM_ENVS, len(LIVES)))


@pytest.fixture(scope="module")
def pool():
    """For tests that leave it usable. Its workers refuse to start beside JAX."""
    with ExternalPool("test", hosts.jaxless, NUM_ENVS, num_workers=2) as pool:
        yield pool


@pytest.fixture
def make_pool():
    """Makes pools for tests that want another, or spoil it; closed after the test."""
    pools = []

    def make(factory=Lives, num_envs=NUM_ENVS, num_workers=1, **kwargs):
        pools.append(ExternalPool("test", factory, num_envs, num_workers, **kwargs))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def play_alone(place, seed, actions):
    """What should happen to one environment of a pool, step by step."""
    env = PettingZooEnv(Lives(), "test")
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(place, 0)))
    first = env.reset(int(random.integers(2**31)))
    no_reward = np.zeros(len(LIVES), np.float32)
    steps = [(first, first, no_reward, [False, False], [0.0, 0.0])]
    returns, length = np.float32(0), 0
    for action in actions:
        outcome = env.step(action)
        returns, length = returns + outcome.reward.mean(), length + 1
        ended = [outcome.terminated, outcome.truncated]
        after = env.reset(int(random.integers(2**31))) if any(ended) else outcome.observation
        steps.append((after, outcome.observation, outcome.reward, ended, [returns, length]))
        returns, length = (np.float32(0), 0) if any(ended) else (returns, length)
    return steps


def as_tuple(timestep, num_ids):
    """A pool's time step in the form of `play_alone`, without ids."""

    def observation(seen):
        fields = {name: value for name, value in vars(seen).items() if value is not None}
        return fields | {"agents_view": seen.agents_view[..., num_ids:]}

    return (
        observation(timestep.observation),
        observation(timestep.final_observation),
        timestep.reward,
        [timestep.terminated, timestep.truncated],
        [timestep.metrics["episode_return"], timestep.metrics["episode_length"]],
    )


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def fates(**places):
    """Actions in which ann does something: fates(at2=KILLED) in environment 2."""
    action = np.zeros((NUM_ENVS, len(LIVES)), int)
    for place, fate in places.items():
        action[int(place.removeprefix("at")), 0] = fate
    return action


def pids(pool):
    return [worker.process.pid for worker in pool._workers]


def children():
    return {process.pid for process in multiprocessing.active_children()}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_pool_equals_environments_stepped_one_after_the_other(pool, make_pool, num_workers):
    """To the bit, over several episodes, auto-reset and statistics included."""
    pool = pool if num_workers == 2 else make_pool(num_workers=num_workers)
    for seed in (7, 8, 7):
        games = [play_alone(place, seed, ACTIONS[:, place]) for place in range(NUM_ENVS)]
        expected = [
            jax.tree.map(lambda *rows: np.stack(rows), *step) for step in zip(*games, strict=True)
        ]
        timesteps = [pool.reset(seed), *map(pool.step, ACTIONS)]
        before = copy.deepcopy(timesteps)
        assert_equal([as_tuple(timestep, num_ids=3) for timestep in timesteps], expected)
    assert_equal(timesteps, before)  # nobody wrote over them
    assert isinstance(pool, ExternalEnvironments)
    assert not isinstance(pool, Environment)
    assert pool.num_envs == NUM_ENVS
    assert pool.notes == PettingZooEnv(Lives(), "test").notes


def test_auto_reset_keeps_the_final_observation(pool):
    pool.reset(0)
    timesteps = [pool.step(action) for action in ACTIONS[:LIMIT]]
    steps, last = timesteps[-1].observation.state[:, 0], timesteps[-1].final_observation
    np.testing.assert_array_equal(steps, np.zeros(NUM_ENVS))
    np.testing.assert_array_equal(last.state[:, 0], np.full(NUM_ENVS, LIMIT))
    np.testing.assert_array_equal(last.alive, [[False, False, True]] * NUM_ENVS)
    assert timesteps[-1].truncated.all()
    assert not timesteps[-1].terminated.any()
    np.testing.assert_array_equal(timesteps[-1].metrics["episode_length"], np.full(NUM_ENVS, LIMIT))
    assert not any(timestep.ended.any() for timestep in timesteps[:-1])


def test_final_observation_keeps_who_is_truncated_alone(make_pool):
    pool = make_pool(hosts.Parting, num_envs=1)
    timesteps = [pool.reset(0), *(pool.step(action) for action in ACTIONS[:3, :1])]
    alive = [
        (timestep.observation.alive[0, 1], timestep.final_observation.alive[0, 1])
        for timestep in timesteps
    ]
    assert alive == [(True, True), (True, True), (False, True), (False, False)]
    assert timesteps[2].final_observation.agents_view[0, 1, 3] == 2  # its last step
    assert pool.reset(1).final_observation.alive.all()


@pytest.mark.parametrize(("agent_id", "num_ids"), [("one_hot", 3), ("none", 0)])
def test_agents_see_who_they_are(pool, make_pool, agent_id, num_ids):
    pool = pool if agent_id == "one_hot" else make_pool(num_envs=1, agent_id=agent_id)
    pool.reset(0)
    for action in ACTIONS[:LIMIT, : pool.num_envs]:
        timestep = pool.step(action)
        for observation in (timestep.observation, timestep.final_observation):
            assert observation.agents_view.shape == (pool.num_envs, 3, pool.spec.obs_dim)
            ids = observation.agents_view[:, :, :num_ids]
            np.testing.assert_array_equal(ids, np.broadcast_to(np.eye(3)[:, :num_ids], ids.shape))
    spec = pool.spec
    assert (spec.name, spec.num_agents, spec.obs_dim, spec.num_actions) == (
        "test",
        3,
        num_ids + 4,
        5,
    )
    assert (spec.time_limit, spec.state_dim, spec.team_reward) == (LIMIT, 2, False)
    assert spec.agent_names == ("ann", "bob", "cleo")


def test_images_and_continuous_actions(make_pool):
    pool = make_pool(hosts.Camera, num_envs=2)
    assert (pool.spec.continuous, pool.spec.num_actions, pool.spec.grid_shape) == (
        True,
        2,
        (2, 3, 1),
    )
    first = pool.reset(0).observation
    assert first.grid.shape == (2, 2, 2, 3, 1)
    assert first.grid.dtype == np.uint8
    assert first.agents_view.shape == (2, 2, 2)  # only who they are
    actions = np.array([[[-1, 0], [1, 0]], [[0, -1], [-0.5, 1]]])
    grid = pool.step(actions).observation.grid
    np.testing.assert_array_equal(grid[..., 0, 0, 0], [[0, 200], [100, 50]])
    np.testing.assert_array_equal(grid[..., 1, 2, 0], [[100, 100], [0, 200]])
    assert not first.grid.any()


def test_several_choices_at_once(make_pool):
    pool = make_pool(hosts.Signals, num_envs=2)
    assert (pool.spec.action_components, pool.spec.num_actions) == ((4, 2), 6)
    mask = pool.reset(0).observation.action_mask
    np.testing.assert_array_equal(mask, [[[1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 1, 0]]] * 2)
    actions = np.array([[[2, 1], [3, 0]], [[0, 1], [1, 0]]])
    seen = pool.step(actions).observation.agents_view[..., 2:]
    np.testing.assert_array_equal(seen, [[[2, 1], [3, 3]], [[0, 1], [1, 1]]])
    assert pool.spec.joint_action.shape == actions.shape[1:]


def test_mpe2(make_pool):
    pytest.importorskip("mpe2")
    pool = make_pool(find_factory("pettingzoo/mpe2:simple_spread_v3:max_cycles=4"), num_envs=2)
    first = pool.reset(0)
    assert first.observation.agents_view.shape == (2, 3, 3 + 18)
    timesteps = [pool.step(np.full((2, 3), t % 5)) for t in range(8)]
    assert [timestep.truncated.all() for timestep in timesteps] == [False, False, False, True] * 2
    assert not any(timestep.terminated.any() for timestep in timesteps)
    assert timesteps[3].final_observation.alive.all()
    assert (
        (timesteps[3].final_observation.agents_view != timesteps[3].observation.agents_view)
        .any(axis=(1, 2))
        .all()
    )
    np.testing.assert_allclose(
        timesteps[3].metrics["episode_return"],
        sum(timestep.reward.mean(axis=1) for timestep in timesteps[:4]),
        rtol=1e-6,
    )


@pytest.mark.parametrize("most", [32, 1])
def test_numbers_in_infos_are_metrics_of_the_episodes_that_end(
    make_pool, monkeypatch, caplog, most
):
    monkeypatch.setattr("mam.envs.external.pool.MAX_INFOS", most)
    pool = make_pool(hosts.Informed, num_envs=2)
    pool.reset(0)
    timesteps = [pool.step(action) for action in ACTIONS[: 2 * LIMIT, :2]]
    expected = dict([("info_won", 1.0), ("info_steps", LIMIT)][:most])
    assert caplog.messages == [
        f"test: numbers in infos are recorded as metrics: {', '.join(expected)}"
    ]
    for step, timestep in enumerate(timesteps, start=1):
        infos = {
            name: x.tolist() for name, x in timestep.metrics.items() if name.startswith("info_")
        }
        if step % LIMIT == 0:
            assert infos == {name: [value] * 2 for name, value in expected.items()}
        else:
            assert np.isnan(list(infos.values())).all()
            assert set(infos) == (set() if step < LIMIT else set(expected))


def test_environments_may_have_children(make_pool):
    assert make_pool(hosts.Parent, num_envs=1).reset(0).observation.alive.all()


def test_environments_know_their_places(make_pool, monkeypatch):
    pool = make_pool(hosts.numbered, num_workers=2)
    pool.reset(0)
    for place in range(NUM_ENVS):
        assert pool.step(ACTIONS[place]).ended[place:].tolist() == [True] + [False] * (
            NUM_ENVS - place - 1
        )


# Workers that are lost.


def assert_cut_short(timestep, before, rows, others):
    """Episodes of `rows` ended where they were last seen, without reward; the others went on."""
    np.testing.assert_array_equal(timestep.truncated[rows], True)
    np.testing.assert_array_equal(timestep.reward[rows], 0)
    assert_equal(
        jax.tree.map(lambda x: x[rows], timestep.final_observation),
        jax.tree.map(lambda x: x[rows], before.observation),
    )
    np.testing.assert_array_equal(timestep.observation.state[rows, 0], 0)
    assert not timestep.ended[others].any()
    assert timestep.reward[others].all()
    assert not timestep.terminated.any()


def test_worker_that_is_killed_in_the_middle_of_a_step(pool, caplog):
    pool.reset(0)
    before = pool.step(fates())
    noise = before.observation.state[:, 1]
    timestep = pool.step(fates(at3=KILLED))
    assert caplog.messages == [
        "test: worker 1 (environments 2 to 3) was killed by SIGKILL; starting it again"
    ]
    assert_cut_short(timestep, before, rows=[2, 3], others=[0, 1])
    np.testing.assert_array_equal(timestep.metrics["episode_length"], 2)
    np.testing.assert_allclose(
        timestep.metrics["episode_return"][2:], before.metrics["episode_return"][2:], rtol=1e-6
    )  # nothing was added
    timestep = pool.step(fates())
    np.testing.assert_array_equal(timestep.observation.state[:, 0], [3, 3, 1, 1])
    np.testing.assert_array_equal(timestep.metrics["episode_length"], [3, 3, 1, 1])
    # The same seed is the same again, lost workers or not.
    pool.reset(0)
    np.testing.assert_array_equal(pool.step(fates()).observation.state[:, 1], noise)


def test_worker_that_died_between_steps(pool, caplog):
    before = pool.reset(0)
    os.kill(pids(pool)[0], signal.SIGTERM)
    assert_cut_short(pool.step(fates()), before, rows=[0, 1], others=[2, 3])
    assert "worker 0 (environments 0 to 1) was killed by SIGTERM" in caplog.text
    os.kill(pids(pool)[1], signal.SIGKILL)
    assert not pool.reset(0).ended.any()
    assert "worker 1 (environments 2 to 3) was killed by SIGKILL" in caplog.text
    assert not pool.step(fates()).ended.any()


def test_worker_that_hangs(pool, monkeypatch, caplog):
    before = pool.reset(0)
    stuck = pids(pool)[0]
    monkeypatch.setattr(pool, "_limits", WorkerConfig(step_timeout=2.0))
    assert_cut_short(pool.step(fates(at0=STUCK)), before, rows=[0, 1], others=[2, 3])
    assert (
        "worker 0 (environments 0 to 1) did not answer within 2 s; starting it again" in caplog.text
    )
    assert stuck not in pids(pool)
    with pytest.raises(ProcessLookupError):
        os.kill(stuck, 0)


def test_worker_that_dies_again_and_again(make_pool, monkeypatch, caplog):
    monkeypatch.setattr("mam.envs.external.pool.MAX_FAILURES", 1)
    pool = make_pool(Faulty, num_envs=1)
    pool.reset(0)
    action = np.zeros((1, 3), int)
    # An episode that ends in between, and the count begins anew; a step does not suffice.
    for fate in (KILLED, *[0] * LIMIT, KILLED, 0):
        action[:, 0] = fate
        pool.step(action)
    action[:, 0] = KILLED
    with pytest.raises(
        RunError,
        match=r"^test: worker 0 \(environment 0\) was killed by SIGKILL, 2 times in a row$",
    ):
        pool.step(action)
    assert len(caplog.messages) == 2


def test_long_episodes_are_no_reason_to_give_a_worker_up(make_pool, monkeypatch, caplog):
    monkeypatch.setattr("mam.envs.external.pool.MAX_FAILURES", 1)
    monkeypatch.setattr("mam.envs.external.pool.RECOVERED", 1)
    pool = make_pool(Faulty, num_envs=1)
    pool.reset(0)
    action = np.zeros((1, 3), int)
    for fate in (KILLED, 0, KILLED):
        action[:, 0] = fate
        pool.step(action)
    pool.close()
    assert caplog.messages[-1].endswith("cut short because their worker had to be started again: 2")


def test_worker_that_dies_at_birth(make_pool, monkeypatch):
    before = children()
    monkeypatch.setattr("mam.envs.external.pool.MAX_FAILURES", 1)
    with pytest.raises(
        RunError,
        match=r"^test: worker 0 \(environment 0\) ended with exit code 7, 2 times in a row$",
    ):
        make_pool(hosts.stillborn, num_envs=1)
    assert children() == before


# Environments with bugs.


RAISING = pytest.mark.parametrize(
    ("fate", "what"), [(RAISES, "ValueError: out of cheese"), (EXITS, "SystemExit: 3")]
)


@RAISING
def test_environment_that_raises_is_started_again(make_pool, caplog, fate, what):
    pool = make_pool(Faulty, num_workers=2)
    before = pool.reset(0)
    assert_cut_short(pool.step(fates(at3=fate)), before, rows=[2, 3], others=[0, 1])
    who = "worker 1 (environments 2 to 3)"
    pool.step(fates(at3=fate))
    told = f"test: stepping environment 3 raised {what}; starting {who} again"
    first, second = caplog.messages
    assert first.splitlines()[0] == second == told
    assert "host_environments.py" in first  # where; once
    assert not pool.step(fates()).ended.any()


@RAISING
def test_but_not_for_ever(make_pool, fate, what):
    """What it raised is shown, and the pool is closed."""
    before = children()
    pool = make_pool(Faulty, num_envs=1, limits=WorkerConfig(max_restarts=1))
    pool.reset(0)
    pool.step(fates(at0=fate)[:1])
    pool.step(fates()[:1])
    with pytest.raises(RunError) as error:
        pool.step(fates(at0=fate)[:1])
    first, *rest = str(error.value).splitlines()
    assert (
        first
        == f"test: stepping environment 0 raised {what}, after 1 restarts (--worker.max-restarts)"
    )
    assert any("host_environments.py" in line for line in rest)
    assert children() == before
    with pytest.raises(RuntimeError, match=r"^test: the pool is closed$"):
        pool.step(fates()[:1])


@pytest.mark.parametrize(("doing", "seconds"), [("aaaa", 3), ("aabbbb", 5), ("abcabcdddd", 9)])
def test_time_starts_anew_with_every_environment(monkeypatch, doing, seconds):
    """Three seconds for one environment, not for all that a worker has."""
    seen, waits = iter(doing), []
    worker = parent_end.WorkerProcess(0, child.Share("test", b"", 0, 1, quiet=True))
    worker.connection = None
    monkeypatch.setattr(parent_end, "wait", lambda *args: waits.append(args) or [])
    _, lost = parent_end.wait_for_answers(
        [worker], lambda _: parent_end.Deadline(3.0, next(seen).encode())
    )
    assert lost == {worker: "did not answer within 3 s"}
    assert len(waits) == seconds


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (hosts.broken, "test: making environment 0 raised ZeroDivisionError: no environment today"),
        (hosts.uneven, "test: environment 1 has other agents or spaces than the first"),
        (object, "test: object is not a PettingZoo ParallelEnv: it has no possible_agents"),
        (
            lambda: Lives(),
            "test: worker processes cannot import what makes the environment, which must be",
        ),
    ],
)
def test_factories_that_will_not_do(make_pool, factory, message):
    before = children()
    with pytest.raises(UserError) as error:
        make_pool(factory)
    assert str(error.value).startswith(message)
    assert children() == before


def test_numbers_that_will_not_do(pool, make_pool):
    with pytest.raises(
        UserError, match=r"^test: num_envs and num_workers must be positive, got 0 and 2$"
    ):
        make_pool(num_envs=0, num_workers=2)
    pool.reset(0)
    with pytest.raises(ValueError, match=r"^actions have shape \(4,\), expected \(4, 3\)$"):
        pool.step(np.zeros(4, int))
    assert not pool.step(fates()).ended.any()


# The end.


def test_nothing_is_left_after_close():
    before, maps = children(), mapped()
    with ExternalPool("test", Lives, 1, agent_id="none") as pool:
        timestep = pool.reset(0)
        assert children() == before | set(pids(pool))
        assert mapped() > maps
    assert children() == before
    assert mapped() == maps
    assert timestep.observation.alive.all()  # what was given out stays
    pool.close()


def mapped():
    """How often shared memory is mapped or open here."""
    places = [os.readlink(file) for file in Path("/proc/self/fd").glob("*") if file.is_symlink()]
    return "".join([*places, Path("/proc/self/maps").read_text()]).count("memfd:mam")


def test_pool_that_is_forgotten_is_closed():
    before = children()
    pool = ExternalPool("test", Lives, 1)
    assert children() != before
    del pool
    assert children() == before


def test_ctrl_c_is_the_parents_business(pool):
    pool.reset(0)
    before = pids(pool)
    for pid in before:
        os.kill(pid, signal.SIGINT)
    assert not pool.step(fates()).ended.any()
    assert pids(pool) == before


def test_interrupted_pool_is_closed(make_pool, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    before = children()
    monkeypatch.setattr(parent_end, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_pool()
    assert children() == before


SCRIPT = """
import sys, time
from host_environments import Lives

class Mine(Lives):  # of the script itself
    def step(self, actions):
        print("stuck", flush=True)
        while True:
            time.sleep(60)

if __name__ == "__main__":
    import numpy as np
    from mam.envs.external.pool import ExternalPool

    pool = ExternalPool("test", Mine, 2, 2)
    pool.reset(0)
    if sys.argv[1] == "exit":
        sys.exit(3)
    pool.step(np.zeros((2, 3)))
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_nothing_is_left_after_the_parents_end(tmp_path, end):
    """Standard output, which all its processes inherit, ends when the last of them does."""
    (tmp_path / "script.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py", end],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        if end == "kill":
            assert parent.stdout.readline().startswith("stuck")
            parent.kill()
        _, errors = parent.communicate(timeout=300)
        assert errors == ""
        assert parent.returncode == (3 if end == "exit" else -signal.SIGKILL)
