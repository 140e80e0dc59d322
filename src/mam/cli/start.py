"""Where the settings of a command start from."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mam.cli.arguments import value_of
from mam.config import Config, DistillConfig, FinetuneConfig
from mam.errors import UserError
from mam.presets import preset, preset_for
from mam.runs.files import read_config
from mam.runs.zoo import PREFIX


def starting_options(kind: type, args: Sequence[str]) -> Any:
    """Make the options that arguments override; None if what they override is missing.

    They are of a run, a file, a preset, the run that is distilled, or the task's preset.

    Raises:
        UserError: if the arguments name several of these, or one that does not exist.
    """
    if "run" in (field.name for field in fields(kind)):
        run = next((arg for arg in args[:1] if not arg.startswith("-")), None)
        return kind(run=Path(run), config=taught_by(run)) if run else None
    starts = {
        flag: value
        for flag in ("--resume", "--config", "--preset")
        if (value := value_of(args, flag))
    }
    if len(starts) > 1:
        raise UserError(f"settings start from one place: {' and '.join(starts)} name several")
    match next(iter(starts.items()), ("", "")):
        case "--resume", run:
            return kind(config=read_config(Path(run) / "config.json"))
        case "--config", path:
            is_policy = Path(path).is_dir() or path.startswith(PREFIX)
            return kind(config=_settings_of(path) if is_policy else read_config(Path(path)))
        case "--preset", name:
            return kind(config=preset(name))
    return kind(config=preset_for(value_of(args, "--env") or Config.env)[0])


def taught_by(teacher: str) -> Config:
    """Return the settings of a run that distills a policy with the settings of that one."""
    config = _settings_of(teacher)
    own = {"learn": "distill", "teacher": teacher, "data": None, "distill": DistillConfig()}
    return replace(config, **own, init=None, init_partial=False, finetune=FinetuneConfig())


def _settings_of(policy: str) -> Config:
    """Return the settings of a run, of an exported policy, or of one of the zoo."""
    from mam.runs.load import saved_config

    return saved_config(policy)
