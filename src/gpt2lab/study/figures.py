"""The report's plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2lab.study.measure import Measured

COLOURS = ["#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]  # Okabe and Ito: distinct for all eyes
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "figure.dpi": 160,
    "svg.hashsalt": "gpt2lab",
}


def learning_curves(rows: list[Measured], path: Path) -> None:
    """Held-out loss against tokens, and against seconds of training."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
        for row, colour in zip(rows, COLOURS, strict=False):
            tokens, seconds, losses = np.array(row.curve).T
            by_tokens.plot(tokens / 1e6, losses, color=colour, label=row.name, linewidth=1.6)
            by_seconds.plot(seconds, losses, color=colour, linewidth=1.6)
        _zoom(by_tokens, [loss for row in rows for _, _, loss in row.curve[1:]])
        by_tokens.set(xlabel="tokens, millions", ylabel="held-out loss, nats a token", title="for the same text")
        by_seconds.set(xlabel="seconds of training", title="for the same time")
        by_tokens.legend(frameon=False)
        figure.savefig(path)


def loss_by_position(rows: list[Measured], trained_len: int, path: Path, *, bin_width: int = 32) -> None:
    """Held-out loss at each position of a context that goes beyond the trained length."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        axes = figure.subplots()
        for row, colour in zip(rows, COLOURS, strict=False):
            losses = np.array(row.position_losses)
            binned = losses[: len(losses) // bin_width * bin_width].reshape(-1, bin_width).mean(axis=1)
            centres = (np.arange(len(binned)) + 0.5) * bin_width
            axes.plot(centres, binned, color=colour, label=row.name, linewidth=1.6)
            if len(losses) <= trained_len:
                axes.plot(centres[-1:], binned[-1:], color=colour, marker="|", markersize=14, markeredgewidth=2)
        axes.axvline(trained_len, color="#999999", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            " trained on contexts up to here",
            (trained_len, 0.98),
            xycoords=("data", "axes fraction"),
            va="top",
            color="#666666",
        )
        axes.set(
            xlabel=f"position in the context, means of {bin_width}",
            ylabel="held-out loss, nats a token",
            xlim=(0, None),
        )
        axes.legend(frameon=False, loc="upper right")
        figure.savefig(path)


def _zoom(axes: Axes, losses: list[float]) -> None:
    """Leave out the fall from chance in the first steps: what differs between the rows comes after it."""
    low, high = min(losses), float(np.quantile(losses, 0.95))
    axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
