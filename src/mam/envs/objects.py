"""Environments that are given as objects, and the names by which they are found again."""

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from mam.envs.external.factories import find_factory
from mam.errors import UserError, shown
from mam.types import Environment

OBJECT = "object:"  # begins the name of one that only the process knows to which it was given

_given: dict[str, Environment] = {}


def add_object(env: Any) -> str:
    """Name an environment, or what makes one, so that a run can be trained on it by name.

    What another process can import is called package.module:factory, with options where it is an
    object of a dataclass. Anything else, such as what a notebook defines, is called object:Name:
    this process alone knows it, the last one of a name.

    Args:
        env: the environment in JAX, or a function or class that makes it.

    Raises:
        UserError: if it is none, or one that has to be imported because workers step it.
    """
    makes = isinstance(env, type) or not hasattr(env, "reset")
    made = env() if makes and callable(env) else env
    name = _importable(env, makes=makes)
    if hasattr(made, "possible_agents"):
        if name is None:
            raise UserError(
                f"a {type(made).__name__} is stepped in worker processes, which import it: put "
                "what makes it into a module, and give that, or its name package.module:factory"
            )
        return name
    if not isinstance(made, Environment):
        raise UserError(
            f"env is a {type(made).__name__}: expected a subclass of mam.types.Environment with "
            "spec, reset and step, what makes one, or a name"
        )
    if name is None:
        kind = env if makes else type(env)
        name = f"{OBJECT}{getattr(kind, '__qualname__', type(kind).__name__)}"
        _given[name] = made
    return name


def find_object(name: str) -> Environment:
    """Return the environment that was given under this name.

    Raises:
        UserError: if that was in another process.
    """
    if name not in _given:
        raise UserError(
            f"the environment {shown(name)} was an object in another process: give it again as "
            "env=…, or train on what can be imported, as package.module:factory"
        )
    return _given[name]


def _importable(env: Any, *, makes: bool) -> str | None:
    """Return the name that leads to an environment, or to what makes one, in every process."""
    kind = env if makes else type(env)
    module, attribute = getattr(kind, "__module__", ""), getattr(kind, "__qualname__", "")
    if module == "__main__":
        return None
    changed = {} if makes or not is_dataclass(env) else _changed_fields(env)
    options = ",".join(f"{name}={value!r}" for name, value in changed.items())
    name = f"{module}:{attribute}" + f":{options}" * bool(options)
    try:
        factory = find_factory(name)
        same = factory.find() is env if makes else factory() == env
    except Exception:  # of a user's own code
        return None
    return name if same is True else None


def _changed_fields(env: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from what they are by default."""
    made = [item for item in fields(env) if item.init]
    return {
        item.name: getattr(env, item.name)
        for item in made
        if item.default is MISSING or getattr(env, item.name) != item.default
    }
