"""Environments given as objects: the names they get, and who finds them again by these."""

import sys
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from examples.traffic import Traffic, make_env

import mam
from mam.envs import objects
from mam.envs.objects import add_object
from mam.envs.probes import Matrix
from mam.envs.registry import is_external, make_plain
from mam.errors import UserError
from small_run import INDEPENDENT


class Local(Matrix):
    """As one that is defined in a notebook."""


class Plain(Matrix):
    """Not a dataclass of its own: two of them are never equal."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Sized(Traffic):
    pair: tuple[int, ...] = (1, 2)


Local.__module__ = "__main__"


def inner():
    return Traffic()


@pytest.fixture(autouse=True)
def none_given(monkeypatch):
    monkeypatch.setattr(objects, "_given", {})


@pytest.mark.parametrize(
    ("env", "name"),
    [
        (make_env, "examples.traffic:make_env"),
        (Traffic, "examples.traffic:Traffic"),
        (Traffic(), "examples.traffic:Traffic"),
        (Traffic(num_lights=7), "examples.traffic:Traffic:num_lights=7"),
        (
            Sized(3, pair=(3, 4)),
            f"{__name__}:Sized:num_lights=3,pair=(3, 4)",
        ),
        (inner, f"{__name__}:inner"),
    ],
    ids=["function", "class", "object", "with a size", "with sizes", "inner"],
)
def test_what_can_be_imported_is_called_by_that(env, name):
    assert add_object(env) == name
    assert objects._given == {}
    made = make_plain(name)
    assert made == (env if hasattr(env, "reset") and not isinstance(env, type) else made)


@pytest.mark.parametrize(
    ("env", "name"),
    [
        (Local(), "object:Local"),
        (Local, "object:Local"),
        (Plain(), "object:Plain"),
        (lambda: Traffic(3), "object:<lambda>"),
        (partial(Traffic, 3), "object:partial"),
    ],
    ids=["of a notebook", "its class", "never equal", "a function without a name", "partial"],
)
def test_what_cannot_is_known_to_this_process(env, name):
    assert add_object(env).endswith(name.removeprefix("object:"))
    (found,) = objects._given
    assert make_plain(found) is objects._given[found]
    assert not is_external(found)


def test_the_last_one_of_a_name_is_meant():
    add_object(Plain())
    last = Plain()
    assert make_plain(add_object(last)) is last


def test_one_of_another_process_has_to_be_given_again():
    with pytest.raises(UserError, match=r"^the environment 'object:Gone' was an object in another"):
        make_plain("object:Gone")


class Parallel:
    possible_agents = ("a",)

    def reset(self):
        pass

    def step(self):
        pass


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (5, "env is a int: expected a subclass of mam.types.Environment"),
        (Parallel(), "a Parallel is stepped in worker processes, which import it: put what makes"),
        (lambda: Parallel(), "a Parallel is stepped in worker processes, which import it"),
    ],
    ids=["a number", "of PettingZoo", "what makes one here"],
)
def test_what_is_none_is_refused(env, said):
    with pytest.raises(UserError, match=f"^{said}"):
        add_object(env)


def test_one_of_pettingzoo_that_can_be_imported_is_external():
    name = add_object(Parallel)
    assert (name, is_external(name)) == (f"{__name__}:Parallel", True)


def test_a_run_on_an_object(tmp_path, monkeypatch):
    """It is trained, evaluated and resumed by its object; elsewhere one line asks for that."""
    env, config = Plain(), replace(INDEPENDENT, total_timesteps=32, num_seeds=1)
    result = mam.train(config, env=env, out=tmp_path / "run")
    assert result.config.env.startswith("object:")
    assert mam.evaluate(result.folder, episodes=2)["episode_return"].shape == (1, 2)
    assert result.policy().act(np.zeros((2, 1))).shape == (2,)
    monkeypatch.setattr(objects, "_given", {})
    longer = replace(result.config, total_timesteps=48)
    for use in (
        partial(mam.train, longer, resume=result.folder),
        partial(mam.evaluate, result.folder, episodes=2),
    ):
        with pytest.raises(UserError, match="was an object in another process: give it again"):
            use()
    assert mam.evaluate(result.folder, env=env, episodes=2)["episode_return"].shape == (1, 2)
    assert mam.train(longer, resume=result.folder, env=env).outcome == "finished"


def test_an_environment_alone_starts_from_the_settings_for_ones_own(monkeypatch):
    seen = []
    monkeypatch.setattr("mam.runs.loop.start", lambda config, out: seen.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mam.train(env=make_env)
    assert seen == [replace(mam.presets.own(), env="examples.traffic:make_env")]
    assert "examples.traffic" in sys.modules
