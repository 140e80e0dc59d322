"""`mam list`: policies, tasks and presets."""

from dataclasses import dataclass
from typing import Any

import tyro

from mam.cli.output import display
from mam.errors import UserError, shown
from mam.presets import PRESETS


@dataclass(frozen=True)
class List:
    """List policies, tasks and presets."""

    text: tyro.conf.Positional[str | None] = None
    """Only what has this in its name or description, such as lbf."""
    envs: bool = False
    """A table of all tasks with their agents, observations, actions and limits; loads every suite,
    in a minute."""


def list_names(args: List) -> None:
    """Print the names that other commands take."""
    from mam.envs.registry import auto_options
    from mam.envs.tasks import SUITES
    from mam.networks.memory.registry import MEMORIES
    from mam.networks.mixers.registry import mixer_families
    from mam.networks.policy import policies

    if args.envs:
        _print_specs()
        return
    sections = {"policies (--policy)": [f"{k:<11}{v.description}" for k, v in policies().items()]}
    sections["policies (--policy)"].append("your own   package.module:make")
    if own := [text for family in mixer_families().values() for text in family.own_defaults]:
        sections["settings of one mixer alone (--network.mixer-options)"] = own
    sections["memory of any policy (--network.memory)"] = [
        f"{name:<11}{kind.description}" for name, kind in MEMORIES.items()
    ]
    tasks, options = [], auto_options()
    for name, suite in SUITES.items():
        extra = f" (extra {suite.extra})" if suite.extra else ""
        tasks.append(f"{name + '/':<13}{suite.description}{extra}")
        tasks += [f"  {name}/{task}" for task in suite.tasks]
        for task in suite.made_to_measure:
            if defaults := options[f"{name}/{task}"]:
                values = ",".join(f"{key}={_shown(value)}" for key, value in defaults.items())
                tasks.append(f"  {name}/{task}:{values}")
    tasks += ["any PettingZoo environment        pettingzoo/mpe2:simple_spread_v3"]
    tasks += ["your own                          package.module:factory"]
    sections["tasks (--env; `mam list --envs` shows their sizes)"] = tasks
    sections["presets (--preset; chosen by the task unless given)"] = [
        f"{name:<24}{(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items()
    ]
    text = (args.text or "").lower()
    found = {
        title: [line for line in lines if text in line.lower()] for title, lines in sections.items()
    }
    if not any(found.values()):
        raise UserError(f"nothing has {shown(args.text)} in its name or description")
    print("\n\n".join("\n  ".join([title, *lines]) for title, lines in found.items() if lines))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_specs() -> None:
    """Print every task with its sizes, and how to get each suite that is not installed."""
    from rich.table import Column, Table

    from mam.envs.registry import auto_options, make
    from mam.envs.tasks import task_names

    names = ("task", "agents", "observation", "state", "actions", "limit")
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None, padding=(0, 2, 0, 0))
    missing = {}
    for name in (*task_names(), *auto_options()):
        suite = name.partition("/")[0]
        try:
            spec = None if suite in missing else make(name, "none").spec
        except UserError as error:
            missing[suite] = str(error)
            spec = None
        if spec is None:
            table.add_row(name, *["-"] * 5)
            continue
        image = "" if spec.grid_shape is None else "×".join(map(str, spec.grid_shape))
        observation = " + ".join(
            part for part in (str(spec.obs_dim) if spec.obs_dim else "", image) if part
        )
        actions = f"{spec.num_actions} real" if spec.continuous else str(spec.num_actions)
        if spec.action_components is not None:
            actions = " + ".join(map(str, spec.action_components))
        sizes = (
            spec.num_agents,
            observation,
            spec.state_dim or "-",
            actions,
            spec.time_limit or "-",
        )
        table.add_row(name, *map(str, sizes))
    display(table)
    print(
        "observation: features of one agent, without its id, and the image it sees "
        "(rows × columns × channels)"
    )
    print(
        "actions: how many there are to choose from, in each component where there are several, "
        "or real numbers"
    )
    for suite, message in missing.items():
        print(f"{suite}: {message}")
