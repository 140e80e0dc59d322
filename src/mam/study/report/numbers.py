"""Every number behind the report's figures and tables, as CSV in full precision."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mam.errors import printable
from mam.runs.sinks import RETURN
from mam.statistics import Estimate
from mam.study.report.results import THRESHOLDS, Curve, Results


def csv_files(results: Results) -> dict[str, str]:
    """Return file name → every number behind the figures and tables, in full precision."""
    return {f"{name}.csv": _csv(rows) for name, rows in numbers_behind(results).items()}


def numbers_behind(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Return name → rows of every number behind the figures and tables."""
    profiles = {
        (name,): Curve(np.arange(len(THRESHOLDS)), value)
        for name, value in results.profiles.items()
    }
    efficiency = {(name,): curve for name, curve in results.efficiency.items()}
    return {
        "scores": _score_rows(results),
        "aggregates": [
            {"statistic": statistic, "algorithm": name} | _ends(value)
            for statistic, estimates in results.aggregates.items()
            for name, value in estimates.items()
        ],
        "probability_of_improvement": [
            {"x": x, "y": y} | _ends(value) for (x, y), value in results.improvements.items()
        ],
        "performance_profiles": _curve_rows(
            profiles, ("algorithm",), "threshold", lambda i: THRESHOLDS[i]
        ),
        "sample_efficiency": _curve_rows(efficiency, ("algorithm",), "step_count", int),
        "learning_curves": _curve_rows(results.curves, ("task", "algorithm"), "step_count", int),
        "wall_clock": _curve_rows(results.clock_curves, ("task", "algorithm"), "minutes", float),
    }


def _score_rows(results: Results) -> list[dict[str, Any]]:
    rows = []
    for seed in (seed for cell in results.cells.values() for seed in cell):
        absolute = seed.absolute.get(RETURN, float("nan"))
        low, high = results.bounds[seed.task]
        rows.append(
            {
                "task": seed.task,
                "algorithm": seed.algorithm,
                "seed": seed.seed,
                "finished": seed.run.finished,
            }
            | {
                "absolute_return": absolute,
                "score": results.normalise(seed.task, np.array([absolute]))[0],
            }
            | {"score_0_return": low, "score_1_return": high, "won": seed.absolute.get("won", "")}
            | {
                "last_return": seed.returns[-1] if len(seed.returns) else "",
                "step_count": seed.run.step_count,
            }
            | {
                "steps_per_second": seed.run.steps_per_second,
                "seconds": seed.run.seconds,
                "run": seed.run.path,
            }
        )
    return rows


def _ends(estimate: Estimate) -> dict[str, float]:
    return {
        "value": float(estimate.value),
        "low": float(estimate.low),
        "high": float(estimate.high),
    }


def _curve_rows(
    curves: Mapping[tuple[str, ...], Curve],
    names: Sequence[str],
    axis: str,
    at: Callable[[Any], Any],
) -> list[dict[str, Any]]:
    return [
        dict(zip(names, key, strict=True))
        | {axis: at(step), "value": value, "low": low, "high": high}
        for key, curve in curves.items()
        for step, value, low, high in zip(
            curve.at, curve.returns.value, curve.returns.low, curve.returns.high, strict=True
        )
    ]


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as CSV."""
    file = io.StringIO()
    if rows:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _field(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def _field(value: Any) -> Any:
    """Leave NaN empty, and put text that a spreadsheet would compute behind an apostrophe."""
    if isinstance(value, str | Path):
        text = printable(value)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return "" if value != value else value
