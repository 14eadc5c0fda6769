"""Charts as inline SVG: lines with intervals, curves, histograms, stacked bars. They need no library and no script.

Colors are CSS classes (`l0`, `f0`, ...), so that one page suits dark and light screens. Labels are escaped, so they may
be any text. Each function returns a whole `<svg>` with a description for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 28
_MAX_POINTS = 400
_MIN_SHARE_OF_SCALE = 0.25


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value at the x label with number `x`. `low` and `high` are its 95% interval, if there is one."""

    x: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart. A dashed line is a reference, such as the paper's figures."""

    name: str
    points: Sequence[Point]
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a stacked bar."""

    name: str
    value: float
    color: int


@dataclass(frozen=True)
class _Frame:
    """Maps data to pixels."""

    x_max: float
    y_min: float
    y_max: float

    def x(self, value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * value / (self.x_max or 1)

    def y(self, value: float) -> float:
        span = (self.y_max - self.y_min) or 1
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - self.y_min) / span


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
    series: Sequence[Series],
    x_labels: Sequence[str],
    *,
    title: str,
    form: Callable[[float], str],
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Markup:
    """Values by label, joined by lines, with bars for the intervals.

    `form` turns a value into text, also on the axis. No value can be outside of `limits`, so the axis ends there.
    """
    values = [v for s in series for p in s.points for v in (p.value, p.low, p.high) if v is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    # A change that is small on the whole scale must not look large, so the axis shows at least a part of the scale.
    spare = (_MIN_SHARE_OF_SCALE * (limits[1] - limits[0]) - (high - low)) / 2
    if math.isfinite(spare) and spare > 0:
        low, high = max(limits[0], low - spare), min(limits[1], high + spare)
    marks = [m for m in ticks(low, high) if limits[0] <= m <= limits[1]]
    frame = _Frame(len(x_labels), marks[0], marks[-1])
    parts = [_y_axis(frame, marks, form)]
    parts += [_text(frame.x(i + 0.5), HEIGHT - 9, label, "middle") for i, label in enumerate(x_labels)]
    for s in series:
        parts.append(_line([(frame.x(p.x + 0.5), frame.y(p.value)) for p in s.points], s))
        for p in s.points:
            parts += _point(frame, p, s, f"{s.name}, {x_labels[p.x]}: {_with_interval(p, form)}")
    described = "; ".join(f"{s.name}: " + ", ".join(_with_interval(p, form) for p in s.points) for s in series)
    return _svg(title, described, parts)


def curve_chart(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]], *, title: str) -> Markup:
    """Named curves over steps. Long curves lose points that nobody could see."""
    finite = [(name, [p for p in points if math.isfinite(p[1])]) for name, points in curves]
    values = [y for _, points in finite for _, y in points]
    marks = ticks(min(values), max(values)) if values else [0.0, 1.0]
    x_max = max((x for _, points in finite for x, _ in points), default=1.0)
    frame = _Frame(x_max, marks[0], marks[-1])
    parts = [_y_axis(frame, marks, lambda v: f"{v:g}")]
    x_marks = [x for x in ticks(0, x_max, count=4) if x <= x_max]
    parts += [_text(frame.x(x), HEIGHT - 9, f"{x:g}", "middle") for x in x_marks]
    for i, (name, points) in enumerate(finite):
        thinned = points[:: max(1, len(points) // _MAX_POINTS)]
        series = Series(name=name, points=(), color=i)
        parts.append(_line([(frame.x(x), frame.y(y)) for x, y in thinned], series))
    described = "; ".join(f"{name}: {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in finite if points)
    return _svg(title, described, parts)


def bar_chart(groups: Sequence[tuple[str, Sequence[float]]], x_labels: Sequence[str], *, title: str) -> Markup:
    """Histograms to compare: shares (0 to 1) by label, with one bar for each group."""
    marks = ticks(0, max((v for _, values in groups for v in values), default=1.0) or 1.0)
    frame = _Frame(len(x_labels), 0, marks[-1])
    parts = [_y_axis(frame, marks, lambda v: f"{100 * v:.3g}%")]
    parts += [_text(frame.x(i + 0.5), HEIGHT - 9, label, "middle") for i, label in enumerate(x_labels)]
    width = 0.84 / max(1, len(groups))
    for g, (name, values) in enumerate(groups):
        for i, value in enumerate(values):
            left, right = frame.x(i + 0.08 + g * width), frame.x(i + 0.08 + (g + 1) * width)
            bar = Markup(
                '<rect class="f{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
            )
            tip = f"{name}, {x_labels[i]}: {value:.1%}"
            parts.append(
                bar.format(g % 6, left, frame.y(value), max(1, right - left - 1), frame.y(0) - frame.y(value), tip)
            )
    described = "; ".join(f"{name}: " + ", ".join(f"{v:.0%}" for v in values) for name, values in groups)
    return _svg(title, described, parts)


def stacked_bar(segments: Sequence[Segment], *, title: str) -> Markup:
    """One horizontal bar of the full width. Each part is as wide as its share."""
    total = sum(s.value for s in segments) or 1.0
    width, height = 640, 26
    parts, x = [], 0.0
    for s in segments:
        w = width * s.value / total
        rect = Markup('<rect class="f{}" x="{:.1f}" y="0" width="{:.1f}" height="{}"><title>{}</title></rect>')
        parts.append(rect.format(s.color, x, w, height, f"{s.name}: {s.value:.0f}"))
        x += w
    described = ", ".join(f"{s.name} {s.value:.0f}" for s in segments)
    return _svg(title, described, parts, width=width, height=height, css="bar")


def _y_axis(frame: _Frame, marks: Sequence[float], form: Callable[[float], str]) -> Markup:
    parts = []
    for mark in marks:
        y = frame.y(mark)
        line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        parts += [line.format(_LEFT, WIDTH - _RIGHT, y, y), _text(_LEFT - 6, y + 4, form(mark), "end")]
    return Markup("").join(parts)


def _line(points: Sequence[tuple[float, float]], s: Series) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline class="l{}{}" points="{}"/>').format(s.color % 6, " dashed" if s.dashed else "", path)


def _point(frame: _Frame, p: Point, s: Series, tip: str) -> list[Markup]:
    x, y, color = frame.x(p.x + 0.5), frame.y(p.value), s.color % 6
    parts = []
    if p.low is not None and p.high is not None:
        whisker = Markup('<path class="l{} whisker" d="M{:.1f} {:.1f}V{:.1f}M{:.1f} {:.1f}h8M{:.1f} {:.1f}h8"/>')
        low, high = frame.y(p.low), frame.y(p.high)
        parts.append(whisker.format(color, x, low, high, x - 4, low, x - 4, high))
    dot = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>')
    parts.append(dot.format(f"l{color} hollow" if s.dashed else f"f{color}", x, y, 4, tip))
    return parts


def _with_interval(p: Point, form: Callable[[float], str]) -> str:
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
