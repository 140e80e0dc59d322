"""Configurations: derived values, when runs are evaluated, what is refused, the JSON round trip."""

import dataclasses
import json
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mam.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    EvalConfig,
    NetworkConfig,
    PPOConfig,
    RecurrenceConfig,
    from_json,
    to_json,
)
from mam.errors import UserError

thorough = settings(max_examples=60, deadline=None, derandomize=True, database=None)

sizes = st.integers(1, 1000)
positive = st.floats(1e-12, 1e12)
fractions = st.floats(0, 1)
not_negative = st.floats(0, 1e12)


@st.composite
def ppo_configs(draw):
    num_minibatches, share = draw(st.tuples(sizes, sizes))
    num_envs, rollout_length = draw(st.permutations([num_minibatches * share, draw(sizes)]))
    return PPOConfig(
        lr=draw(positive),
        num_envs=num_envs,
        rollout_length=rollout_length,
        num_epochs=draw(sizes),
        num_minibatches=num_minibatches,
        gamma=draw(fractions),
        gae_lambda=draw(fractions),
        clip_eps=draw(positive),
        ent_coef=draw(not_negative),
        vf_coef=draw(not_negative),
        max_grad_norm=draw(positive),
    )


layouts = st.none() | st.text("AM2", min_size=1, max_size=3)
decodings = st.fixed_dictionaries(
    {"decode": st.sampled_from(["sequential", "kernel"])}
) | st.fixed_dictionaries(
    {
        "decode": st.just("fixed_point"),
        "decode_window": st.none() | sizes,
        "decode_max_passes": st.none() | sizes,
    }
)


@st.composite
def network_configs(draw):
    num_heads, expand = draw(st.tuples(sizes, sizes))
    d_model = num_heads * draw(sizes)
    return NetworkConfig(
        d_model=d_model,
        num_blocks=draw(sizes),
        num_heads=num_heads,
        d_state=draw(sizes),
        d_conv=draw(sizes),
        expand=expand,
        dt_rank=draw(st.none() | sizes),
        head_dim=draw(st.sampled_from([None, 1, d_model, d_model * expand])),
        encoder=EncoderConfig(layout=draw(layouts)),
        decoder=DecoderConfig(layout=draw(layouts), cross=draw(layouts)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        remat=draw(st.booleans()),
        agent_chunk=draw(st.none() | sizes),
        image=draw(st.sampled_from(["cnn", "scan2d"])),
        image_width=draw(sizes),
        plain=draw(st.booleans()),
        observation_norm=draw(st.sampled_from(["running", "layer"])),
        scan=draw(st.sampled_from(["auto", "sequential", "associative", "pairwise", "pallas"])),
        recurrence=RecurrenceConfig(
            d_state=draw(sizes),
            last_action=draw(st.booleans()),
            clock=draw(st.sampled_from(["auto", "on", "off"])),
            dt_min=0.1,
            dt_max=0.2,
        ),
    )


printable = st.text(st.characters(categories=["L", "N", "P", "S"]))
configs = st.builds(
    lambda decoding, **others: Config(**decoding, **others),
    decoding=decodings,
    policy=printable,
    env=printable,
    seed=st.integers(0, 10**6),
    num_seeds=sizes,
    agent_id=st.sampled_from(["one_hot", "sinusoid", "none"]),
    num_workers=st.none() | sizes,
    total_timesteps=st.integers(1, 10**12),
    log=st.lists(st.sampled_from(["jsonl", "tensorboard", "wandb"]), min_size=1).map(tuple),
    network=network_configs(),
    ppo=ppo_configs(),
    eval=st.builds(
        EvalConfig,
        num_evaluations=sizes,
        num_episodes=sizes,
        num_absolute_episodes=sizes,
        greedy=st.booleans(),
    ),
)


@pytest.mark.filterwarnings(
    "ignore:Do not use the `random` module"
)  # beartype looks at one item of a tuple
@thorough
@given(configs)
def test_json_round_trip(config):
    assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize("groups", [{}, {"network": {}}, {"ppo": {"lr": 5e-4}}])
def test_missing_keys_mean_what_runs_did_before_there_were_any(groups):
    """Their defaults, except where these have changed what a run does."""
    memory = RecurrenceConfig(normalise=True)
    network = NetworkConfig(observation_norm="layer", recurrence=memory)
    ppo = PPOConfig(normalise_value=False)
    assert from_json(Config, groups) == Config(network=network, ppo=ppo)


@pytest.mark.parametrize(
    ("policy", "memory", "clock"),
    [
        ("rec_mam", None, "off"),
        ("rec_mam2", None, "off"),
        ("mat", "mamba", "off"),
        ("rec_mam", "gru", "auto"),
        ("rec_mat", None, "auto"),
        ("mam", None, "auto"),
    ],
)
def test_runs_from_before_there_were_clocks_have_none(policy, memory, clock):
    """Said only where they would have one now: the others are still of the same settings."""
    read = from_json(Config, {"policy": policy, "network": {"memory": memory}})
    assert read.network.recurrence.clock == clock


def test_nothing_can_be_changed():
    for part in (Config(), NetworkConfig(), PPOConfig(), EvalConfig()):
        name = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, getattr(part, name))


def test_an_algorithm_is_named_after_its_policy_and_layout():
    assert Config(policy="mat").algorithm == "mat"
    network = NetworkConfig(
        encoder=EncoderConfig(layout="MA"), decoder=DecoderConfig(layout="M2", cross="AA")
    )
    assert Config(policy="mam", network=network).algorithm == "mam-encMA-decM2-crossAA"
    published = NetworkConfig(encoder=EncoderConfig(combine="product"))
    assert Config(policy="mam", network=published).algorithm == "mam-product"
    assert Config(policy="mat", network=NetworkConfig(memory="gru")).algorithm == "mat-gru"
    assert Config(policy="mappo", network=NetworkConfig(plain=True)).algorithm == "mappo-plain"
    assert Config(policy="ippo", network=NetworkConfig(image="scan2d")).algorithm == "ippo-scan2d"
    last = NetworkConfig(recurrence=RecurrenceConfig(last_action=True))
    assert Config(policy="rec_mam", network=last).algorithm == "rec_mam-action"
    clock = NetworkConfig(recurrence=RecurrenceConfig(clock="on"))
    assert Config(policy="mam", network=clock).algorithm == "mam-clock"
    clock = NetworkConfig(recurrence=RecurrenceConfig(clock="off"))
    assert Config(policy="rec_mam", network=clock).algorithm == "rec_mam-noclock"


def test_derived_sizes():
    network = NetworkConfig(d_model=20, expand=3)
    assert network.d_inner == 60
    assert network.resolved_dt_rank == 2
    assert replace(network, d_model=32).resolved_dt_rank == 2
    assert replace(network, dt_rank=7).resolved_dt_rank == 7


@pytest.mark.parametrize(
    ("d_inner", "head_dim", "heads"),
    [
        (60, None, 1),
        (128, None, 2),
        (130, None, 5),
        (134, None, 67),
        (64, None, 1),
        (60, 20, 3),
        (60, 1, 60),
        (60, 60, 1),
    ],
)
def test_heads_are_as_wide_as_said_or_as_may_be_up_to_64(d_inner, head_dim, heads):
    assert NetworkConfig(d_model=d_inner, expand=1, head_dim=head_dim).num_ssm_heads == heads


@pytest.mark.parametrize(
    ("total", "updates"), [(1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3)]
)
def test_steps_are_rounded_up_to_whole_updates(total, updates):
    config = Config(total_timesteps=total, num_seeds=5, ppo=PPOConfig(num_envs=4, rollout_length=8))
    assert config.steps_per_update == 32
    assert config.num_updates == updates


@thorough
@given(num_evaluations=st.integers(1, 200), num_updates=st.integers(1, 300))
def test_evaluations_are_evenly_spaced_and_the_last_is_at_the_end(num_evaluations, num_updates):
    ppo = PPOConfig(num_envs=1, rollout_length=1, num_minibatches=1)
    config = Config(
        total_timesteps=num_updates, ppo=ppo, eval=EvalConfig(num_evaluations=num_evaluations)
    )
    evaluated = [update for update in range(1, num_updates + 1) if config.evaluate_after(update)]
    assert len(evaluated) == min(num_evaluations, num_updates)
    assert evaluated[-1] == num_updates
    gaps = [after - before for before, after in pairwise([0, *evaluated])]
    assert max(gaps) - min(gaps) <= 1


def nested(key, value):
    """{"ppo": {"lr": value}} for "ppo.lr"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        *(
            (key, value, "must be positive")
            for key in (
                "total_timesteps",
                "num_seeds",
                "network.d_model",
                "network.num_blocks",
                "network.num_heads",
            )
            for value in (0, -1)
        ),
        *(
            (key, 0, "must be positive")
            for key in (
                *("num_workers", "decode_window", "decode_max_passes"),
                *("network.d_state", "network.d_conv", "network.expand", "network.dt_rank"),
                "network.recurrence.d_state",
                *("ppo.num_envs", "ppo.rollout_length", "ppo.num_epochs", "ppo.num_minibatches"),
                *("eval.num_evaluations", "eval.num_episodes", "eval.num_absolute_episodes"),
            )
        ),
        *(
            (f"ppo.{name}", value, "must be positive")
            for name in ("lr", "clip_eps", "max_grad_norm")
            for value in (0.0, -0.1, float("nan"))
        ),
        *(
            (f"ppo.{name}", value, r"must lie in \[0, 1\]")
            for name in ("gamma", "gae_lambda")
            for value in (-0.01, 1.01, float("nan"))
        ),
        *(
            (f"ppo.{name}", value, "must not be negative")
            for name in ("ent_coef", "vf_coef")
            for value in (-1e-9, float("nan"))
        ),
        ("seed", -1, "must lie in 0"),
        ("ppo.num_minibatches", 3, r"must divide ppo.num_envs × ppo.rollout_length = 8192"),
        ("network.num_heads", 3, r"must divide network.d_model = 64"),
        *(
            ("network.head_dim", value, "must divide the inner width 128")
            for value in (0, -1, 3, 256)
        ),
        *(
            ("network.recurrence.dt_min", value, "must be positive and at most dt_max = 0.1")
            for value in (0.0, 2.0)
        ),
    ],
)
def test_impossible_values_are_refused(key, value, rule):
    with pytest.raises(UserError, match=rf"^{key} {rule}.*, got {value}$"):
        from_json(Config, nested(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ppo.gamma", 0.0),
        ("ppo.gamma", 1.0),
        ("ppo.gae_lambda", 0.0),
        ("ppo.ent_coef", 0.0),
        ("ppo.vf_coef", 0.0),
    ],
)
def test_limits_themselves_are_allowed(key, value):
    assert to_json(from_json(Config, nested(key, value)))["ppo"][key.removeprefix("ppo.")] == value


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seed", "1", "must be int, got '1'"),
        ("seed", 1.0, "must be int, got 1.0"),
        ("seed", True, "must be int, got True"),
        ("seed", None, "must be int, got None"),
        ("env", 3, "must be str, got 3"),
        ("ppo.lr", "fast", "must be float, got 'fast'"),
        ("ppo.lr", True, "must be float, got True"),
        ("ppo.num_envs", 2.5, "must be int, got 2.5"),
        ("ppo.num_envs", False, "must be int, got False"),
        ("eval.greedy", 1, "must be bool, got 1"),
        ("network.dt_rank", 1.5, "must be int or null, got 1.5"),
        ("num_workers", 1.5, "must be int or null, got 1.5"),
        ("agent_id", None, "must be one of one_hot, sinusoid, none, got None"),
        ("network.dt_rank", True, "must be int or null, got True"),
        ("network.head_dim", 1.5, "must be int or null, got 1.5"),
        ("network.remat", 1, "must be bool, got 1"),
        ("network.encoder.layout", 2, "must be str or null, got 2"),
        ("network.encoder", "MA", "must be a group of keys, got 'MA'"),
        ("network.encoder.combine", "max", "must be one of sum, product, got 'max'"),
        ("network.dtype", "float16", "must be one of float32, bfloat16, got 'float16'"),
        (
            "network.scan",
            True,
            "must be one of auto, sequential, associative, pairwise, native, pallas, got True",
        ),
        ("decode", "parallel", "must be one of sequential, fixed_point, kernel, got 'parallel'"),
        ("decode_window", True, "must be int or null, got True"),
        ("log", "jsonl", "must be a list of str, got 'jsonl'"),
        ("log", ["jsonl", 3], r"must be a list of str, got \['jsonl', 3\]"),
        ("network", 3, "must be a group of keys, got 3"),
        ("network", None, "must be a group of keys, got None"),
    ],
)
def test_wrong_types_are_refused(key, value, said):
    with pytest.raises(UserError, match=rf"^{key} {said}$"):
        from_json(Config, nested(key, value))


def test_an_integer_passes_for_a_float():
    gamma = from_json(Config, {"ppo": {"gamma": 1}}).ppo.gamma
    assert (type(gamma), gamma) == (float, 1.0)
    assert from_json(Config, {"network": {"dt_rank": 3}}).network.dt_rank == 3


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sed", "seed"),
        ("ppo.learning_rate", None),
        ("ppo.gama", "ppo.gamma"),
        ("network.d_modle", "network.d_model"),
        ("network.encoder.layuot", "network.encoder.layout"),
        ("decode_widow", "decode_window"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_valid_one(key, nearest):
    with pytest.raises(UserError, match=rf"^unknown key '{key}'") as refused:
        from_json(Config, nested(key, 1))
    assert nearest is None or f"did you mean {nearest}" in str(refused.value)


def test_agent_ids_are_of_a_known_kind():
    assert Config().agent_id == "one_hot"
    assert from_json(Config, {"agent_id": "none"}).agent_id == "none"
    with pytest.raises(
        UserError, match=r"^agent_id must be one of one_hot, sinusoid, none, got 'onehot'$"
    ):
        from_json(Config, {"agent_id": "onehot"})


def test_a_run_reports_somewhere():
    with pytest.raises(
        UserError, match=r"^log must name where numbers go, such as jsonl, got \(\)$"
    ):
        Config(log=())


def test_choices():
    @dataclass(frozen=True)
    class Choice:
        mode: Literal["fast", "exact"] = "fast"

    assert from_json(Choice, {"mode": "exact"}).mode == "exact"
    with pytest.raises(UserError, match=r"^mode must be one of fast, exact, got 'slow'$"):
        from_json(Choice, {"mode": "slow"})


@pytest.mark.parametrize(
    "key", ["network.encoder.layout", "network.decoder.layout", "network.decoder.cross"]
)
@pytest.mark.parametrize("layout", ["", "M A", "../A", "é"])
def test_layouts_are_letters(key, layout):
    with pytest.raises(UserError) as refused:
        from_json(Config, nested(key, layout))
    assert str(refused.value) == f"{key} must be a letter per block, such as MA, got {layout!r}"


@pytest.mark.parametrize("decode", ["sequential", "kernel"])
@pytest.mark.parametrize("limit", [{"decode_window": 4}, {"decode_max_passes": 2}])
def test_windows_and_passes_are_of_the_fixed_point(decode, limit):
    with pytest.raises(
        UserError, match=r"^decode_window and decode_max_passes belong to --decode fixed_point$"
    ):
        Config(decode=decode, **limit)
    assert Config(decode="fixed_point", **limit).decode == "fixed_point"
