"""Small charts as SVG: lines and steps, horizontal bars with whiskers, points.

Why not matplotlib: its SVG fixes colours when it is drawn, so one file cannot follow the reader's light or
dark scheme; it names its own fonts; and it weighs more than the rest of the workbench. These charts carry CSS
classes only (`s0` … `s7` for the runs, `axis`, `grid`, `label`), about 5 kB each; every mark has a tooltip.
All text is escaped here, whoever wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH, HEIGHT = 560, 300
STYLES = 8  # colours and dashes of runs; then they repeat
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 12, 46
_MAX_POINTS = 400
_CHAR = 6.6  # pixels of a character of 12 px text, roughly


@dataclass(frozen=True)
class Axis:
    """One axis. `show` writes a tick's value; `log` needs values above zero."""

    title: str
    show: Callable[[float], str] = field(default=lambda value: f"{value:g}")
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False  # only whole numbers mean something


@dataclass(frozen=True)
class Series:
    """Points of one run; `style` chooses colour and dash. `tip` is the tooltip."""

    label: str
    style: int
    points: Sequence[tuple[float, float]]
    tip: str = ""


@dataclass(frozen=True)
class Bar:
    """One horizontal bar with an optional whisker; `text` stands behind it."""

    label: str
    style: int
    value: float
    low: float | None = None
    high: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Dot:
    """One point of a scatter plot with an optional cross of intervals."""

    label: str
    style: int
    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(max(each, 1e-12)) for each in (value, low, high))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, -0.02), 1.02) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers within [low, high], about `count` of them; `whole`: whole ones only."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = max((high - low) / max(count, 1), 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(factor * power for factor in factors if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within [low, high]; powers alone over many decades."""
    decades = math.log10(high / low)
    factors = (1,) if decades > 3 else (1, 2, 5)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found = [f * 10.0**e for e in range(first, last + 1) for f in factors]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def line_chart(
    series: Sequence[Series], x: Axis, y: Axis, *, steps: bool = False, fill: bool = False
) -> Markup:
    """Lines, or steps (a distribution's). `fill` shades the area under a single line."""
    points = [point for each in series for point in each.points]
    xs, ys = _scales(points, x, y)
    marks = []
    for each in series:
        if not each.points:
            continue
        path = _path(thinned(each.points), xs, ys, steps)
        if fill:
            base = ys.start
            first, last = xs(each.points[0][0]), xs(each.points[-1][0])
            marks.append(
                Markup('<path class="area s{}" d="{}L{:.1f} {:.1f}L{:.1f} {:.1f}Z"/>').format(
                    each.style % STYLES, Markup(path), last, base, first, base
                )
            )
        marks.append(
            Markup('<path class="line s{}" d="{}"><title>{}</title></path>').format(
                each.style % STYLES, Markup(path), each.tip or each.label
            )
        )
    return _frame(xs, ys, x, y, marks, _describe(series, x, y))


def marked_lines(series: Sequence[Series], x: Axis, y: Axis) -> Markup:
    """Lines with a dot and a tooltip at every point; for few points."""
    points = [point for each in series for point in each.points]
    xs, ys = _scales(points, x, y)
    marks = []
    for each in series:
        if not each.points:
            continue
        style = each.style % STYLES
        path = Markup(_path(each.points, xs, ys, steps=False))
        marks.append(Markup('<path class="line s{}" d="{}"/>').format(style, path))
        for px, py in each.points:
            tip = f"{each.label}: {y.show(py)} at {x.show(px)}"
            marks.append(_circle(style, xs(px), ys(py), 3.5, tip))
    return _frame(xs, ys, x, y, marks, _describe(series, x, y))


def scatter(dots: Sequence[Dot], x: Axis, y: Axis) -> Markup:
    """Points with their names beside them."""
    spread = [(dot.x, dot.y) for dot in dots]
    spread += [(value, dot.y) for dot in dots for value in dot.x_range or ()]
    spread += [(dot.x, value) for dot in dots for value in dot.y_range or ()]
    xs, ys = _scales(spread, x, y)
    marks = []
    for dot in dots:
        px, py, style = xs(dot.x), ys(dot.y), dot.style % STYLES
        if dot.x_range:
            marks.append(_whisker(style, xs(dot.x_range[0]), py, xs(dot.x_range[1]), py))
        if dot.y_range:
            marks.append(_whisker(style, px, ys(dot.y_range[0]), px, ys(dot.y_range[1])))
        marks.append(_circle(style, px, py, 6, f"{dot.label}: {x.show(dot.x)}, {y.show(dot.y)}"))
        to_left = px + 10 + len(dot.label) * _CHAR > WIDTH - _RIGHT
        marks.append(
            Markup('<text class="label" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
                px - 10 if to_left else px + 10, py - 8, "end" if to_left else "start", dot.label
            )
        )
    return _frame(xs, ys, x, y, marks, f"{len(dots)} points: {y.title} against {x.title}")


def bar_chart(bars: Sequence[Bar], x: Axis) -> Markup:
    """Horizontal bars from zero, one below the other, with whiskers where there is an interval."""
    row, top = 44, 8
    height = top + row * len(bars) + 34
    ends = [bar.high if bar.high is not None else bar.value for bar in bars]
    texts = max((len(bar.text) for bar in bars), default=0) * _CHAR + 18
    high = max([*ends, 1e-9]) if x.high is None else x.high
    scale = _Scale(0.0, high, 8, max(WIDTH - texts, WIDTH * 0.4), False)
    parts = [_open(height, f"{x.title}: " + ", ".join(f"{bar.label} {bar.text}" for bar in bars))]
    bottom = top + row * len(bars)
    for tick in ticks(0, high):
        px = scale(tick)
        parts.append(Markup('<path class="grid" d="M{:.1f} {}V{}"/>').format(px, top, bottom))
        parts.append(_text(px, bottom + 16, x.show(tick), "middle", "tick"))
    parts.append(_text((scale.start + scale.end) / 2, bottom + 31, x.title, "middle", "title"))
    for number, bar in enumerate(bars):
        y, style = top + row * number, bar.style % STYLES
        width = max(scale(bar.value) - scale.start, 1.5)
        parts.append(_text(scale.start, y + 13, bar.label, "start", "label"))
        shape = Markup('<rect class="bar s{}" x="{}" y="{}" width="{:.1f}" height="18" rx="3">')
        parts.append(shape.format(style, scale.start, y + 19, width))
        parts.append(Markup("<title>{}: {}</title></rect>").format(bar.label, bar.text))
        end = scale(bar.value)
        if bar.low is not None and bar.high is not None:
            parts.append(_whisker(style, scale(max(bar.low, 0.0)), y + 28, scale(bar.high), y + 28))
            end = max(end, scale(bar.high))
        parts.append(_text(end + 8, y + 32, bar.text, "start", "value"))
    parts.append(Markup("</svg>"))
    return Markup("\n").join(parts)


def sketch(style: int) -> Markup:
    """The sample of a run's colour and dash in a legend."""
    return Markup(
        '<svg class="key" viewBox="0 0 26 10" aria-hidden="true"><path class="line s{}" d="M1 5H25"/></svg>'
    ).format(style % STYLES)


# ---------------------------------------------------------------------- inside


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most some hundred points: of each group the first, lowest and highest, so that no spike is lost."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (_MAX_POINTS // 3))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        group = range(start, min(start + size, len(points)))
        low, high = min(group, key=lambda i: points[i][1]), max(group, key=lambda i: points[i][1])
        kept += [points[i] for i in sorted({start, low, high})]
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def _path(points: Sequence[tuple[float, float]], xs: _Scale, ys: _Scale, steps: bool) -> str:
    parts = []
    for number, (x, y) in enumerate(points):
        px, py = xs(x), ys(y)
        if number == 0:
            parts.append(f"M{px:.1f} {py:.1f}")
        elif steps:
            parts.append(f"H{px:.1f}V{py:.1f}")
        else:
            parts.append(f"L{px:.1f} {py:.1f}")
    return "".join(parts)


def _scales(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> tuple[_Scale, _Scale]:
    found = []
    ends = ((_LEFT, WIDTH - _RIGHT), (HEIGHT - _BOTTOM, _TOP))
    for number, (axis, (start, end)) in enumerate(zip((x, y), ends, strict=True)):
        values = [point[number] for point in points] or [0.0, 1.0]
        low = min(values) if axis.low is None else axis.low
        high = max(values) if axis.high is None else axis.high
        if axis.log:
            low, high = max(low, 1e-9), max(high, 1e-9)
            if high <= low:
                low, high = low / 2, high * 2
        elif high <= low:
            pad = abs(high) * 0.1 or 1.0
            low, high = (low, high + pad) if axis.low is not None else (low - pad, high + pad)
        elif axis.high is None:
            high += (high - low) * 0.04
        found.append(_Scale(low, high, start, end, axis.log))
    return found[0], found[1]


def _frame(xs: _Scale, ys: _Scale, x: Axis, y: Axis, marks: Sequence[Markup], alt: str) -> Markup:
    parts = [_open(HEIGHT, alt)]
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    shown = -math.inf
    for tick in log_ticks(xs.low, xs.high) if xs.log else ticks(xs.low, xs.high, 6, whole=x.whole):
        px, text = xs(tick), x.show(tick)
        parts.append(Markup('<path class="grid" d="M{:.1f} {}V{}"/>').format(px, _TOP, bottom))
        if px - len(text) * _CHAR / 2 > shown:
            parts.append(_text(px, bottom + 17, text, "middle", "tick"))
            shown = px + len(text) * _CHAR / 2 + 6
    for tick in log_ticks(ys.low, ys.high) if ys.log else ticks(ys.low, ys.high, 5):
        py = ys(tick)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(_LEFT, py, right))
        parts.append(_text(_LEFT - 7, py + 4, y.show(tick), "end", "tick"))
    parts.append(Markup('<path class="axis" d="M{} {}V{}H{}"/>').format(_LEFT, _TOP, bottom, right))
    parts.append(_text((_LEFT + right) / 2, HEIGHT - 7, x.title, "middle", "title"))
    middle = (_TOP + bottom) / 2
    turned = Markup('<text class="title" text-anchor="middle" transform="translate(12 {:.1f}) rotate(-90)">')
    parts.append(turned.format(middle) + Markup("{}</text>").format(y.title))
    parts += marks
    parts.append(Markup("</svg>"))
    return Markup("\n").join(parts)


def _open(height: float, alt: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        WIDTH, height, alt
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, text
    )


def _circle(style: int, x: float, y: float, radius: float, tip: str) -> Markup:
    return Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>').format(
        style, x, y, radius, tip
    )


def _whisker(style: int, x1: float, y1: float, x2: float, y2: float) -> Markup:
    """A thin line with small ends."""
    if y1 == y2:
        caps = f"M{x1:.1f} {y1 - 5:.1f}V{y1 + 5:.1f}M{x2:.1f} {y1 - 5:.1f}V{y1 + 5:.1f}"
    else:
        caps = f"M{x1 - 5:.1f} {y1:.1f}H{x1 + 5:.1f}M{x1 - 5:.1f} {y2:.1f}H{x1 + 5:.1f}"
    return Markup('<path class="whisker s{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}{}"/>').format(
        style, x1, y1, x2, y2, caps
    )


def _describe(series: Sequence[Series], x: Axis, y: Axis) -> str:
    return f"{y.title} against {x.title}; " + ", ".join(each.label for each in series)
