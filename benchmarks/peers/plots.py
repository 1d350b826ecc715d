"""Two kinds of plots as SVG text: rows of horizontal bars, and lines over a logarithmic axis. No library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH = 900
_FONT = "font-family='system-ui, sans-serif'"
_INK, _FAINT, _GRID = "#1f2328", "#59636e", "#d1d9e0"


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    value: float | None
    """None: not measured."""
    color: str


@dataclass(frozen=True, slots=True)
class BarPanel:
    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    points: Sequence[tuple[float, float]]
    """(x, y), x > 0 ascending."""
    color: str


@dataclass(frozen=True, slots=True)
class LinePanel:
    title: str
    x_title: str
    lines: Sequence[Line]


def bar_chart(panels: Sequence[BarPanel]) -> str:
    """The panels side by side, each with a scale of its own; all have the same rows, named once at the left."""
    labels = [bar.label for bar in panels[0].bars]
    names_width, row, top = 170, 26, 44
    panel_width = (_WIDTH - names_width) / len(panels)
    parts = [
        _text(names_width - 12, top + row * index + 17, label, anchor="end")
        for index, label in enumerate(labels)
    ]
    for number, panel in enumerate(panels):
        left = names_width + number * panel_width
        # Room for the figure behind the longest bar.
        scale = (panel_width - 70) / (max(bar.value or 0.0 for bar in panel.bars) or 1.0)
        parts.append(_text(left, 26, panel.title, weight="600"))
        parts.append(_line(left, top - 4, left, top + row * len(labels), _GRID))
        for index, bar in enumerate(panel.bars):
            width = (bar.value or 0.0) * scale
            y = top + row * index
            parts.append(
                f"<rect x='{left:.1f}' y='{y + 4}' width='{width:.1f}' height='{row - 8}' fill='{bar.color}'/>"
            )
            shown = "-" if bar.value is None else figure(bar.value)
            parts.append(_text(left + width + 6, y + 17, shown, color=_FAINT))
    return _svg(top + row * len(labels) + 14, parts)


def line_chart(panels: Sequence[LinePanel]) -> str:
    """The panels side by side: x logarithmic to base 2, y from zero, each with a scale of its own."""
    height, top, bottom, gap = 300, 44, 52, 60
    panel_width = (_WIDTH - gap * len(panels)) / len(panels)
    parts: list[str] = []
    for number, panel in enumerate(panels):
        left = gap * (number + 1) - 8 + number * panel_width
        parts.append(_text(left, 26, panel.title, weight="600"))
        parts.append(_text(left + panel_width / 2, height - 10, panel.x_title, anchor="middle", color=_FAINT))
        xs = sorted({x for line in panel.lines for x, _ in line.points})
        ys = [y for line in panel.lines for _, y in line.points]
        if not xs:
            continue
        step = nice_step(max(ys))
        scale = _Scale(
            left, panel_width - 40, xs[0], xs[-1], top, height - bottom, step * math.ceil(max(ys) / step)
        )
        parts += _grid(scale, xs, step)
        for line in panel.lines:
            points = [(scale.x(x), scale.y(y)) for x, y in line.points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f"<polyline points='{path}' fill='none' stroke='{line.color}' stroke-width='2'/>")
            parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{line.color}'/>" for x, y in points]
            if points:
                parts.append(_text(points[-1][0] - 4, points[-1][1] - 9, line.label, "end", line.color, "600"))
    return _svg(height, parts)


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to places: x logarithmic between two values, y from zero at the bottom to the highest."""

    left: float
    width: float
    lowest_x: float
    highest_x: float
    top: float
    bottom: float
    highest_y: float

    def x(self, value: float) -> float:
        span = math.log2(self.highest_x / self.lowest_x) or 1.0
        return self.left + self.width * math.log2(value / self.lowest_x) / span

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * value / self.highest_y


def _grid(scale: _Scale, xs: Sequence[float], step: float) -> list[str]:
    parts = []
    for tick in range(round(scale.highest_y / step) + 1):
        y = scale.y(tick * step)
        parts.append(_line(scale.left, y, scale.left + scale.width, y, _GRID))
        parts.append(_text(scale.left - 8, y + 4, figure(tick * step), anchor="end", color=_FAINT))
    names = [_text(scale.x(x), scale.bottom + 18, f"{x:,.0f}", anchor="middle", color=_FAINT) for x in xs]
    return parts + names


def nice_step(highest: float) -> float:
    """A distance between grid lines, 1, 2 or 5 times a power of ten, that gives 3 to 7 of them."""
    raw = highest / 6
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)


def figure(value: float) -> str:
    """Three significant digits, thousands apart."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".rstrip("0").rstrip(".") if decimals else f"{value:,.0f}"


def _svg(height: float, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height:g}' width='{_WIDTH}' "
            f"height='{height:g}' {_FONT} font-size='13'>",
            "<rect width='100%' height='100%' fill='#ffffff'/>",
            *parts,
            "</svg>\n",
        ]
    )


def _text(
    x: float, y: float, content: str, anchor: str = "start", color: str = _INK, weight: str = "400"
) -> str:
    style = f"text-anchor='{anchor}' fill='{color}' font-weight='{weight}'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{escape(content)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{color}'/>"
