"""Line charts as inline SVG."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 30
MOST_POINTS = 1200  # per line; longer ones are thinned out evenly


@dataclass
class Line:
    """One line of a chart: its points are (step, value), finite, by step."""

    label: str
    points: list[tuple[float, float]]
    color: int = 0  # index into the page's palette
    dashed: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart), about `count`, that lie in [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def labels(values: list[float]) -> list[str]:
    """`short` of each value, with as many digits as it takes to tell them apart."""
    for digits in range(4, 10):
        texts = [short(value, digits) for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


def short(value: float, digits: int = 4) -> str:
    """A number in few characters: 0.0123, 1.5e-05, 12,345, 3.2M."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e9:.{digits - 1}g}G" if size >= 1e9 else f"{value / 1e6:.{digits - 1}g}M"
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{digits - 3}e}" if size < 1e-3 else f"{value:.{digits}g}"


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = -(-len(points) // MOST_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def line_chart(lines: list[Line]) -> str:
    """SVG of the lines over the training step, with axes; the page's script adds the read-out under the pointer."""
    lines = [Line(line.label, _thin(line.points), line.color, line.dashed) for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    margin = (y_high - y_low) * 0.06 or abs(y_high) * 0.1 or 1.0
    if y_low >= 0:
        y_low, y_high = max(y_low - margin, 0.0), y_high + margin
    else:
        y_low, y_high = y_low - margin, y_high + margin

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_low) / (y_high - y_low)

    parts = []
    heights = ticks(y_low, y_high)
    for value, label in zip(heights, labels(heights), strict=True):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(value):.1f}" y2="{py(value):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 7}" y="{py(value) + 3.5:.1f}" text-anchor="end">{label}</text>')
    for value in (step for step in ticks(x_low, x_high, 6) if step == int(step)):
        parts.append(f'<text x="{px(value):.1f}" y="{HEIGHT - 11}" text-anchor="middle">{short(value)}</text>')
    for line in lines:
        style = f'class="s{line.color}{" dashed" if line.dashed else ""}"'
        path = "M" + "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in line.points)
        parts.append(f'<path {style} d="{path}"/>')
        if len(line.points) <= 12:
            parts += [f'<circle {style} cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6"/>' for x, y in line.points]
    parts.append(f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>')
    data = [
        {"label": line.label, "color": line.color, "points": [[x, px(x), y] for x, y in line.points]} for line in lines
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-lines="{escape(json.dumps(data), quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )
