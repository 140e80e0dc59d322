"""Environments of other people's making, by name."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
from host_environments import Lives

from mam.envs.external.factories import EnvFactory, find_factory, with_options
from mam.errors import UserError


def test_environments_of_ones_own():
    factory = find_factory("host_environments:Lives:limit=3")
    env = factory()
    assert isinstance(env, Lives)
    assert env.limit == 3
    assert pickle.loads(pickle.dumps(factory)) == factory


def test_render_mode_goes_to_those_who_take_it():
    assert find_factory("host_environments:Lives")("rgb_array").render_mode == "rgb_array"
    for name in ("Camera", "any_options"):  # which passes them on to a Camera, that takes none
        env = find_factory(f"host_environments:{name}")("rgb_array")
        assert type(env).__name__ == "Camera"


def test_option_values():
    text = (
        "a=5,b=-0.5,c=true,d=False,e=hello,f=None,g='x,y',h=\"a=b\","
        "i=[1,2],j=(3,),k={'z': 4},l=maps/3m-v2,m='5',n=[[1, 2],[3,{'a': (4,5)}]]"
    )
    expected = {
        "a": 5,
        "b": -0.5,
        "c": True,
        "d": False,
        "e": "hello",
        "f": None,
        "g": "x,y",
        "h": "a=b",
    }
    expected |= {"i": [1, 2], "j": (3,), "k": {"z": 4}, "l": "maps/3m-v2", "m": "5"}
    expected |= {"n": [[1, 2], [3, {"a": (4, 5)}]]}
    assert find_factory(f"host_environments:Lives:{text}").options == tuple(expected.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pettingzoo/mpe2",
            "expected a module and what to take from it, such as pettingzoo/mpe2:simple_spread_v3",
        ),
        (
            "mine:",
            "mine:: expected a module and what to take from it, "
            "such as my_package.my_module:make_env",
        ),
        (
            "pettingzoo/no_zoo:env",
            "no_zoo is not in {cwd} and not installed: run this where it is, "
            "or say where with PYTHONPATH",
        ),
        (
            "no_zoo.mine:env",
            "no_zoo is not in {cwd} and not installed: run this where it is, "
            "or say where with PYTHONPATH",
        ),
        ("pettingzoo/pettingzoo.no_zoo:env", "there is no module pettingzoo.no_zoo"),
        ("./my_env.py:make", "expected a module, not its file, such as my_env:make"),
        (
            "sims/my_env.py:make:n=3",
            "expected a module, not its file, such as sims.my_env:make:n=3",
        ),
        ("host_environments.mine:env", "there is no module host_environments.mine"),
        (
            "host_environments:Live",
            "unknown environment 'Live': did you mean Lives? (see `pydoc host_environments`)",
        ),
        (
            "host_environments:LIMIT",
            "is nothing that makes an environment, but of type int: expected a function or a class",
        ),
        ("host_environments:Lives:limit", "options are written option=value,…, got 'limit'"),
        ("host_environments:Lives:limit='3", "a quote or bracket is not closed in 'limit='3'"),
        ("host_environments:Lives:a=[[1],[2]", "a quote or bracket is not closed in 'a=[[1],[2]'"),
    ],
)
def test_names_that_stand_for_nothing(name, message):
    with pytest.raises(UserError) as error:
        find_factory(name)
    assert str(error.value).endswith(message.format(cwd=os.getcwd()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "host_environments:Lives:limits=3",
            "got an unexpected keyword argument 'limits'; options are written ",
        ),
        (
            "host_environments:numbered",
            "missing a required argument: 'index'; options are written {name}:option=value",
        ),
    ],
)
def test_options_that_do_not_fit(name, message):
    with pytest.raises(UserError) as error:
        find_factory(name)()
    assert str(error.value).startswith(f"{name}: {message.format(name=name)}")


def test_environments_are_numbered_for_those_who_ask():
    factory = find_factory("host_environments:numbered")
    assert factory(index=3).index == 3
    assert replace(factory, first=40)(index=3).index == 43
    assert find_factory("host_environments:numbered:index=7")(index=3).index == 7
    assert isinstance(find_factory("host_environments:Lives")(index=3), Lives)


def test_bugs_of_a_factory_stay_what_they_are():
    with pytest.raises(ZeroDivisionError):
        EnvFactory("test", "host_environments", "broken")()


def test_module_that_needs_what_is_missing(monkeypatch, tmp_path):
    (tmp_path / "needy.py").write_text("import no_zoo.keeper")
    (tmp_path / "grumpy.py").write_text("raise ImportError('moved\\nelsewhere')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^needy:env: needy needs no_zoo, which is not installed$"):
        find_factory("needy:env")
    with pytest.raises(
        UserError, match=r"^grumpy:env: grumpy cannot be imported: moved elsewhere$"
    ):
        find_factory("grumpy:env")


def test_nothing_heavy_is_imported():
    code = (
        "import sys, mam.envs.external.factories, mam.envs.external.worker;"
        "assert not {'numpy', 'gymnasium', 'jax'} & set(sys.modules);"
        "import mam.envs.external.slice;"
        "assert not {'jax', 'equinox', 'pettingzoo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pettingzoo_names():
    pytest.importorskip("mpe2")
    env = find_factory("pettingzoo/mpe2:simple_spread_v3:N=5")()
    assert len(env.possible_agents) == 5
    with pytest.raises(
        UserError, match=r"unknown environment 'simple_spread_v2': did you mean .*simple_spread_v3"
    ):
        find_factory("pettingzoo/mpe2:simple_spread_v2")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lbf/auto", "lbf/auto:agents=8"),
        ("camar/caves:size=64", "camar/caves:size=64,agents=8"),
        ("lbf/auto:agents=2,grid=9", "lbf/auto:grid=9,agents=8"),
        ("a.b:make", "a.b:make:agents=8"),
        ('a.b:make:map="x,y",agents=[1, 2]', 'a.b:make:map="x,y",agents=8'),
        ("pettingzoo/a:env:agents=2", "pettingzoo/a:env:agents=8"),
        ("a.b:make:map=[[1, 2],[3, 4]]", "a.b:make:map=[[1, 2],[3, 4]],agents=8"),
    ],
)
def test_an_option_of_another_value(name, expected):
    assert with_options(name, "agents=8") == expected
