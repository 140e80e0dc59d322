"""Good settings by task.

A preset's name is a task, with any options, a suite for all of its tasks that have none of their
own, or a policy, to be asked for (`--preset mappo`). A public sweep over a sister sequence model is
where most numbers come from. A score that a docstring gives was measured here, and stands in the
file of results that it names.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mam.config import Config, EvalConfig, NetworkConfig, PPOConfig, RecurrenceConfig
from mam.errors import unknown_name


def lbf_smallest() -> Config:
    """Two agents that must forage together: the task to try first.

    `mam train`, which `make train` runs: minutes on 2 CPU cores. Twice as long, and with
    `--network.observation-norm layer --ppo.no-normalise-value`, the absolute metric over five seeds
    is 0.990 [0.984, 0.994], with `--policy mat` 0.991 [0.987, 0.995] (results/lbf/README.md).
    """
    return Config(
        env="lbf/2s-8x8-2p-2f-coop",
        total_timesteps=500_000,
        network=NetworkConfig(d_model=32, num_blocks=1, d_state=8),
        ppo=PPOConfig(lr=1e-3, num_minibatches=4, max_grad_norm=0.5, clip_eps=0.2, ent_coef=0.01),
    )


def lbf() -> Config:
    """Level-Based Foraging, any task."""
    return Config(
        env="lbf/2s-10x10-3p-3f",
        total_timesteps=20_000_000,
        network=NetworkConfig(d_model=128, num_blocks=1),
        ppo=PPOConfig(lr=5e-4, num_minibatches=4, max_grad_norm=10.0, clip_eps=0.2, ent_coef=0.01),
        eval=EvalConfig(num_evaluations=122),
    )


def lbf_15x15_4p_5f() -> Config:
    """Level-Based Foraging with four agents and five foods on the large grid."""
    return replace(
        lbf(),
        env="lbf/15x15-4p-5f",
        network=NetworkConfig(d_model=128, num_blocks=3),
        ppo=PPOConfig(
            lr=2.5e-4,
            num_epochs=15,
            num_minibatches=1,
            max_grad_norm=0.5,
            clip_eps=0.1,
            ent_coef=0.01,
        ),
    )


def lbf_auto() -> Config:
    """Level-Based Foraging of any size, with many agents: 32 of them learn in minutes on a CPU.

    The absolute metric over three seeds is 0.886 [0.869, 0.898] (results/many_agents/README.md).
    Agents know the time: without it independent ones lose a quarter of the food in greedy play.
    """
    return Config(
        env="lbf/auto:agents=32,grid=32",
        agent_id="none",
        total_timesteps=200_000,
        network=NetworkConfig(
            d_model=32, num_blocks=1, d_state=8, recurrence=RecurrenceConfig(clock="on")
        ),
        ppo=PPOConfig(
            lr=1e-3, num_envs=16, num_epochs=4, num_minibatches=4, max_grad_norm=0.5, ent_coef=0.01
        ),
        eval=EvalConfig(num_evaluations=10, num_episodes=16, num_absolute_episodes=64),
    )


def rware() -> Config:
    """Robotic warehouse, any task.

    Policies with memory learn from sequences of 4 steps, which is best for all that were measured
    but Sable: its best is `--ppo.sequence-length 128` (results/rware/README.md).
    """
    return Config(
        env="rware/tiny-4ag",
        total_timesteps=20_000_000,
        network=NetworkConfig(d_model=128, num_blocks=1),
        ppo=PPOConfig(
            lr=5e-4,
            sequence_length=4,
            num_minibatches=4,
            max_grad_norm=10.0,
            clip_eps=0.1,
            ent_coef=0.01,
        ),
        eval=EvalConfig(num_evaluations=122),
    )


def rware_tiny_2ag() -> Config:
    """Two robots in the smallest warehouse, at a size that learns on a CPU.

    `mam train --env rware/tiny-2ag`.
    """
    return Config(
        env="rware/tiny-2ag",
        total_timesteps=4_000_000,
        network=NetworkConfig(d_model=32, num_blocks=1, d_state=8),
        ppo=replace(rware().ppo, lr=1e-3, anneal_lr=True, max_grad_norm=5.0, clip_eps=0.2),
    )


def rware_tiny_4ag() -> Config:
    """Four robots in the smallest warehouse."""
    config = rware()
    return replace(
        config,
        env="rware/tiny-4ag",
        network=NetworkConfig(d_model=128, num_blocks=3),
        ppo=replace(config.ppo, num_minibatches=2, max_grad_norm=0.5),
    )


def _long(env: str, d_model: int, num_blocks: int, **ppo: Any) -> Config:
    """Return a run of the published length: 20 million steps, 122 evaluations."""
    return Config(
        env=env,
        total_timesteps=20_000_000,
        network=NetworkConfig(d_model=d_model, num_blocks=num_blocks),
        ppo=PPOConfig(**ppo),
        eval=EvalConfig(num_evaluations=122),
    )


def smax() -> Config:
    """StarCraft-like battles, any of them."""
    return _long(
        "smax/2s3z",
        128,
        1,
        lr=5e-4,
        num_minibatches=4,
        max_grad_norm=10.0,
        clip_eps=0.2,
        ent_coef=0.01,
    )


def smax_5m_vs_6m() -> Config:
    """Marines against one marine more."""
    return _long(
        "smax/5m_vs_6m",
        64,
        1,
        lr=1e-3,
        num_epochs=2,
        num_minibatches=2,
        max_grad_norm=0.5,
        clip_eps=0.1,
        ent_coef=1e-3,
    )


def smax_10m_vs_11m() -> Config:
    """Ten marines against eleven."""
    return replace(
        smax_5m_vs_6m(), env="smax/10m_vs_11m", network=NetworkConfig(d_model=32, num_blocks=2)
    )


def smax_27m_vs_30m() -> Config:
    """Twenty-seven marines against thirty."""
    return _long(
        "smax/27m_vs_30m",
        128,
        1,
        lr=5e-4,
        num_minibatches=4,
        max_grad_norm=5.0,
        clip_eps=0.2,
        ent_coef=1e-3,
    )


def smax_6h_vs_8z() -> Config:
    """Hydralisks against zealots."""
    return _long(
        "smax/6h_vs_8z",
        128,
        1,
        lr=1e-3,
        num_epochs=10,
        num_minibatches=1,
        max_grad_norm=0.5,
        clip_eps=0.1,
        ent_coef=1e-3,
    )


def smax_smacv2_5_units() -> Config:
    """Five units of random kinds in random places."""
    ppo = {
        "num_epochs": 10,
        "num_minibatches": 1,
        "max_grad_norm": 5.0,
        "clip_eps": 0.05,
        "ent_coef": 1e-3,
    }
    return _long("smax/smacv2_5_units", 64, 1, lr=1e-3, **ppo)


def connector() -> Config:
    """Agents that lay wires to their targets without crossing, any board."""
    return _long(
        "connector/5x5x3a",
        128,
        1,
        lr=1e-3,
        num_minibatches=8,
        max_grad_norm=10.0,
        clip_eps=0.05,
        ent_coef=0.01,
    )


def connector_largest() -> Config:
    """Twenty-three agents on the largest board."""
    config = connector()
    return replace(config, env="connector/15x15x23a", ppo=replace(config.ppo, num_minibatches=4))


def cleaner() -> Config:
    """Agents that clean a maze together, any size."""
    return replace(connector(), env="cleaner/10x10x3a")


def mpe() -> Config:
    """Particles that spread over landmarks, any number."""
    return _long(
        "mpe/simple_spread_3",
        128,
        3,
        lr=5e-4,
        num_minibatches=8,
        max_grad_norm=0.5,
        clip_eps=0.1,
        ent_coef=1e-3,
    )


def mpe_simple_spread_10() -> Config:
    """Ten particles."""
    return _long(
        "mpe/simple_spread_10",
        128,
        1,
        lr=1e-3,
        num_minibatches=4,
        max_grad_norm=10.0,
        clip_eps=0.2,
        ent_coef=0.01,
    )


def mabrax() -> Config:
    """Limbs of one robot as agents, any robot."""
    return _long(
        "mabrax/ant_4x2",
        128,
        1,
        lr=5e-4,
        num_minibatches=4,
        max_grad_norm=0.5,
        clip_eps=0.1,
        ent_coef=1e-3,
    )


def overcooked() -> Config:
    """Two cooks in one kitchen, any kitchen."""
    return _long(
        "overcooked/cramped_room",
        128,
        1,
        lr=5e-4,
        num_minibatches=4,
        max_grad_norm=0.5,
        ent_coef=0.01,
    )


def hanabi() -> Config:
    """Hanabi, the card game, any number of players."""
    return _long("hanabi/2p", 128, 1, lr=5e-4, num_minibatches=4, max_grad_norm=0.5, ent_coef=0.01)


def camar() -> Config:
    """Routing of many agents: 32 in a crowd, at a size that learns on a CPU."""
    return Config(
        env="camar/crowd-32",
        agent_id="none",
        total_timesteps=500_000,
        network=NetworkConfig(d_model=32, num_blocks=1, d_state=8),
        ppo=PPOConfig(
            lr=1e-3, num_envs=16, num_epochs=4, num_minibatches=4, max_grad_norm=0.5, ent_coef=1e-3
        ),
        eval=EvalConfig(num_evaluations=10, num_episodes=16, num_absolute_episodes=64),
    )


def camar_crowd_8() -> Config:
    """Eight agents in a crowd: the smallest routing, with a goal of 2 cm to stop at.

    Collisions cease in the first 50,000 steps; agents on their goals are few until long after.
    """
    base = camar()
    return replace(
        base,
        env="camar/crowd-8",
        total_timesteps=1_000_000,
        ppo=replace(base.ppo, num_envs=32),
    )


def camar_crowd_128() -> Config:
    """128 agents in a crowd, with as many of their steps in a minibatch as 32 have."""
    base = camar()
    return replace(
        base, env="camar/crowd-128", ppo=replace(base.ppo, num_envs=8, num_minibatches=8)
    )


def probe() -> Config:
    """Tiny tasks with a known optimum: half a minute, to see that everything works."""
    return Config(
        env="probe/identity",
        total_timesteps=50_000,
        network=NetworkConfig(d_model=16, num_blocks=1, d_state=4),
        ppo=PPOConfig(lr=3e-3, num_envs=32, rollout_length=32, num_minibatches=2, ent_coef=0.01),
        eval=EvalConfig(num_evaluations=10),
    )


def probe_tmaze_50() -> Config:
    """Remember a cue for 50 steps, in rollouts, and so sequences, that hold whole episodes."""
    short = probe()
    return replace(
        short,
        env="probe/tmaze-50",
        total_timesteps=500_000,
        network=NetworkConfig(
            d_model=32, num_blocks=1, d_state=8, recurrence=RecurrenceConfig(normalise=True)
        ),
        ppo=replace(short.ppo, lr=2e-3, rollout_length=128, num_minibatches=8, ent_coef=0.003),
        eval=EvalConfig(num_evaluations=20, num_episodes=128),
    )


def probe_tmaze_10() -> Config:
    """Remember a cue for 10 steps."""
    return replace(probe_tmaze_50(), env="probe/tmaze-10")


def probe_tmaze_100() -> Config:
    """Remember a cue for 100 steps."""
    return replace(probe_tmaze_50(), env="probe/tmaze-100")


def probe_convention() -> Config:
    """Find a secret joint code, and keep to it."""
    return replace(probe_tmaze_50(), env="probe/convention")


def probe_channels_16() -> Config:
    """Sixteen agents that must not get in each other's way: deciding in sequence pays."""
    short = probe()
    return replace(
        short,
        env="probe/channels-16",
        total_timesteps=300_000,
        network=NetworkConfig(d_model=32, num_blocks=1, d_state=16),
        ppo=replace(short.ppo, lr=2e-3, num_envs=64, num_minibatches=4),
        eval=EvalConfig(num_evaluations=10, num_absolute_episodes=128),
    )


def probe_channels_8() -> Config:
    """Eight of them."""
    return replace(probe_channels_16(), env="probe/channels-8")


def probe_channels_32() -> Config:
    """Thirty-two of them."""
    return replace(probe_channels_16(), env="probe/channels-32")


def mappo() -> Config:
    """MAPPO as most libraries have it, for any task: two plain layers of 128, quick on a CPU.

    `mam train --preset mappo --env rware/tiny-4ag`. Its speed and returns beside those of other
    networks and libraries are in docs/peers.md.
    """
    return replace(
        lbf_smallest(), policy="mappo", network=NetworkConfig(d_model=128, num_blocks=1, plain=True)
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "lbf": lbf,
    "lbf/2s-8x8-2p-2f-coop": lbf_smallest,
    "lbf/15x15-4p-5f": lbf_15x15_4p_5f,
    "lbf/auto": lbf_auto,
    "rware": rware,
    "rware/tiny-2ag": rware_tiny_2ag,
    "rware/tiny-4ag": rware_tiny_4ag,
    "smax": smax,
    "smax/5m_vs_6m": smax_5m_vs_6m,
    "smax/10m_vs_11m": smax_10m_vs_11m,
    "smax/27m_vs_30m": smax_27m_vs_30m,
    "smax/6h_vs_8z": smax_6h_vs_8z,
    "smax/smacv2_5_units": smax_smacv2_5_units,
    "connector": connector,
    "connector/15x15x23a": connector_largest,
    "cleaner": cleaner,
    "mpe": mpe,
    "mpe/simple_spread_10": mpe_simple_spread_10,
    "mabrax": mabrax,
    "overcooked": overcooked,
    "hanabi": hanabi,
    "camar": camar,
    "camar/crowd-8": camar_crowd_8,
    "camar/crowd-128": camar_crowd_128,
    "probe": probe,
    "probe/tmaze-10": probe_tmaze_10,
    "probe/tmaze-50": probe_tmaze_50,
    "probe/tmaze-100": probe_tmaze_100,
    "probe/convention": probe_convention,
    "probe/channels-8": probe_channels_8,
    "probe/channels-16": probe_channels_16,
    "probe/channels-32": probe_channels_32,
    "mappo": mappo,
}


def preset(name: str) -> Config:
    """Return the preset of this name.

    Raises:
        UserError: if there is none.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS, see="mam list")
    return PRESETS[name]()


def preset_for(env: str) -> tuple[Config, str]:
    """Return the settings to start from for a task, and their preset's name or `defaults`.

    Those for the task of a dataset still have another: no settings have it without the dataset.
    """
    if env == "dataset":
        return own(), "defaults"
    for name in (env.partition(":")[0], env.partition("/")[0]):
        if name in PRESETS:
            return replace(PRESETS[name](), env=env), name
    return replace(own(), env=env), "defaults"


def own() -> Config:
    """Return the settings to start from for custom environments and PettingZoo's.

    Ids of a size that does not depend on the number of agents, so that the policy can play with
    others; and few evaluations in one mode, because a simulator's steps cost as much there as in
    training.
    """
    few = EvalConfig(
        num_evaluations=10, num_episodes=10, num_absolute_episodes=50, both_modes=False
    )
    return Config(agent_id="sinusoid", eval=few)


def origin(name: str) -> str:
    """Return a preset's network in one line, and those of the suite's other tasks."""
    if name not in PRESETS:
        return f"settings start from {name}: {_network(Config())}"
    mine, suite = _network(PRESETS[name]()), name.partition("/")[0]
    unlike = {}
    for other in PRESETS:
        network = _network(PRESETS[other]())
        if other.partition("/")[0] == suite and network != mine:
            unlike.setdefault(network, []).append("other tasks" if other == suite else other)
    others = "".join(
        f"; {', '.join(names)} of the suite: {network}" for network, names in unlike.items()
    )
    return f"settings start from preset {name}: {mine}{others}"


def _network(config: Config) -> str:
    """Return the sizes in which presets differ."""
    network = config.network
    return (
        f"d_model {network.d_model}, "
        f"{network.num_blocks} block{'s' if network.num_blocks > 1 else ''}"
    )
