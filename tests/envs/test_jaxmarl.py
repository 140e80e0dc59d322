"""JaxMARL's suites: what the adapter adds (order, masks, ends, scales) to JaxMARL's own."""

import functools
import subprocess
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mam.envs.jaxmarl import hanabi, mabrax, mpe, overcooked, smax
from mam.envs.tasks import OVERCOOKED_LAYOUTS, SMAX_TASKS
from mam.errors import UserError
from mam.types import Environment

# Of brax and mujoco, as brax steps are traced.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Accessing .* directly from `Data`:DeprecationWarning"
)

LIMIT = 8  # environment steps
LEFT, STOP, ATTACK = 3, 4, 5  # of SMAX units; ATTACK is the first enemy, followed by the others
COOK_STAY, COOK_INTERACT = 4, 5
COOK_FACES_UP, COOK_FACES_DOWN = 0, 1
ONION, SOUP = 4, 15  # in a cook's hands; three onions on a plate, cooked


@dataclass(frozen=True)
class Task:
    """An environment, compiled, with JaxMARL's own step compiled into the same program."""

    env: Any

    @functools.cached_property
    def reset(self):
        return jax.jit(self.env.reset)

    @functools.cached_property
    def both_steps(self):
        def both_steps(state, action, key):
            own_action = action
            if self.env.spec.name.startswith("mpe/simple_spread"):
                own_action = jnp.concatenate(
                    [jnp.full((3, 1), 0.7), (action + 1) / 2], axis=1
                )  # 0.7: is not read
            own_action = {
                agent: own_action[int(agent.rpartition("_")[2])] for agent in self.env.env.agents
            }
            return self.env.step(state, action, key), self.env.env.step_env(key, state, own_action)

        return jax.jit(both_steps)

    def step(self, state, action, key):
        return self.both_steps(state, action, key)[0]

    def act(self, timestep, rng):
        """Random legal actions, or random components."""
        spec, mask = self.env.spec, np.asarray(timestep.observation.action_mask)
        if spec.continuous:
            return rng.uniform(-1, 1, mask.shape).astype(np.float32)
        return np.array([rng.choice(np.flatnonzero(row)) for row in mask], np.int32)


def short_overcooked(task):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overcooked, "OVERCOOKED_TIME_LIMIT", LIMIT)
        return overcooked.make_overcooked(task)


def short_mabrax(task):
    pytest.importorskip("brax")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mabrax, "MABRAX_TIME_LIMIT", LIMIT)
        return mabrax.make_mabrax(task)


MAKE = {
    "smax": lambda: smax.make_smax_auto(
        agents=11, enemies=2, limit=LIMIT
    ),  # ally_10 sorts before ally_2
    "mpe": lambda: mpe.make_mpe_auto(agents=11, landmarks=2, limit=LIMIT),
    "mpe-continuous": lambda: mpe.make_mpe("simple_spread_3"),
    "overcooked": lambda: short_overcooked("cramped_room"),
    "overcooked-shaped": lambda: short_overcooked("cramped_room-shaped"),
    "hanabi": lambda: hanabi.make_hanabi("2p"),
    "mabrax": lambda: short_mabrax("hopper_3x1"),
}


@functools.cache
def make_task(name):
    return Task(MAKE[name]())


@pytest.fixture(params=MAKE)
def task(request):
    return make_task(request.param)


@pytest.fixture
def battle():
    return make_task("smax")


@pytest.fixture
def robot():
    return make_task("mabrax")


def avals(tree):
    return jax.tree.map(lambda leaf: f"{leaf.dtype} {leaf.shape}" + " weak" * leaf.weak_type, tree)


def test_time_steps_match_the_spec(task):
    """Step returns what reset returns, down to weak types, so that loops compile once."""
    spec, key = task.env.spec, jax.eval_shape(jax.random.key, 0)
    shape = (spec.num_agents, spec.num_actions) if spec.continuous else (spec.num_agents,)
    action = jax.ShapeDtypeStruct(shape, jnp.float32 if spec.continuous else jnp.int32)
    first = jax.eval_shape(task.env.reset, key)
    later = jax.eval_shape(task.env.step, first[0], action, key)
    assert isinstance(task.env, Environment)
    assert avals(first) == avals(later)
    assert not any(aval.endswith("weak") for aval in jax.tree.leaves(avals(first)))
    observation = first[1].observation
    assert observation.agents_view.shape == (spec.num_agents, spec.obs_dim)
    assert observation.agents_view.dtype == jnp.float32
    assert observation.action_mask.shape == (spec.num_agents, spec.num_actions)
    assert observation.action_mask.dtype == observation.alive.dtype == jnp.bool
    assert (observation.state is None) == (spec.state_dim is None)
    assert observation.state is None or observation.state.shape == (spec.state_dim,)
    assert (observation.grid is None) == (spec.grid_shape is None)
    assert observation.grid is None or observation.grid.shape == (spec.num_agents, *spec.grid_shape)


def test_steps_are_jaxmarls(task):
    """Same views, rewards and ends for the same keys and actions, agents in their order."""
    env, agents, rng = task.env, task.env.env.agents, np.random.default_rng(0)
    state, timestep = task.reset(jax.random.key(0))
    for i in range(LIMIT):
        key, action = jax.random.key(1 + i), task.act(timestep, rng)
        (state, timestep), (views, _, rewards, dones, info) = task.both_steps(state, action, key)
        seen = (
            timestep.observation.agents_view
            if env.spec.grid_shape is None
            else timestep.observation.grid
        )
        for n in range(env.spec.num_agents):
            agent = agents[n]
            assert agent.endswith(f"_{n}")
            np.testing.assert_allclose(seen[n], views[agent], atol=1e-6)
            np.testing.assert_allclose(
                timestep.reward[n], own_reward(env, rewards, info, agent), atol=1e-6
            )
        assert timestep.ended == dones["__all__"]
        if timestep.ended:
            break


def own_reward(env, rewards, info, agent):
    shaping = sum(info["shaped_reward"].values()) if env.spec.name.endswith("-shaped") else 0
    return rewards[agent] + shaping


@pytest.mark.parametrize("task", ["smax", "mpe", "overcooked", "mabrax"], indirect=False)
def test_the_time_limit_truncates(task):
    task = make_task(task)
    state, timestep = task.reset(jax.random.key(0))
    idle = np.zeros(timestep.observation.action_mask.shape, np.float32)
    idle = (
        idle if task.env.spec.continuous else np.full(len(idle), STOP, np.int32)
    )  # a cook stays, a particle drifts
    for i in range(LIMIT):
        assert not timestep.ended
        state, timestep = task.step(state, idle, jax.random.key(i))
    assert timestep.truncated
    assert not timestep.terminated


def test_published_limits():
    """SMAX and MPE take a step more than the limit they are given, as in the published results."""
    battle, particles = smax.make_smax("2s3z"), mpe.make_mpe("simple_spread_3-discrete")
    assert (battle.spec.time_limit, battle.env.max_steps) == (101, 100)
    assert (particles.spec.time_limit, particles.env.max_steps) == (26, 25)


def units(state, **fields):
    return replace(state, state=state.state.replace(**fields))


def test_smax_deaths(battle):
    """One agent walks into the wall; it stays dead, sees nothing, may only stop, and is paid."""
    state, timestep = battle.reset(jax.random.key(0))
    assert timestep.observation.alive.all()
    position = state.state.unit_positions.at[3].set(jnp.array([0.1, 16.0]))
    enemies_hurt = state.state.unit_health.at[11:].set(5.0)
    near = position.at[11:].set(position[0] + jnp.array([3.0, 0.0]))
    state = units(state, unit_positions=near, unit_health=enemies_hurt)
    action = np.full(11, ATTACK, np.int32)
    action[3] = LEFT
    for i in range(2):
        state, timestep = battle.step(state, action, jax.random.key(i))
        observation = timestep.observation
        assert not observation.alive[3]
        assert observation.alive[:3].all()
        assert not observation.agents_view[3].any()
        assert observation.agents_view[np.asarray(observation.alive)].any(axis=-1).all()
        assert np.flatnonzero(observation.action_mask[3]).tolist() == [STOP]
        assert (timestep.reward == timestep.reward[0]).all()
        if i == 0:
            assert timestep.reward[3] > 0
            assert observation.action_mask[:3, : STOP + 1].all()


@pytest.mark.parametrize("step", [0, LIMIT - 1], ids=["early", "at the limit"])
@pytest.mark.parametrize(
    ("dead", "won"),
    [(slice(11, 13), 1.0), (slice(0, 11), 0.0), (slice(0, 13), 0.0)],
    ids=["won", "lost", "drawn"],
)
def test_smax_battles_terminate(battle, dead, won, step):
    state, timestep = battle.reset(jax.random.key(0))
    assert timestep.metrics["won"] == 0
    health = state.state.unit_health.at[dead].set(0.0)
    state = units(state, unit_health=health, step=jnp.full_like(state.state.step, step))
    _, timestep = battle.step(state, np.full(11, STOP, np.int32), jax.random.key(0))
    assert timestep.terminated
    assert not timestep.truncated
    assert timestep.metrics["won"] == won
    np.testing.assert_allclose(timestep.reward, won)


def test_smax_global_state(battle):
    """Health, place, cooldown and type of every unit, then teams and types, all in [0, 1]."""
    state, _ = battle.reset(jax.random.key(0))
    idle = np.full(11, STOP, np.int32)
    for i in range(3):
        state, timestep = battle.step(state, idle, jax.random.key(i))
    world, battlefield = timestep.observation.state, state.state
    assert ((world >= 0) & (world <= 1)).all()
    features = world[: 13 * 10].reshape(13, 10)
    np.testing.assert_allclose(features[:, 0], battlefield.unit_health / 45)
    np.testing.assert_allclose(features[:, 1:3], battlefield.unit_positions / 32, rtol=1e-6)
    assert (
        battlefield.unit_weapon_cooldowns < 0
    ).all()  # falls without end while a weapon is ready
    np.testing.assert_allclose(features[:, 4:], jax.nn.one_hot(battlefield.unit_types, 6))
    np.testing.assert_allclose(world[13 * 10 :], [0.0] * 11 + [1.0] * 2 + [0.0] * 13)


@pytest.mark.parametrize(
    ("task", "agents", "enemies", "random_units"),
    [("2s3z", 5, 5, False), ("27m_vs_30m", 27, 30, False), ("smacv2_10_units", 10, 10, True)],
)
def test_smax_settings(task, agents, enemies, random_units):
    env = smax.make_smax(task)
    assert env.spec.name == f"smax/{task}"
    assert env.spec.num_agents == agents
    assert env.spec.num_actions == STOP + 1 + enemies
    assert env.spec.obs_dim == 13 * (agents + enemies - 1) + 10
    assert env.spec.state_dim == 12 * (agents + enemies)
    assert env.spec.team_reward
    assert env.env.see_enemy_actions
    assert env.env.walls_cause_death
    assert env.env.attack_mode == "closest"
    assert env.env.smacv2_unit_type_generation == env.env.smacv2_position_generation == random_units


def test_smax_tasks_are_jaxmarls():
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO

    assert set(SMAX_TASKS) <= set(MAP_NAME_TO_SCENARIO)


@pytest.mark.parametrize(
    ("task", "continuous"), [("simple_spread_10", True), ("simple_spread_5-discrete", False)]
)
def test_mpe_settings(task, continuous):
    spec = mpe.make_mpe(task).spec
    num_agents = int(task.removeprefix("simple_spread_").removesuffix("-discrete"))
    assert (spec.name, spec.num_agents, spec.continuous) == (f"mpe/{task}", num_agents, continuous)
    assert (spec.num_actions, spec.obs_dim) == (
        4 if continuous else 5,
        4 + 4 * (num_agents - 1) + 2 * num_agents,
    )
    assert not spec.team_reward


def test_auto_tasks_have_as_many_on_the_other_side():
    spread, battle = mpe.make_mpe_auto(agents=4, local_ratio=0.0), smax.make_smax_auto(agents=12)
    assert (spread.env.num_landmarks, battle.env.num_enemies) == (4, 12)
    assert spread.spec.team_reward


def test_mpe_collisions_cost_those_who_collide():
    task = make_task("mpe")
    state, _ = task.reset(jax.random.key(0))
    position = (
        jnp.stack([jnp.arange(13) * 1.0, jnp.zeros(13)], axis=1).at[1, 0].set(0.2)
    )  # agents 0 and 1 overlap
    _, timestep = task.step(
        replace(state, p_pos=position), np.zeros(11, np.int32), jax.random.key(0)
    )
    reward = timestep.reward - timestep.reward[-1]
    np.testing.assert_allclose(reward, [-0.5, -0.5] + [0.0] * 9, atol=1e-6)


def test_mpe_continuous_actions_are_rescaled():
    """Component 1 pushes right and 0 left, 3 up and 2 down; -1 is no push, 1 the full one."""
    task = make_task("mpe-continuous")
    state, _ = task.reset(jax.random.key(0))
    action = np.full((3, 4), -1.0, np.float32)
    action[0, 1] = 1.0
    action[1, 2] = 0.0  # half a push
    action[2, :2] = 1.0  # to both sides
    state = replace(state, p_pos=jnp.array([[0.0, 0.0], [5, 5], [-5, -5], [1, 1], [1, 1], [1, 1]]))
    state, _ = task.step(state, action, jax.random.key(0))
    np.testing.assert_allclose(
        state.p_vel[:3], [[0.5, 0], [0, -0.25], [0, 0]], atol=1e-6
    )  # acceleration 5, for 0.1


def test_overcooked_rewards_are_shared():
    """Serving a soup earns 20, filling a pot something in the shaped task only."""
    plain, shaped = make_task("overcooked"), make_task("overcooked-shaped")
    state, _ = plain.reset(jax.random.key(0))

    def first_cook(x, y, direction, item):
        agents = state.agents
        return state.replace(
            agents=agents.replace(
                pos=agents.pos.replace(x=agents.pos.x.at[0].set(x), y=agents.pos.y.at[0].set(y)),
                dir=agents.dir.at[0].set(direction),
                inventory=agents.inventory.at[0].set(item),
            )
        )

    action = np.array([COOK_INTERACT, COOK_STAY], np.int32)
    at_pot, at_counter = (
        first_cook(2, 1, COOK_FACES_UP, ONION),
        first_cook(3, 2, COOK_FACES_DOWN, SOUP),
    )
    for task, expected in ((plain, [0, 20]), (shaped, [3, 20])):
        rewards = [
            task.step(start, action, jax.random.key(0))[1].reward for start in (at_pot, at_counter)
        ]
        np.testing.assert_allclose(rewards, np.repeat(expected, 2).reshape(2, 2))


@pytest.mark.parametrize("layout", OVERCOOKED_LAYOUTS)
def test_overcooked_layouts(layout):
    spec = overcooked.make_overcooked(layout).spec
    rows, columns, channels = spec.grid_shape
    assert (spec.name, spec.num_agents, spec.obs_dim, spec.num_actions) == (
        f"overcooked/{layout}",
        2,
        0,
        6,
    )
    assert rows in (4, 5)
    assert columns in (5, 8, 9)
    assert (channels, spec.time_limit) == (30, 400)
    assert spec.team_reward


def test_hanabi_is_played_in_turn_to_its_end():
    task, rng = make_task("hanabi"), np.random.default_rng(0)
    state, timestep = task.reset(jax.random.key(0))
    nothing, score, turn = task.env.spec.num_actions - 1, 0.0, 0
    while not timestep.ended:
        mask = np.asarray(timestep.observation.action_mask)
        assert not mask[turn % 2, nothing]
        assert mask[turn % 2].any()
        assert np.flatnonzero(mask[1 - turn % 2]).tolist() == [nothing]
        state, timestep = task.step(state, task.act(timestep, rng), jax.random.key(0))
        assert timestep.reward[0] == timestep.reward[1]
        score, turn = score + float(timestep.reward[0]), turn + 1
    assert timestep.terminated
    assert not timestep.truncated
    assert score == state.score


@pytest.mark.parametrize(
    ("task", "num_agents", "num_actions"), [("2p", 2, 21), ("3p", 3, 31), ("5p", 5, 49)]
)
def test_hanabi_settings(task, num_agents, num_actions):
    spec = hanabi.make_hanabi(task).spec
    assert (spec.name, spec.num_agents, spec.num_actions) == (
        f"hanabi/{task}",
        num_agents,
        num_actions,
    )
    assert spec.time_limit is None


@pytest.mark.parametrize("step", [0, LIMIT - 1], ids=["early", "at the limit"])
def test_mabrax_falls_terminate(robot, step):
    state, _ = robot.reset(jax.random.key(0))
    body = state.pipeline_state.x_i
    sunk = body.replace(pos=body.pos.at[:, 2].add(-1.0))
    state = replace(
        state,
        pipeline_state=state.pipeline_state.replace(x_i=sunk),
        info=state.info | {"steps": jnp.full_like(state.info["steps"], step)},
    )
    _, timestep = robot.step(state, np.zeros((3, 1), np.float32), jax.random.key(0))
    assert timestep.terminated
    assert not timestep.truncated


def test_mabrax_masks_the_padding():
    """The humanoid's agents have 9 and 8 joints."""
    pytest.importorskip("brax")
    env = mabrax.make_mabrax("humanoid_9|8")
    mask = jax.jit(lambda key: env.reset(key)[1].observation.action_mask)(jax.random.key(0))
    assert mask.sum(axis=1).tolist() == [9, 8]
    assert mask[:, :8].all()
    assert (env.spec.num_agents, env.spec.num_actions, env.spec.time_limit) == (2, 9, 1000)
    assert env.spec.continuous
    assert not env.env.auto_reset


@pytest.mark.parametrize("name", ["smax", "mpe", "overcooked"])
def test_animate_writes_a_gif(name, tmp_path, monkeypatch):
    if name == "overcooked":  # JaxMARL's viewer imports imageio, for a function that is not used
        monkeypatch.setitem(sys.modules, "imageio", ModuleType("imageio"))
    task, rng = make_task(name), np.random.default_rng(0)
    state, timestep = task.reset(jax.random.key(0))
    states = [state]
    for i in range(2):
        state, timestep = task.step(state, task.act(timestep, rng), jax.random.key(i))
        states.append(state)
    task.env.animate(states, tmp_path / "episode.gif")
    with Image.open(tmp_path / "episode.gif") as picture:
        assert picture.format == "GIF"
        assert picture.n_frames >= 2  # frames that are the same are joined


def test_what_cannot_be_drawn_says_so(tmp_path):
    with pytest.raises(NotImplementedError, match="hanabi/2p cannot be drawn"):
        make_task("hanabi").env.animate([], tmp_path / "episode.gif")


def test_options_are_checked():
    with pytest.raises(UserError, match="smax/auto: enemies must be at least 1, got -1"):
        smax.make_smax_auto(enemies=-1)
    with pytest.raises(UserError, match=r"mpe/auto: local_ratio must be between 0 and 1, got 1.5"):
        mpe.make_mpe_auto(local_ratio=1.5)


def test_import_is_quiet_and_leaves_the_streams_alone():
    """JaxMARL prints, imports brax if it is there, and replaces both streams then."""
    code = (
        "import sys; streams = sys.stdout, sys.stderr\n"
        "from mam.envs.jaxmarl import base, mpe, smax\n"
        "assert 'jaxmarl' not in sys.modules\n"
        "base.import_jaxmarl()\n"
        "assert 'jaxmarl' in sys.modules and 'brax' not in sys.modules\n"
        "assert (sys.stdout, sys.stderr) == streams\n"
        "print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"
