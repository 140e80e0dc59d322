"""Multi-Agent Mamba: cooperative multi-agent reinforcement learning as sequence modelling in JAX.

Names are imported when they are first used: `import mam` by itself loads nothing and starts no
backend.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mam import presets
    from mam.config import (
        CheckpointConfig,
        Config,
        DecoderConfig,
        EncoderConfig,
        EvalConfig,
        NetworkConfig,
        PPOConfig,
        WorkerConfig,
    )
    from mam.data.recorder import Recorder
    from mam.envs.registry import make_env
    from mam.networks.mixers.base import materialize
    from mam.networks.policy import register_mixer
    from mam.presets import preset
    from mam.runs.api import Result, evaluate, train
    from mam.runs.callbacks import Callback, Event
    from mam.runs.load import LoadedPolicy, load
    from mam.study.experiment.grid import grid
    from mam.study.report import notebook as report
    from mam.types import Environment, EnvSpec, Observation, Policy, TimeStep

__all__ = [
    "Callback",
    "CheckpointConfig",
    "Config",
    "DecoderConfig",
    "EncoderConfig",
    "EnvSpec",
    "Environment",
    "EvalConfig",
    "Event",
    "LoadedPolicy",
    "NetworkConfig",
    "Observation",
    "PPOConfig",
    "Policy",
    "Recorder",
    "Result",
    "TimeStep",
    "WorkerConfig",
    "evaluate",
    "grid",
    "load",
    "make_env",
    "materialize",
    "preset",
    "presets",
    "register_mixer",
    "report",
    "train",
]

_HOMES = {
    "mam.config": tuple(name for name in __all__ if name.endswith("Config")),
    "mam.data.recorder": ("Recorder",),
    "mam.envs.registry": ("make_env",),
    "mam.networks.mixers.base": ("materialize",),
    "mam.networks.policy": ("register_mixer",),
    "mam.presets": ("preset",),
    "mam.runs.api": ("Result", "evaluate", "train"),
    "mam.runs.callbacks": ("Callback", "Event"),
    "mam.runs.load": ("LoadedPolicy", "load"),
    "mam.study.experiment.grid": ("grid",),
    "mam.types": ("EnvSpec", "Environment", "Observation", "Policy", "TimeStep"),
}
_MODULES = {"presets": "mam.presets", "report": "mam.study.report.notebook"}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOME:
        raise AttributeError(f"module 'mam' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
