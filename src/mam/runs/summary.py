"""What is left of a run: its summary, its learning curve, and its results for marl-eval."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from rich.table import Table

from mam.config import Config
from mam.errors import UserError
from mam.runs.sinks import (
    RETURN,
    Record,
    mean_and_spread,
    seed_means,
    to_json,
    training_speed,
    write_atomically,
)
from mam.statistics import CONFIDENCE, MIN_SEEDS, interval, mean

_MUCH_LOST = 0.1  # of the sampled return, by greedy play

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def bootstrap_interval(
    values: Float[np.ndarray, "seeds *rest"], *, confidence: float = CONFIDENCE
) -> Float[np.ndarray, "2 *rest"]:
    """Compute the percentile bootstrap interval of the mean over seeds, the same at every call.

    Args:
        values: one number per seed; further axes are treated one by one, with the same resamples.
        confidence: probability mass between the two ends.

    Returns:
        Lower and upper end.
    """
    return interval(mean, [np.moveaxis(values, 0, -1)], confidence=confidence)


def evaluation_returns(
    records: Sequence[Record],
) -> tuple[np.ndarray, Float[np.ndarray, "evaluations seeds"]]:
    """Return step counts of the evaluations, and each seed's mean return in them."""
    evaluations = [record for record in records if record.kind == "evaluation"]
    steps = np.array([record.step_count for record in evaluations], int)
    if not evaluations:
        return steps, np.empty((0, 0))
    return steps, np.array([seed_means(record.values[RETURN]) for record in evaluations])


def absolute_returns(
    records: Sequence[Record], metric: str = RETURN
) -> Float[np.ndarray, "seeds"] | None:
    """Return each seed's absolute metric `metric`, the last one measured; None if there is none."""
    found = [record for record in records if record.kind == "absolute" and metric in record.values]
    return seed_means(found[-1].values[metric]) if found else None


def summary_table(
    records: Sequence[Record], *, seeds: Sequence[int], title: str | None = None
) -> Table:
    """Return the outcome of a run, finished or not, as a table for `rich.print`.

    One row per seed: its last and best mean evaluation return, its absolute metric, and that with
    greedy actions (or with sampled ones, if greedy ones are what counts), of the weights that did
    best so; then mean ± standard deviation over seeds and, from three seeds on, the 95 % bootstrap
    interval of that mean.

    Args:
        records: all records of the run.
        seeds: the seeds, in the order of the records' first axis.
        title: heading.
    """
    _, returns = evaluation_returns(records)
    absolute = absolute_returns(records)
    columns: dict[str, np.ndarray | None] = {
        "final return": returns[-1] if len(returns) else None,
        "best return": returns.max(axis=0) if len(returns) else None,
        "absolute metric": absolute,
    }
    for mode in ("greedy", "sampled"):
        if (beside := absolute_returns(records, f"{mode}_{RETURN}")) is not None:
            columns[mode] = beside
    table = Table(title=title, caption=_effort(records, len(seeds)))
    table.add_column("seed")
    for name in columns:
        table.add_column(name, justify="right")

    for index, seed in enumerate(seeds):
        table.add_row(
            str(seed), *("–" if v is None else f"{v[index]:.3f}" for v in columns.values())
        )
    if len(seeds) > 1:
        table.add_section()
        table.add_row(
            "mean ± std", *("–" if v is None else mean_and_spread(v) for v in columns.values())
        )
    if len(seeds) >= MIN_SEEDS:
        table.add_row("95 % interval", *map(_interval, columns.values()))
    return table


def deployment(records: Sequence[Record], config: Config) -> str:
    """Say which actions to deploy the best weights with, and why; "" without an absolute metric.

    Args:
        records: all records of the run.
        config: of the run.
    """
    counts, beside = ("greedy", "sampled") if config.eval.greedy else ("sampled", "greedy")
    score, other = absolute_returns(records), absolute_returns(records, f"{beside}_{RETURN}")
    if score is None:
        return ""
    if other is None:
        return (
            f"deploy {counts} actions, the only ones played "
            "(--eval.both-modes plays the others, too)"
        )
    scores = {counts: float(score.mean()), beside: float(other.mean())}
    best, worst = sorted(scores, key=lambda mode: -scores[mode])
    shown = f"{scores[best]:.3f}, with {worst} ones {scores[worst]:.3f}"
    line = f"deploy {best} actions: {shown} (each with the weights that did best so)"
    lost = scores["sampled"] - scores["greedy"]
    return f"{line}{_hint(config)}" if lost > _MUCH_LOST * abs(scores["sampled"]) else line


def _hint(config: Config) -> str:
    """Say what may help where greedy play is much worse, if the run did without."""
    from mam.networks.policy import knows_the_time  # needs JAX

    hint = "greedy play may go in circles, less so if agents know the time"
    try:
        known = knows_the_time(config.policy, config.network)
    except UserError:  # a mixer or a memory that only the run's own process knew
        return ""
    own = ":" in config.policy  # reads what settings it will
    return "" if known or own else f"\n{hint}: --network.recurrence.clock on"


def _interval(values: np.ndarray | None) -> str:
    if values is None:
        return "–"
    low, high = bootstrap_interval(values)
    return f"[{low:.3f}, {high:.3f}]"


def _effort(records: Sequence[Record], num_seeds: int) -> str:
    """Return steps, speed while training, and the wall-clock."""
    if not records:
        return "no records"
    last = records[-1]
    steps = f"{last.step_count:,} steps" + (f" × {num_seeds} seeds" if num_seeds > 1 else "")
    speed = training_speed(records) * num_seeds
    shown = f"{speed:,.0f}" if np.isfinite(speed) else "–"
    return f"{steps} · {shown} steps/s · {timedelta(seconds=round(last.elapsed))} wall-clock"


def write_marl_eval(
    run_folder: Path,
    records: Sequence[Record],
    *,
    env: str,
    task: str,
    algorithm: str,
    seeds: Sequence[int],
) -> Path:
    """Write `marl_eval.json`, the raw results in the form of Gorsane et al. (2022) and marl-eval.

        {env: {task: {algorithm: {"seed_<k>": {
            "step_<i>": {"step_count", "elapsed_time", <metric>: [per episode], …}, …,
            "absolute_metrics": {<metric>: [per episode], …}}}}}}

    i counts the evaluations, and `episode_return` is called `mean_episode_return`, as in published
    data.

    Args:
        run_folder: where the file goes.
        records: all records of the run; without an absolute one, `absolute_metrics` is left out.
        env: suite, such as "lbf".
        task: task within the suite.
        algorithm: name of the algorithm, without commas.
        seeds: the seeds k, in the order of the records' first axis.

    Returns:
        Path of the file.
    """
    evaluations = [record for record in records if record.kind == "evaluation"]
    absolute = [record for record in records if record.kind == "absolute"]

    def of_seed(index: int) -> dict[str, Any]:
        steps: dict[str, Any] = {
            f"step_{i}": {"step_count": record.step_count, "elapsed_time": record.elapsed}
            | _metrics(record, index)
            for i, record in enumerate(evaluations)
        }
        # After the steps, where marl-eval reads it.
        if absolute:
            steps["absolute_metrics"] = _metrics(absolute[-1], index)
        return steps

    runs = {f"seed_{seed}": of_seed(index) for index, seed in enumerate(seeds)}
    path = run_folder / "marl_eval.json"
    write_atomically(path, json.dumps({env: {task: {algorithm: runs}}}, indent=1, allow_nan=False))
    return path


def _metrics(record: Record, index: int) -> dict[str, list[float | None]]:
    """Return one seed's metrics, each as a list over episodes."""
    names = {name: f"mean_{name}" if name == RETURN else name for name in record.values}
    return {
        names[name]: to_json(np.atleast_1d(np.asarray(value[index], np.float64)))
        for name, value in record.values.items()
    }


def plot_learning_curve(
    path: Path,
    records: Sequence[Record],
    *,
    title: str,
    seeds: Sequence[int],
    reference: Mapping[str, float] | None = None,
) -> None:
    """Draw the mean evaluation return against environment steps, 1200 × 750 pixels.

    Args:
        path: PNG to write.
        records: all records of the run, with at least one evaluation.
        title: heading, such as task and algorithm.
        seeds: the seeds, in the order of the records' first axis.
        reference: further returns to compare with, by name; dashed lines.

    Raises:
        ValueError: if no record is an evaluation.
    """
    from matplotlib.ticker import EngFormatter

    steps, returns = evaluation_returns(records)
    if not len(steps):
        raise ValueError("nothing to plot: the run has no evaluation yet")
    with _figure(path) as axes:
        _draw_curves(axes, steps, returns, len(seeds))
        absolute = absolute_returns(records)
        if absolute is not None:
            label = f"absolute metric {mean_and_spread(absolute)}"
            axes.axhline(
                float(absolute.mean()), color=_GREEN, linestyle=":", linewidth=2, label=label
            )
        for (name, value), colour in zip(
            (reference or {}).items(), _REFERENCES * len(reference or {}), strict=False
        ):
            axes.axhline(
                value, color=colour, linestyle="--", linewidth=1.5, label=f"{name} {value:.3g}"
            )
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _decorate(axes, title, "environment steps (per seed)")


def plot_sweep(
    path: Path,
    values: Sequence[float],
    returns: Float[np.ndarray, "values seeds"],
    *,
    option: str,
    title: str,
) -> None:
    """Draw the mean return against an option of a task, on a scale of powers of two.

    Args:
        path: PNG to write.
        values: of the option, positive.
        returns: mean return of each seed.
        option: name of the option.
        title: heading, such as task and algorithm.
    """
    with _figure(path) as axes:
        _draw_curves(axes, np.asarray(values), returns, returns.shape[1])
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        _decorate(axes, title, option)


@contextmanager
def _figure(path: Path) -> Iterator["Axes"]:
    """Write what is drawn."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):  # names are a user's, and may hold dollars
        figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.add_subplot()
        figure.savefig(path)


# Okabe and Ito's palette: distinct with any kind of colour vision, and in grey.
_BLUE, _GREEN = "#0072B2", "#009E73"
_REFERENCES = ("#D55E00", "#CC79A7", "#E69F00")


def _draw_curves(axes: "Axes", steps: np.ndarray, returns: np.ndarray, num_seeds: int) -> None:
    """Draw the mean, single seeds and a band."""
    mean = f"mean of {num_seeds} seeds" if num_seeds > 1 else "evaluation"
    axes.plot(
        steps,
        returns.mean(axis=1),
        color=_BLUE,
        linewidth=2.2,
        marker="o",
        markersize=4,
        zorder=3,
        label=mean,
    )
    if num_seeds == 1:
        return
    lines = axes.plot(steps, returns, color=_BLUE, alpha=0.35, linewidth=0.8)
    lines[0].set_label("single seeds")
    if num_seeds >= MIN_SEEDS:
        (low, high), band = bootstrap_interval(returns.T), "95 % bootstrap interval over seeds"
    else:
        low, high, band = returns.min(axis=1), returns.max(axis=1), "range over seeds"
    axes.fill_between(steps, low, high, color=_BLUE, alpha=0.18, linewidth=0, label=band)


def _decorate(axes: "Axes", title: str, xlabel: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("mean episode return")
    axes.margins(y=0.08)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="best")
