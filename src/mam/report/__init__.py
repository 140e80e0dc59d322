"""What is left of runs: of one, its summary and files; of many, `mam report`."""

from mam.report.single import (
    absolute_returns,
    bootstrap_interval,
    deployment,
    evaluation_returns,
    plot_learning_curve,
    summary_table,
    write_marl_eval,
)

__all__ = [
    "absolute_returns",
    "bootstrap_interval",
    "deployment",
    "evaluation_returns",
    "plot_learning_curve",
    "summary_table",
    "write_marl_eval",
]
