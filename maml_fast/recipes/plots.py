"""PNG pictures of a run, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from ..data.storage import write_atomically
from .measure import ACCURACY, Measure


def training_curves(path: Path, metrics: Sequence[Mapping[str, Any]], measure: Measure) -> None:
    """Meta-loss over iterations and, where there are any, validations; gaps where a number is None."""
    validated = [line for line in metrics if measure.key in line]
    figure = Figure(figsize=(10 if validated else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    trained = [line for line in metrics if "loss" in line]
    axes[0].plot([line["iteration"] for line in trained], [line["loss"] for line in trained], linewidth=0.8)
    axes[0].set(title="meta-training", xlabel="iteration", ylabel="query loss")
    if validated:
        values = [line[measure.key] for line in validated]
        axes[1].plot([line["iteration"] for line in validated], values, marker=".")
        axes[1].set(title="validation", xlabel="iteration", ylabel=measure.name)
        if measure is ACCURACY:
            axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        elif best := min(filter(None, values), default=0.0):
            axes[1].set_ylim(0, 4 * best)  # one diverged task can put a loss thirty decades above the others
    for each in axes:
        each.grid(alpha=0.3)
    _save(path, figure)


def adaptation_curves(
    path: Path, x: Tensor, truth: Tensor, x_s: Tensor, y_s: Tensor, predictions: Mapping[int, Tensor]
) -> None:
    """One panel for each task: the function, its support points, and the network after k steps.

    Args:
        x: (P,). truth: (T, P). x_s, y_s: (T, Ns). predictions: step -> (T, P).
    """
    figure = Figure(figsize=(5 * len(truth), 4), layout="constrained")
    for task, each in enumerate(figure.subplots(1, len(truth), squeeze=False)[0]):
        each.plot(x, truth[task], color="black", linewidth=1.5, label="truth")
        for step, values in predictions.items():
            style = ":" if step == 0 else "--" if step == 1 else "-"
            each.plot(x, values[task], style, label=f"{step} step{'' if step == 1 else 's'}")
        each.plot(x_s[task], y_s[task], "^", color="tab:purple", label="support")
        each.set(xlabel="x", ylabel="y", title=f"test task {task + 1}")
        each.grid(alpha=0.3)
        each.legend()
    _save(path, figure)


def _save(path: Path, figure: Figure) -> None:
    FigureCanvasAgg(figure)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
