"""Environments from outside of this library, by name.

pettingzoo/module:environment            `parallel_env` of an environment's module
pettingzoo/module:environment:N=5,…      the same with keyword arguments
package.module:factory                   one's own: the factory returns the environment

Values of options are Python's (5, None, "a,b", [1, 2], true and false as well); anything else is
text. Neither JAX nor any suite is imported before a name is looked up.

Such a name is code: it is imported and called. If a folder brought it along, the user has to agree
first, see `check_agreed`. Nothing of Python's own is called in any case.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import PurePath
from types import ModuleType
from typing import Any

from mam.config import Config
from mam.envs.tasks import SUITES
from mam.errors import UserError, check_call, printable, shown, unknown_name

PREFIX = "pettingzoo/"
_MADE_TO_MEASURE = "|".join({task for suite in SUITES.values() for task in suite.made_to_measure})
_NO_CODE = re.compile(rf"(\w+/({_MADE_TO_MEASURE})|object):")
POSITIONS = "positions"  # of metadata, and an option of every name
_QUOTES, _OPENING, _CLOSING = "\"'", "[({", "])}"


@dataclass(frozen=True)
class EnvFactory:
    """Makes an environment.

    It travels to other processes as a name, and finds itself again there. The option `positions`,
    if the environment takes none of this name, goes to its metadata, where the adapter finds it.
    """

    name: str  # as the user wrote it
    module: str
    attribute: str  # of the module, or a module within it
    options: tuple[tuple[str, Any], ...] = ()
    first: int = 0  # index of the first environment it makes, where others exist beside these

    def __call__(self, render_mode: str | None = None, index: int | None = None) -> Any:
        """Make one environment.

        Args:
            render_mode: how it will be drawn; passed on where the environment takes such an option.
            index: which of those that this factory makes it is, from 0; with `first` added passed
                on to a parameter of that name, which tells environments that exist at the same time
                apart.

        Raises:
            UserError: it cannot be made: not installed, or not with these options.
        """
        make, options = self.find(), dict(self.options)
        positions = None if takes(make, POSITIONS, by_name=True) else options.pop(POSITIONS, None)
        if render_mode is not None and takes(make, "render_mode"):
            options["render_mode"] = render_mode
        if index is not None and takes(make, "index", by_name=True):
            options.setdefault("index", self.first + index)
        self._check(make, options)
        try:
            env = make(**options)
        except TypeError as error:
            if render_mode is not None and not takes(make, "render_mode", by_name=True):
                return self(index=index)  # it is passed on to what does not take it
            if "unexpected keyword argument" not in str(error):
                raise
            raise UserError(f"{self.name}: {error}") from error
        except ImportError as error:  # deprecated versions say so here
            raise UserError(f"{self.name}: {_one_line(error)}") from error
        is_class = isinstance(env, type)
        if is_class or not all(callable(getattr(env, name, None)) for name in ("reset", "step")):
            what = f"the class {env.__name__} itself" if is_class else f"a {type(env).__name__}"
            raise UserError(
                f"{self.name} returns {what}: expected a subclass of "
                "mam.types.Environment with spec, reset and step, or a PettingZoo ParallelEnv"
            )
        if positions is not None:
            env.metadata = {**getattr(env, "metadata", {}), POSITIONS: positions}
        return env

    def _check(self, make: Callable[..., Any], options: dict[str, Any]) -> None:
        written = f"{self.name.removesuffix(':')}{',' if self.options else ':'}option=value"
        check_call(self.name, f"options are written {written}", make, **options)

    def find(self) -> Callable[..., Any]:
        """Import what the name stands for.

        Raises:
            UserError: there is no such thing.
        """
        target = self._submodule() or self._attribute()
        if isinstance(target, ModuleType) or (
            not callable(target) and hasattr(target, "parallel_env")
        ):
            target = getattr(target, "parallel_env", None) or getattr(target, "env", None)
        if not callable(target):
            raise UserError(
                f"{self.name}: '{self.attribute}' of {self.module} is nothing that makes an "
                f"environment, but of type {type(target).__name__}: expected a function or a class"
            )
        # Refused also where another module passes it on.
        _check_not_standard(self.name, _defining_module(target))
        return target

    def _submodule(self) -> ModuleType | None:
        module = _import(self.name, self.module)
        path = f"{self.module}.{self.attribute}"
        return (
            _import(self.name, path)
            if hasattr(module, "__path__") and importlib.util.find_spec(path)
            else None
        )

    def _attribute(self) -> Any:
        module = _import(self.name, self.module)
        try:
            return getattr(module, self.attribute)
        except AttributeError:
            names = {
                *vars(module),
                *(found.name for found in pkgutil.iter_modules(getattr(module, "__path__", ()))),
            }
            public = sorted(name for name in names if not name.startswith("_"))
            raise unknown_name(
                "environment", self.attribute, public, see=f"pydoc {self.module}"
            ) from None


def names_code(name: str) -> bool:
    """Say whether the name of a task or a policy is code to import, and nothing of the library's.

    The name of an environment that was given as an object leads to no code either.
    """
    return ":" in name and (name.startswith(PREFIX) or not _NO_CODE.match(name))


MAY_BE_CODE = {
    "env": "environment",
    "policy": "policy",
    "network.order": "order",
    "cloning.augment": "augmentation",
}  # settings that may name code, and of what


def code_of(config: Config) -> dict[str, str]:
    """Return what a configuration names that is code to import, by setting."""
    named = {setting: attrgetter(setting)(config) for setting in MAY_BE_CODE}
    return {setting: name for setting, name in named.items() if name and names_code(name)}


def check_agreed(config: Config, *, named: Mapping[str, str | None], trust: bool | None) -> None:
    """Refuse a task, a policy or an order that is code if a folder named it, perhaps a stranger's.

    Args:
        config: as the folder has it.
        named: what the user named, if anything, by the settings that can be named.
        trust: whether the user agreed to whatever the folder names; None where that cannot be said.
        order: the order of agents that the user named, "" if none; None where none can be.

    Raises:
        UserError: with the name, and what would agree to it.
    """
    for setting, name in code_of(config).items():
        if trust or name == named.get(setting):
            continue
        ways = [f"--{setting} {shlex.quote(printable(name))}"] * (setting in named)
        ways += ["--trust"] * (trust is not None)
        raise UserError(
            f"the folder names the {MAY_BE_CODE[setting]} {shown(name)}, which is code to import "
            f"and run: if you trust it, add {' or '.join(ways)}"
        )


def agreed_task(config: Config, env: str | None, *, trust: bool) -> Config:
    """Return a folder's configuration on the task that the user named, or else on its own.

    Raises:
        UserError: as `check_agreed`; what is not to be played may be anything.
    """
    chosen = replace(config, env=env or config.env)
    check_agreed(chosen, named={"env": env}, trust=trust)
    return chosen


def find_factory(name: str) -> EnvFactory:
    """Find what makes the environment of this name, and import it.

    Args:
        name: "pettingzoo/module:environment", "package.module:factory", either with
            ":option=value,…" after it.

    Returns:
        The factory, which may be sent to worker processes.

    Raises:
        UserError: the name is not of this form, its module is not installed or Python's own, or
            there is no such thing in it.
    """
    module, _, rest = name.removeprefix(PREFIX).partition(":")
    attribute, _, options = rest.partition(":")
    if not module or not attribute.isidentifier():
        example = (
            f"{PREFIX}mpe2:simple_spread_v3"
            if name.startswith(PREFIX)
            else "my_package.my_module:make_env"
        )
        raise UserError(f"{name}: expected a module and what to take from it, such as {example}")
    if module.endswith(".py"):
        parts = (*PurePath(module).parent.parts, PurePath(module).stem)
        raise UserError(
            f"{name}: expected a module, not its file, such as {'.'.join(parts).strip('/.')}:{rest}"
        )
    _check_not_standard(name, module)
    factory = EnvFactory(name, module, attribute, _read_options(name, options))
    factory.find()
    return factory


def with_options(name: str, options: str) -> str:
    """Return a task's name with some options of other values, and the others as they are.

    Args:
        name: suite/auto, or the name of one's own environment, with or without options.
        options: as they are written in names, such as agents=8,grid=12.
    """
    parts = name.split(":")
    task = 2 if names_code(name) else 1  # parts before the options
    new = _split(name, options)
    changed = {item.partition("=")[0] for item in new}
    others = [
        item
        for item in _split(name, ":".join(parts[task:]))
        if item.partition("=")[0] not in changed
    ]
    return ":".join([*parts[:task], ",".join([*others, *new])])


def _check_not_standard(name: str, module: str) -> None:
    """Refuse modules of Python: some act when imported, many when called, none has environments."""
    if (top := module.partition(".")[0]) in sys.stdlib_module_names:
        raise UserError(f"{name}: {top} is part of Python, where there are no environments")


def _defining_module(target: Any) -> str:
    """Return the module of a callable; of an object that can be called, that of its class."""
    while isinstance(target, functools.partial):
        target = target.func
    return getattr(target, "__module__", None) or type(target).__module__


def _read_options(name: str, text: str) -> tuple[tuple[str, Any], ...]:
    """Read `N=5,max_cycles=25,continuous_actions=true,map="a,b",sizes=[3,4],seed=None`."""
    options = []
    for item in _split(name, text):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{name}: options are written option=value,…, got '{item}'")
        options.append((key, _read_value(value)))
    return tuple(options)


def _split(name: str, text: str) -> list[str]:
    """Cut options at the commas that are not within quotes or brackets.

    Raises:
        UserError: one of these is not closed.
    """
    items, quote, depth = [""], "", 0
    for letter in text:
        if letter == "," and not quote and not depth:
            items.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        else:
            depth += (letter in _OPENING) - (letter in _CLOSING)
        items[-1] += letter
    if quote or depth:
        raise UserError(f"{name}: a quote or bracket is not closed in '{text}'")
    return [item for item in items if item]


def _read_value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text


def _import(name: str, path: str) -> ModuleType:
    top = path.partition(".")[0]
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or path
        if missing == top:
            place = (
                f"is not in {os.getcwd()} and not installed: "
                "run this where it is, or say where with PYTHONPATH"
            )
            raise UserError(f"{name}: {top} {_pip(path) or place}") from None
        if path == missing or path.startswith(f"{missing}."):
            raise UserError(f"{name}: there is no module {missing}") from None
        raise UserError(
            f"{name}: {path} needs {missing}, which {_pip(path) or 'is not installed'}"
        ) from None
    except ImportError as error:
        raise UserError(f"{name}: {path} cannot be imported: {_one_line(error)}") from error


def _pip(path: str) -> str:
    """Return how to install a module that is known to be public, "" for any other.

    The name of a user's own module may be that of a stranger's package.
    """
    top, _, rest = path.partition(".")
    family = rest.partition(".")[0]
    if top == "mpe2":
        return "is not installed: pip install mpe2"
    return (
        f'is not installed: pip install "pettingzoo[{family}]"'
        if top == "pettingzoo" and family
        else ""
    )


def make_numbered(factory: Callable[..., Any], index: int) -> Any:
    """Make an environment; a factory with a parameter `index` is told which one it is."""
    return factory(index=index) if takes(factory, "index", by_name=True) else factory()


def takes(make: Callable[..., Any], option: str, *, by_name: bool = False) -> bool:
    """Say whether a keyword argument may be given; if `by_name`, not through `**kwargs`."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return False
    return option in parameters or (
        not by_name and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
