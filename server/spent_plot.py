"""How a ledger's epsilon grew under its cap, as a drawing inside the page: SVG, and no script."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from common.privacy.accounting import shown

WIDTH, HEIGHT = 360, 190
"""In the drawing's own units, near those of a telephone's screen: text keeps its size there."""
LEFT, RIGHT, TOP, BOTTOM = 30, 350, 22, 158
LABEL_ABOVE = 12
"""How far the cap's label stands above its line."""
MOST_TICKS = 5
WIDE_LABEL = 70
"""Room that the name of a run needs below the axis."""

_Scale = Callable[[float], float]


@dataclass(frozen=True)
class Point:
    """The ledger after one entry that charged something, or changed the cap."""

    entry: int
    """Its number in the ledger."""
    time: str
    """By the site's own clock."""
    run: str
    """Which run was charged; empty where none was."""
    epsilon: float
    cap: float


def drawing(points: Sequence[Point], title: str) -> Markup:
    """The curve of a ledger, the cap above it, runs told apart below. Args: at least one point."""
    top = max(max(point.cap, point.epsilon) for point in points) * 1.12
    across = (RIGHT - LEFT) / len(points)

    def x(index: float) -> float:
        return round(LEFT + index * across, 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * value / top, 1)

    levels = [*points, points[-1]]  # the last level is drawn as wide as the others
    spent = _steps([(x(i), y(point.epsilon)) for i, point in enumerate(levels)])
    cap = _steps([(x(i), y(point.cap)) for i, point in enumerate(levels)])
    last = points[-1]
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        *_scale(top, y),
        f'<path class="area" d="M{LEFT} {y(0)} L{spent} L{RIGHT} {y(0)} Z"/>',
        f'<path class="spent" d="M{spent}"/>',
        f'<path class="cap" d="M{cap}"/>',
        f'<text class="capname" x="{LEFT + 4}" y="{y(points[0].cap) - 5}">cap</text>',
        _end_label(RIGHT - 3, y(last.epsilon), y(last.cap), last.epsilon),
        *_runs(points, x),
        "</svg>",
    ]
    return Markup("".join(parts))  # noqa: S704 - numbers, and escaped names


def _steps(corners: Sequence[tuple[float, float]]) -> str:
    """A line that stays level until the next point."""
    path = [f"{corners[0][0]} {corners[0][1]}"]
    for (_, before), (x, y) in pairwise(corners):
        path += [f"{x} {before}", f"{x} {y}"]
    return " L".join(path)


def _end_label(x: float, y: float, cap: float, epsilon: float) -> str:
    """The last value: below its line where the cap is too near for one above."""
    below = y - cap < LABEL_ABOVE
    at = y + LABEL_ABOVE + 2 if below else y - 5
    return f'<text class="now" x="{x}" y="{at}" text-anchor="end">{shown(epsilon)}</text>'


def _scale(top: float, y: _Scale) -> list[str]:
    step = _tick(top / MOST_TICKS)
    parts = []
    for number in range(int(top / step) + 1):
        at = y(number * step)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{at}" y2="{at}"/>')
        label = f"{number * step:g}"
        parts.append(f'<text x="{LEFT - 4}" y="{at + 4}" text-anchor="end">{label}</text>')
    return parts


def _tick(least: float) -> float:
    """The smallest round number that is not below.

    >>> _tick(0.7), _tick(2.1), _tick(0.3)
    (1.0, 5.0, 0.5)
    """
    power = 10.0 ** len(str(int(least))) if least >= 1 else 1.0
    while power / 10 >= least:
        power /= 10
    return next(power * f for f in (0.1, 0.2, 0.5, 1.0) if power * f >= least * (1 - 1e-9))


def _runs(points: Sequence[Point], x: _Scale) -> list[str]:
    """Where a run begins: a line, and its name and day where there is room."""
    parts, room = [], 0.0
    for index, point in enumerate(points):
        begins = point.run and (index == 0 or points[index - 1].run != point.run)
        if not begins:
            continue
        at = x(index)
        parts.append(f'<line class="run" x1="{at}" x2="{at}" y1="{TOP}" y2="{BOTTOM + 4}"/>')
        if at >= room:
            anchor = "end" if at > RIGHT - WIDE_LABEL else "start"
            name = escape(point.run[:8])
            parts.append(
                f'<text x="{at}" y="{BOTTOM + 15}" text-anchor="{anchor}">run {name}</text>'
                f'<text x="{at}" y="{BOTTOM + 28}" text-anchor="{anchor}">{point.time[:10]}</text>'
            )
            room = at + WIDE_LABEL
    return parts
