"""The privacy-utility frontier: what quality is had at which epsilon, with its spread."""

import io
import math
from dataclasses import dataclass
from typing import Any

WIDTH_IN, HEIGHT_IN = 6.4, 4.0


@dataclass(frozen=True)
class Curve:
    """What was measured under one setting, at several epsilons."""

    label: str
    points: list[tuple[float, float, float]]
    """(epsilon, mean, standard deviation over seeds or 0); infinity: without privacy."""


def frontier_of(curves: list[Curve], metric: str) -> str:
    """One plot as SVG text: epsilon to the right on a logarithmic scale, quality upwards.

    Bars are one standard deviation over seeds each way; a run without privacy has no place on the
    scale, and is a dashed line across.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, for this page only

    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.add_subplot()
    for index, curve in enumerate(curves):
        _draw(axes, curve, color=f"C{index % 10}")
    _scale(axes, sorted({e for curve in curves for e, _, _ in curve.points if math.isfinite(e)}))
    axes.set(ylabel=metric, title=f"{metric} by epsilon")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": f"{metric} by epsilon"})
    return buffer.getvalue()


def _draw(axes: Any, curve: Curve, color: str) -> None:
    private = sorted(point for point in curve.points if math.isfinite(point[0]))
    if private:
        at, means, spreads = zip(*private, strict=True)
        axes.errorbar(
            at, means, yerr=spreads, marker="o", capsize=4, color=color, label=curve.label or None
        )
    for _, mean, spread in (point for point in curve.points if math.isinf(point[0])):
        beside = f" ({curve.label})" if curve.label else ""
        axes.axhline(mean, linestyle="--", color=color, label=f"without privacy{beside}")
        axes.axhspan(mean - spread, mean + spread, color=color, alpha=0.1, linewidth=0)


def _scale(axes: Any, epsilons: list[float]) -> None:
    """The epsilons that were measured, and no others, are named."""
    if not epsilons:
        axes.set(xticks=[], xlabel="no run with privacy")
        return
    axes.set_xscale("log")
    axes.set_xticks(epsilons, labels=[f"{epsilon:.3g}" for epsilon in epsilons])
    axes.minorticks_off()
    axes.set_xlim(epsilons[0] / 1.25, epsilons[-1] * 1.25)
    axes.set_xlabel("epsilon (worst site, logarithmic)")
