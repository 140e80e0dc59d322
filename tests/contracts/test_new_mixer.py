"""A mixer of one's own, from its registration to its first updates; nothing else has to know it."""

import inspect
import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mixer_contract as contract
from jaxtyping import Array, Float

from mam.cli import main as cli
from mam.config import DecoderConfig, EncoderConfig, NetworkConfig
from mam.errors import UserError
from mam.learning.train import make_train
from mam.networks.layers import Dense, LayerNorm
from mam.networks.mixers import registry
from mam.networks.mixers.base import (
    AbstractCausalMixer,
    AbstractMixer,
    Mixing,
    Roles,
    by_channel,
    required,
    side_by_side,
)
from mam.networks.mixers.registry import MIXERS, MixerFamily
from mam.networks.policy import make_policy, policies, register_mixer
from mam.study.bench.cases import cases
from mam.study.bench.measure import Cell
from mam.study.sweep.space import space_of
from mam.types import EnvSpec
from small_run import CONFIG


class Average(eqx.Module):
    """A leaky average h_i = a h_{i−1} + (1 − a) W x_i of what agents are, and the residual."""

    in_proj: Dense
    leak: Float[Array, "E"]
    out_proj: Dense
    norm: LayerNorm

    def __init__(self, config, *, key, start, loud):
        in_key, out_key = jax.random.split(key)
        self.in_proj = Dense(config.d_model, config.d_model, key=in_key)
        self.leak = jnp.full(config.d_model, start)
        self.out_proj = Dense(config.d_model, config.d_model, key=out_key)
        self.norm = LayerNorm(config.d_model)

    def step(self, h, u):
        a = jax.nn.sigmoid(self.leak).astype(u.dtype)
        return a * h + (1 - a) * u

    def unroll(self, h, u, *, reverse=False):
        def agent(h, u):
            h = self.step(h, u)
            return h, h

        h = jnp.zeros_like(u[..., 0, :]) if h is None else h
        h, average = jax.lax.scan(agent, h, jnp.moveaxis(u, -2, 0), reverse=reverse)
        return h, jnp.moveaxis(average, 0, -2)

    def out(self, x, average):
        return self.norm(x, self.out_proj(average))

    def mixing(self, u, run, finish):
        """Every feature is a head."""
        run_by_head = lambda values: by_channel(run(side_by_side(values)))  # noqa: E731
        return Mixing(by_channel(u), run_by_head, lambda y: finish(side_by_side(y)))

    def metrics(self):
        return {"largest_leak": jax.nn.sigmoid(self.leak).max()}


class LeakBothWays(AbstractMixer):
    average: Average

    def __init__(self, config, *, key, **own):
        self.average = Average(config, key=key, **own)

    def __call__(self, x, context=None, *, alive=None):
        return self.mixing(x, alive=alive).output

    def mixing(self, x, context=None, *, alive=None):
        def both(u):
            u = u if alive is None else jnp.where(alive[..., None], u, 0.0)
            return self.average.unroll(None, u)[1] + self.average.unroll(None, u, reverse=True)[1]

        u = self.average.in_proj(x)
        return self.average.mixing(u, both, lambda y: self.average.out(x, y))

    def metrics(self):
        return self.average.metrics()


class Leak(AbstractCausalMixer):
    average: Average
    gate: Dense | None

    def __init__(self, config, *, key, cross=False, **own):
        key, gate_key = jax.random.split(key)
        self.average = Average(config, key=key, **own)
        self.gate = Dense(config.d_model, config.d_model, key=gate_key) if cross else None

    def project(self, x):
        return x, self.average.in_proj(x)

    def project_context(self, context):
        return self.gate(required(context)) if self.gate else None

    def init_state(self, num_agents, batch=(), dtype=None):
        return jnp.zeros((*batch, self.average.leak.shape[0]), dtype)

    def step(self, state, inputs, context):
        state = self.average.step(state, inputs[1])
        return state, self._out(inputs[0], state, context)

    def unroll(self, state, inputs, context, alive=None):
        state, average = self.average.unroll(state, inputs[1])
        return state, self._out(inputs[0], average, context)

    def mixing(self, x, context=None, *, alive=None):
        C = self.project_context(context)
        run = lambda u: self.average.unroll(None, u)[1]  # noqa: E731
        return self.average.mixing(self.project(x)[1], run, lambda y: self._out(x, y, C))

    def _out(self, x, average, context):
        return self.average.out(x, average if context is None else average * context)


def arguments_of(check):
    """What a check of the contract is called with besides the family: a role, or nothing."""
    (cases,) = (mark.args[1] for mark in check.pytestmark)
    return [case[1:] for case in cases if case[0] == "attention"] or [()]


FACTS = {
    "letter": "L",
    "policy": "leak",
    "description": "leaky averages along the agents",
    "roles": Roles(
        encoder=LeakBothWays,
        decoder=Leak,
        cross=partial(Leak, cross=True),
    ),
    "options": {"expand": (1, 2)},
    "own": {"start": 0.0, "loud": False},
}
ROLES = [role.name for role in fields(Roles)]
CHECKS = [
    pytest.param(check, arguments, id=f"{name}-{'-'.join(arguments)}")
    for name, check in vars(contract).items()
    if name.startswith("test_") and set(inspect.signature(check).parameters) <= {"family", "role"}
    for arguments in arguments_of(check)
]


@pytest.fixture(autouse=True)
def leaky():
    register_mixer("leaky", **FACTS)
    yield
    del MIXERS["leaky"]


@pytest.mark.parametrize(("check", "arguments"), CHECKS)
def test_it_keeps_the_contract(check, arguments):
    with jax.enable_x64(True):
        check("leaky", *arguments)


def test_it_is_in_help_and_lists(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "leak (L in layouts): expand, leak.start=0.0" in " ".join(
        capsys.readouterr().out.split()
    )
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "leak       leaky averages along the agents (L in layouts)" in listed
    assert "(--network.mixer-options)\n  leak.start=0.0\n  leak.loud=False\n" in listed


def test_its_own_settings_are_options():
    spec = EnvSpec("suite/task", num_agents=2, obs_dim=3, num_actions=4, time_limit=None)
    sizes = NetworkConfig(d_model=8, mixer_options=("leak.start=2", "leak.loud=TRUE"))
    policy = make_policy("leak", spec, sizes, key=jax.random.key(0))
    assert (policy.encoder.blocks[0].mixer.average.leak == 2.0).all()
    assert MIXERS["leaky"].settings(sizes) == {"start": 2.0, "loud": True}
    line = ["--policy", "leak", "--network.mixer-options", "leak.start=2", "leak.loud=true"]
    assert cli.read_options("train", line).config.network.mixer_options == tuple(line[3:])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("leak", r"network.mixer_options are written policy.setting=value, got 'leak'"),
        ("leek.start=1", "unknown mixer of an option 'leek': did you mean leak.*"),
        ("leak.stat=1", "unknown mixer option 'leak.stat': did you mean leak.start.*"),
        ("leak.start=often", "leak.start must be a number, got 'often'"),
        ("leak.loud=2", "leak.loud must be true or false, got '2'"),
    ],
)
def test_options_that_no_mixer_has_are_refused(option, said):
    with pytest.raises(UserError, match=f"^{said}"):
        make_train(
            replace(CONFIG, network=replace(CONFIG.network, mixer_options=(option,)))
        ).shapes(np.zeros(1, np.int32))


def test_it_is_searched_where_it_is_used():
    layout = replace(CONFIG.network, decoder=DecoderConfig(cross="L"))
    for config in (replace(CONFIG, policy="leak"), replace(CONFIG, network=layout)):
        assert space_of(config)["network.expand"] == (1, 2)
    assert "network.d_state" not in space_of(replace(CONFIG, policy="leak"))


def test_it_is_in_benches():
    names = {what: set(case.candidates) for what, case in cases().items()}
    assert {f"leaky/{role}" for role in ROLES} <= names["block"]
    assert all("leak" in names[what] for what in ("act", "decode", "update", "train"))
    assert "leak-kernel" not in names["act"]  # no decoder of one call knows it
    candidate = cases()["act"].candidates["leak"](Cell(2, 2, NetworkConfig(d_model=8)))
    jax.eval_shape(candidate.function, *candidate.args)


def test_it_mixes_with_others_in_layouts():
    sizes = NetworkConfig(d_model=8, encoder=EncoderConfig("LA"), decoder=DecoderConfig("ML", "L2"))
    spec = EnvSpec("suite/task", 3, 4, 5, time_limit=None)
    policy = jax.eval_shape(lambda key: make_policy("mat", spec, sizes, key=key), jax.random.key(0))
    assert [type(block.mixer) is LeakBothWays for block in policy.encoder.blocks] == [True, False]
    assert [type(block.cross) is Leak for block in policy.decoder.blocks] == [True, False]
    assert policy.decoder.fused is None
    with pytest.raises(
        UserError, match=r"letters of M \(mamba\), .*, L \(leaky\), one per block, got 'X'$"
    ):
        make_policy("mat", spec, replace(sizes, encoder=EncoderConfig("X")), key=jax.random.key(0))


def test_it_learns():
    trainer = make_train(replace(CONFIG, policy="leak", num_seeds=1))
    state = trainer.init(np.zeros(1, np.int32))
    for _ in range(3):
        state, values = trainer.train_step(state)
    assert all(np.isfinite(value).all() for value in values.values())
    assert values["first_ratio_deviation"] <= 1e-5
    leaks = [block.mixer.average.leak for block in state.policy.network.encoder.blocks]
    assert np.max(np.abs(leaks)) > 0  # where it began
    assert values["largest_leak"] > 0.5
    assert "step_size_max" not in values


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"letter": "M"}, "the letter M of leakier is taken: choose another"),
        ({"letter": "LL"}, "the letter of leakier must be one of A-Z, a-z, 0-9, got 'LL'"),
        (
            {"letter": "K", "policy": "mam"},
            "the policy 'mam' of leakier exists: choose another name",
        ),
        (
            {"letter": "K", "policy": "mappo"},
            "the policy 'mappo' of leakier exists: choose another name",
        ),
    ],
)
def test_what_is_taken_is_refused(changes, said):
    with pytest.raises(UserError) as refused:
        register_mixer("leakier", **FACTS | changes)
    assert str(refused.value) == said


FAMILY = MixerFamily("K", "leakiest", "of a package", load=lambda: FACTS["roles"])
CLASHING = replace(FAMILY, letter="M")


@pytest.fixture
def install(monkeypatch):
    """Adds the mixer of a package, once the families are asked for."""

    def install(value):
        points = EntryPoints([EntryPoint("packed", f"{__name__}:{value}", registry.GROUP)])
        monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
        monkeypatch.setattr(registry, "MIXERS", dict(MIXERS))
        registry._add_installed.cache_clear()

    yield install
    registry._add_installed.cache_clear()


def test_one_of_an_installed_package_is_a_policy(install):
    install("FAMILY")
    assert policies()["leakiest"].description == "of a package (K in layouts)"
    with pytest.raises(UserError, match="the letter K of leakier is taken"):
        register_mixer("leakier", **FACTS | {"letter": "K"})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("Nothing", "the mixer packed cannot be imported: module .* has no attribute 'Nothing'"),
        ("CHECKS", "the mixer packed must be a MixerFamily, got .*"),
        ("CLASHING", "the letter M of packed is taken: choose another"),
    ],
)
def test_one_of_an_installed_package_may_be_refused(install, value, said):
    install(value)
    with pytest.raises(UserError, match=f"^{said}$"):
        policies()


def test_child_processes_know_those_of_installed_packages(tmp_path):
    packaged = tmp_path / "packed-1.0.dist-info"
    packaged.mkdir()
    (packaged / "METADATA").write_text("Metadata-Version: 2.1\nName: packed\nVersion: 1.0\n")
    (packaged / "entry_points.txt").write_text("[mam.mixers]\npacked = packed_mixers:FAMILY\n")
    (tmp_path / "packed_mixers.py").write_text(
        "from mam.networks.mixers.registry import MixerFamily\n"
        'FAMILY = MixerFamily("P", "pack", "of a package", load=lambda: None)\n'
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "mam", "train", "--help"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pack (P in layouts)" in " ".join(done.stdout.split())


def test_one_of_the_same_name_is_replaced():
    register_mixer("leaky", **FACTS | {"letter": "K"})
    assert [family.letter for family in MIXERS.values() if family.policy == "leak"] == ["K"]
    assert list(policies()).count("leak") == 1
