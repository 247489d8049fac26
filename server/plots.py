"""The plots of a report, as pictures inside the page."""

import base64
import io
import math
from typing import Any

from server.record import RoundLine


def plots_of(content: dict[str, Any], lines: list[RoundLine]) -> list[dict[str, str]]:
    """Quality by round, beside the baseline's if there is one, and epsilon by round."""
    name = next(iter(lines[-1].metrics))
    measured = [line for line in lines if line.metrics]
    quality = {name: [line.metrics[name] for line in measured]}
    levels = {}
    if "baseline" in content:
        levels["without privacy"] = content["baseline"]["evaluation"][name]
    spent = [math.inf if line.epsilon == "inf" else float(line.epsilon) for line in lines]
    at = [line.round for line in measured]
    plots = [_plot(at, quality, levels, f"{name} on public records")]
    if all(map(math.isfinite, spent)):
        at = [line.round for line in lines]
        plots.append(_plot(at, {"epsilon spent": spent}, {}, "epsilon spent by a site"))
    return plots


def _plot(
    rounds: list[int], curves: dict[str, list[float]], levels: dict[str, float], title: str
) -> dict[str, str]:
    """One line plot as an SVG data address, with its description for those who cannot see it."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, for this page only
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for label, values in curves.items():
        axes.plot(rounds, values, marker="o", label=label)
    for label, value in levels.items():
        axes.axhline(value, linestyle="--", color="gray", label=label)
    axes.set(xlabel="round", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if levels:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    last = "; ".join(f"{label}: {values[-1]:.4f}" for label, values in curves.items())
    return {"src": f"data:image/svg+xml;base64,{encoded}", "alt": f"{title}, last round {last}"}
