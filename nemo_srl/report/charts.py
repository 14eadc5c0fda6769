"""Charts as inline SVG: lines with intervals, curves, histograms, stacked bars. They need no library and no script.

Colors are CSS classes (`l0`, `f0`, ...), so that one page suits dark and light screens. Labels are escaped, so they may
be any text. Each `<svg>` has a description for screen readers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 28
_MAX_POINTS = 400
_MIN_SHARE_OF_SCALE = 0.25
_NUM_COLORS = 6

Format = Callable[[float], str]
Limits = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A whole `<svg>`. `legend` has the CSS class and the name of each series."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""


class Point(NamedTuple):
    """A value at the x label with number `x`. `low` and `high` are its 95% interval, if there is one."""

    x: int
    value: float
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """One line of a chart. A dashed line is a reference, such as the paper's figures."""

    name: str
    points: Sequence[Point]
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class _Frame:
    """Maps data to pixels. The y axis goes from the first of `marks` to the last."""

    x_max: float
    marks: Sequence[float]

    def x(self, value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * value / (self.x_max or 1)

    def y(self, value: float) -> float:
        low, high = self.marks[0], self.marks[-1]
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - low) / ((high - low) or 1)

    def axes(self, form: Format, x_labels: Iterable[tuple[float, str]]) -> list[Markup]:
        """A line with its number for each mark, and the labels below their x."""
        line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        parts = [_text(self.x(x), HEIGHT - 9, label, "middle") for x, label in x_labels]
        for y, number in ((self.y(mark), form(mark)) for mark in self.marks):
            parts += [line.format(_LEFT, WIDTH - _RIGHT, y, y), _text(_LEFT - 6, y + 4, number, "end")]
        return parts


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About `count` round numbers that enclose [low, high]."""
    if not math.isfinite(low) or not math.isfinite(high):
        return [0.0, 1.0]
    if high <= low:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(
    series: Sequence[Series], x_labels: Sequence[str], *, title: str, form: Format, limits: Limits, note: str
) -> Chart:
    """Values by label, joined by lines, with bars for the intervals.

    `form` turns a value into text, also on the axis. No value can be outside of `limits`, so the axis ends there.
    """
    values = [v for s in series for p in s.points for v in (p.value, p.low, p.high) if v is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    # A change that is small on the whole scale must not look large, so the axis shows at least a part of the scale.
    spare = (_MIN_SHARE_OF_SCALE * (limits[1] - limits[0]) - (high - low)) / 2
    if math.isfinite(spare) and spare > 0:
        low, high = max(limits[0], low - spare), min(limits[1], high + spare)
    frame = _Frame(len(x_labels), [m for m in ticks(low, high) if limits[0] <= m <= limits[1]])
    parts = frame.axes(form, ((i + 0.5, label) for i, label in enumerate(x_labels)))
    for s in series:
        parts.append(_line([(frame.x(p.x + 0.5), frame.y(p.value)) for p in s.points], s.color, dashed=s.dashed))
        for p in s.points:
            parts += _point(frame, p, s, f"{s.name}, {x_labels[p.x]}: {_with_interval(p, form)}")
    described = "; ".join(f"{s.name}: " + ", ".join(_with_interval(p, form) for p in s.points) for s in series)
    legend = [(f"{'h' if s.dashed else 'b'}{s.color}", s.name) for s in series] if len(series) > 1 else []
    return Chart(title=title, svg=_svg(title, described, parts), legend=legend, note=note)


def curve_chart(curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str) -> Chart:
    """Curves over steps, by name. Long curves lose points that nobody could see."""
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in curves.items()}
    values = [y for points in finite.values() for _, y in points]
    x_max = max((x for points in finite.values() for x, _ in points), default=1.0)
    frame = _Frame(x_max, ticks(min(values), max(values)) if values else [0.0, 1.0])
    parts = frame.axes("{:g}".format, ((x, f"{x:g}") for x in ticks(0, x_max, count=4) if x <= x_max))
    for i, points in enumerate(finite.values()):
        thinned = points[:: max(1, len(points) // _MAX_POINTS)]
        parts.append(_line([(frame.x(x), frame.y(y)) for x, y in thinned], i))
    ends = ((name, points[0][1], points[-1][1]) for name, points in finite.items() if points)
    described = "; ".join(f"{name}: {first:.4g} to {last:.4g}" for name, first, last in ends)
    return Chart(title=title, svg=_svg(title, described, parts), legend=_legend(finite))


def bar_chart(groups: Mapping[str, Sequence[float]], x_labels: Sequence[str], *, title: str) -> Chart:
    """Histograms to compare: shares (0 to 1) by label, with one bar for each group."""
    frame = _Frame(len(x_labels), ticks(0, max((v for values in groups.values() for v in values), default=1.0) or 1.0))
    parts = frame.axes(lambda v: f"{100 * v:.3g}%", ((i + 0.5, label) for i, label in enumerate(x_labels)))
    bar = Markup('<rect class="f{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')
    width = 0.84 / max(1, len(groups))
    for g, (name, values) in enumerate(groups.items()):
        for i, value in enumerate(values):
            left, right = frame.x(i + 0.08 + g * width), frame.x(i + 0.08 + (g + 1) * width)
            top, tip = frame.y(value), f"{name}, {x_labels[i]}: {value:.1%}"
            parts.append(bar.format(g % _NUM_COLORS, left, top, max(1, right - left - 1), frame.y(0) - top, tip))
    described = "; ".join(f"{name}: " + ", ".join(f"{v:.0%}" for v in values) for name, values in groups.items())
    return Chart(title=title, svg=_svg(title, described, parts), legend=_legend(groups))


def stacked_bar(shares: Mapping[str, float], *, title: str, form: Format, colors: Sequence[int]) -> Chart:
    """One horizontal bar of the full width. Each part is as wide as its share, and its name has its value."""
    total = sum(shares.values()) or 1.0
    width, height = 640, 26
    rect = Markup('<rect class="f{}" x="{:.1f}" y="0" width="{:.1f}" height="{}"><title>{}</title></rect>')
    labels = [f"{name} {form(value)}" for name, value in shares.items()]
    parts, x = [], 0.0
    for value, label, color in zip(shares.values(), labels, itertools.cycle(colors)):
        parts.append(rect.format(color, x, width * value / total, height, label))
        x += width * value / total
    svg = _svg(title, ", ".join(labels), parts, width=width, height=height, css="bar")
    return Chart(title=title, svg=svg, legend=_legend(labels, colors))


def _legend(names: Iterable[str], colors: Sequence[int] = range(_NUM_COLORS)) -> list[tuple[str, str]]:
    return [(f"b{color}", name) for name, color in zip(names, itertools.cycle(colors))]


def _line(points: Sequence[tuple[float, float]], color: int, *, dashed: bool = False) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    css = " dashed" if dashed else ""
    return Markup('<polyline class="l{}{}" points="{}"/>').format(color % _NUM_COLORS, css, path)


def _point(frame: _Frame, p: Point, s: Series, tip: str) -> list[Markup]:
    x, y, color = frame.x(p.x + 0.5), frame.y(p.value), s.color
    parts = []
    if p.low is not None and p.high is not None:
        whisker = Markup('<path class="l{} whisker" d="M{:.1f} {:.1f}V{:.1f}M{:.1f} {:.1f}h8M{:.1f} {:.1f}h8"/>')
        low, high = frame.y(p.low), frame.y(p.high)
        parts.append(whisker.format(color, x, low, high, x - 4, low, x - 4, high))
    dot = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>')
    parts.append(dot.format(f"l{color} hollow" if s.dashed else f"f{color}", x, y, 4, tip))
    return parts


def _with_interval(p: Point, form: Format) -> str:
    if p.low is None or p.high is None:
        return form(p.value)
    return f"{form(p.value)} [{form(p.low)}, {form(p.high)}]"


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _svg(
    title: str, described: str, parts: Sequence[Markup], *, width: int = WIDTH, height: int = HEIGHT, css: str = "chart"
) -> Markup:
    open_tag = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}"{}>').format(
        css, width, height, f"{title}. {described}", Markup(' preserveAspectRatio="none"') if css == "bar" else ""
    )
    return open_tag + Markup("").join(parts) + Markup("</svg>")
