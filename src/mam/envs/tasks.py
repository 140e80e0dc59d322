"""Suites and their tasks' names, in tables that import nothing: JAX is not needed to refuse one.

A new suite is a module and a row of `SUITES`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mam.errors import unknown_name

# In the words of Jumanji's LBF generator; fov = field of view, in cells to each side.
LBF_TASKS: dict[str, dict[str, Any]] = {
    "2s-8x8-2p-2f-coop": {
        "grid_size": 8,
        "fov": 2,
        "num_agents": 2,
        "num_food": 2,
        "force_coop": True,
    },
    "8x8-2p-2f-coop": {
        "grid_size": 8,
        "fov": 8,
        "num_agents": 2,
        "num_food": 2,
        "force_coop": True,
    },
    "2s-10x10-3p-3f": {"grid_size": 10, "fov": 2, "num_agents": 3, "num_food": 3},
    "10x10-3p-3f": {"grid_size": 10, "fov": 10, "num_agents": 3, "num_food": 3},
    "15x15-3p-5f": {"grid_size": 15, "fov": 15, "num_agents": 3, "num_food": 5},
    "15x15-4p-3f": {"grid_size": 15, "fov": 15, "num_agents": 4, "num_food": 3},
    "15x15-4p-5f": {"grid_size": 15, "fov": 15, "num_agents": 4, "num_food": 5},
}

# Shelf clusters down and across; a task's name adds the number of agents.
RWARE_SIZES = {"tiny": (1, 3), "small": (2, 3), "medium": (2, 5), "large": (3, 5), "xlarge": (4, 5)}
RWARE_TASKS = (
    *("tiny-2ag", "tiny-2ag-hard", "tiny-4ag", "tiny-4ag-hard", "small-4ag", "small-4ag-hard"),
    *("medium-4ag", "medium-4ag-hard", "medium-6ag", "large-4ag", "large-4ag-hard"),
    *("large-8ag", "large-8ag-hard", "xlarge-4ag", "xlarge-4ag-hard"),
)

# Rows x columns x agents, and the time limit. Square only: Jumanji's action mask of Cleaner is
# wrong otherwise.
CONNECTOR_TASKS = {"5x5x3a": 25, "7x7x5a": 49, "10x10x10a": 100, "15x15x23a": 225}
CLEANER_TASKS = {"5x5x2a": 25, "10x10x3a": 100, "15x15x5a": 225, "20x20x20a": 400}

SMAX_TASKS = (
    *(
        "2s3z",
        "3s5z",
        "5m_vs_6m",
        "10m_vs_11m",
        "27m_vs_30m",
        "3s5z_vs_3s6z",
        "3s_vs_5z",
        "6h_vs_8z",
    ),
    *("smacv2_5_units", "smacv2_10_units", "smacv2_20_units"),
)

MPE_TASKS = tuple(
    f"simple_spread_{agents}{kind}" for kind in ("", "-discrete") for agents in (3, 5, 10, 30)
)
MABRAX_TASKS = ("ant_4x2", "halfcheetah_6x1", "hopper_3x1", "humanoid_9|8", "walker2d_2x3")
OVERCOOKED_LAYOUTS = (
    "cramped_room",
    "asymm_advantages",
    "coord_ring",
    "forced_coord",
    "counter_circuit",
)
OVERCOOKED_TASKS = tuple(layout + kind for kind in ("", "-shaped") for layout in OVERCOOKED_LAYOUTS)
HANABI_TASKS = ("2p", "3p", "4p", "5p")
# Options of `camar/auto`. CAMAR's defaults, in which agents get 0.6 m far; its published protocol,
# with so many obstacles ("o"); and the moves of that in crowds, with 3 cells for each agent.
_CAMAR_FAR: dict[str, Any] = {"density": 0.05, "frameskip": 15}
CAMAR_TASKS: dict[str, dict[str, Any]] = {
    **{f"random_grid-{agents}": {"agents": agents} for agents in (8, 32, 128)},
    **{
        f"random_grid-{agents}-o{obstacles}": _CAMAR_FAR
        | {"agents": agents, "density": obstacles / 400, "limit": 1001}
        for agents in (8, 32)
        for obstacles in (0, 20, 60)
    },
    **{
        f"crowd-{agents}": _CAMAR_FAR
        | {"agents": agents, "rows": side, "columns": side, "limit": 20 * side}
        for agents, side in ((8, 5), (32, 10), (128, 20))
    },
}
PROBE_TASKS = (
    *("identity", "copy", "matrix", "memory", "target", "components"),
    *("tmaze-10", "tmaze-50", "tmaze-100", "convention", "recall-4", "recall-8", "recall-16"),
    *("channels-8", "channels-16", "channels-32"),
)


@dataclass(frozen=True)
class Suite:
    """A suite, and all that is to be known of it before it is imported."""

    description: str
    module: str  # has `make_<suite>(task)` and imports the packages in there
    tasks: Iterable[str]
    # Tasks with options, suite/auto:…, for each of which the module has `make_<suite>_auto(…)`.
    made_to_measure: tuple[str, ...] = ()
    extra: str | None = None  # of the library, which installs the packages
    packages: tuple[str, ...] = ()  # the distributions whose versions decide what a task is


_AUTO = ("auto",)
_JUMANJI: dict[str, Any] = {
    "module": "mam.envs.jumanji",
    "extra": "jumanji",
    "packages": ("jumanji",),
}
_JAXMARL: dict[str, Any] = {"extra": "jaxmarl", "packages": ("jaxmarl",)}

SUITES = {
    "lbf": Suite("Level-Based Foraging", tasks=LBF_TASKS, made_to_measure=_AUTO, **_JUMANJI),
    "rware": Suite("the robotic warehouse", tasks=RWARE_TASKS, made_to_measure=_AUTO, **_JUMANJI),
    "connector": Suite("wires laid without crossing", tasks=CONNECTOR_TASKS, **_JUMANJI),
    "cleaner": Suite("a maze cleaned together", tasks=CLEANER_TASKS, **_JUMANJI),
    "smax": Suite(
        "battles in the manner of SMAC",
        "mam.envs.jaxmarl.smax",
        SMAX_TASKS,
        made_to_measure=_AUTO,
        **_JAXMARL,
    ),
    "mpe": Suite(
        "particles that spread over landmarks",
        "mam.envs.jaxmarl.mpe",
        MPE_TASKS,
        made_to_measure=_AUTO,
        **_JAXMARL,
    ),
    "mabrax": Suite(
        "robots whose limbs are agents",
        "mam.envs.jaxmarl.mabrax",
        MABRAX_TASKS,
        extra="mabrax",
        packages=("jaxmarl", "brax"),
    ),
    "overcooked": Suite(
        "cooks in a kitchen", "mam.envs.jaxmarl.overcooked", OVERCOOKED_TASKS, **_JAXMARL
    ),
    "hanabi": Suite("the card game", "mam.envs.jaxmarl.hanabi", HANABI_TASKS, **_JAXMARL),
    "camar": Suite(
        "continuous routing of many agents",
        "mam.envs.camar",
        CAMAR_TASKS,
        made_to_measure=("auto", "caves", "text"),
        extra="camar",
        packages=("camar",),
    ),
    "probe": Suite("tiny tasks with a known optimum", "mam.envs.probes", PROBE_TASKS),
}


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks, "suite/task"."""
    return tuple(f"{name}/{task}" for name, suite in SUITES.items() for task in suite.tasks)


DATASET = "dataset"  # the task of a dataset, where there is nothing to play


def check_task(name: str) -> None:
    """Refuse a task that no suite has; options, and names of one's own environment, come later.

    Raises:
        UserError: there is none, with the nearest ones.
    """
    if name == DATASET:
        return
    prefix, _, rest = name.partition("/")
    suite = SUITES.get(prefix)
    if ":" in name and suite is None:
        return
    task, _, options = rest.partition(":")
    if suite and (task in suite.made_to_measure or (not options and task in suite.tasks)):
        return
    autos = (f"{name}/{task}" for name, suite in SUITES.items() for task in suite.made_to_measure)
    raise unknown_name("task", name, (*task_names(), *autos), see="mam list")
