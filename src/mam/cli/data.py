"""`mam data`: what a dataset of joint trajectories holds, and the same as OG-MARL has it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from mam.cli.output import display
from mam.errors import UserError

_MOST_AGENTS = 64  # rows of a table


@dataclass(frozen=True)
class Data:
    """Read a dataset, compare its checksums, and say what is in it or write it as a Vault.

    It is one that `mam record` or `mam.Recorder` wrote, a Vault of OG-MARL, or one of Minari's.
    """

    what: tyro.conf.Positional[Literal["info", "export"]]
    """What to do: info, or export, which writes a Vault of OG-MARL."""
    folder: tyro.conf.Positional[Path]
    """Folder of the dataset."""
    out: Path | None = None
    """Folder of the Vault that export writes; OG-MARL looks for <name>.vlt/<uid>."""


def data(args: Data) -> None:
    """Print what a dataset holds, or write it as a Vault.

    Raises:
        UserError: if there is none, or it is damaged, or the Vault's folder is not empty.
    """
    if (args.what == "export") != (args.out is not None):
        raise UserError("mam data export DIR --out FOLDER writes a Vault; info writes nothing")
    if args.out is None:
        _info(args.folder)
    else:
        _export(args.folder, args.out)


def _export(folder: Path, out: Path) -> None:
    from mam.data.summary import batches, open_dataset
    from mam.data.vault import write_vault

    found = open_dataset(folder)
    write_vault(out, found.spec, found.optional, found.provenance, batches(found))
    print(f"in {out}: {len(found.lengths):,} episodes, {found.lengths.sum():,} steps")


def _info(folder: Path) -> None:
    from rich.table import Table

    from mam.data.summary import open_dataset, summarise
    from mam.errors import printable

    found = open_dataset(folder)
    spec, summary = found.spec, summarise(found)
    kind = "real numbers" if spec.continuous else "choices"
    components = " + ".join(map(str, spec.action_components or (spec.num_actions,)))
    print(
        f"{printable(spec.name)}: {len(found.lengths):,} episodes, {found.lengths.sum():,} steps, "
        f"{spec.num_agents} agents, {spec.obs_dim} features, {components} {kind}"
    )
    table = Table("of an episode", *("mean", "min", "quartile", "median", "quartile", "max"))
    for name, values in (("return", found.returns), ("steps", found.lengths)):
        quantiles = (f"{x:.3f}" for x in _five(values))
        table.add_row(name, f"{values.mean():.3f}", *quantiles)
    display(table)
    display(_actions(summary, spec))
    print(f"ends: {summary.terminated:,} terminated, {summary.truncated:,} truncated")
    print(f"missing: {', '.join(summary.missing) or 'nothing'}")
    for count, what in ((summary.illegal, "illegal actions"), (summary.non_finite, "non-finite")):
        if count:
            print(f"warning: {count:,} {what}")
    for name, value in found.provenance.items():
        print(f"{printable(name)}: {printable(value)}")


def _five(values: Any) -> Any:
    import numpy as np

    return np.quantile(values, (0, 0.25, 0.5, 0.75, 1))


def _actions(summary: Any, spec: Any) -> Any:
    """Tabulate how often each agent chose what, or the mean and deviation of its components."""
    from rich.table import Table

    left = spec.num_agents - _MOST_AGENTS
    caption = f"and {left} more agents" if left > 0 else None
    table = Table("agent", "alive", "actions", caption=caption)
    names = spec.agent_names or range(spec.num_agents)
    for n, name in list(enumerate(names))[:_MOST_AGENTS]:
        own = summary.actions[n]
        if summary.deviations is None:
            text = " ".join(f"{x:.0%}" for x in own)
        else:
            text = "  ".join(
                f"{m:.2f} ± {s:.2f}" for m, s in zip(own, summary.deviations[n], strict=True)
            )
        table.add_row(str(name), f"{summary.alive[n]:.0%}", text)
    return table
