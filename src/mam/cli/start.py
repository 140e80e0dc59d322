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
            return kind(
                config=read_config(
                    Path(path) / "config.json" if Path(path).is_dir() else Path(path)
                )
            )
        case "--preset", name:
            return kind(config=preset(name))
    return kind(config=preset_for(value_of(args, "--env") or Config.env)[0])


def taught_by(teacher: str) -> Config:
    """Return the settings of a run that distills another one with the same settings."""
    config = read_config(Path(teacher) / "config.json")
    own = {"learn": "distill", "teacher": teacher, "data": None, "distill": DistillConfig()}
    return replace(config, **own, init=None, init_partial=False, finetune=FinetuneConfig())
