"""Charts as inline SVG: colours from the page's CSS, a title and a description for those who cannot see them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

# Drawn at phone size, so that 12 px stay 12 px there; on a wide screen two stand side by side.
WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 8, 38
MAX_POINTS = 400
COLOURS = 6

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart: its name in the legend and its (x, y). A `faint` one lies behind the others."""

    name: str
    points: Points
    faint: bool = False


def line_chart(title: str, lines: Sequence[Series], *, x_label: str = "step", y_label: str = "") -> Markup:
    """A figure with one line a series; points that are not finite are left out. Empty when no point is left."""
    drawn = [Series(line.name, thin(finite(line.points)), line.faint) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return Markup("")
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 4), ticks(min(ys), max(ys), 4)
    (x0, x1), (y0, y1) = _span(xs, [xs[0]]), _span(ys, y_ticks)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y)
             for y in (place(x0, tick)[1] for tick in y_ticks)]  # fmt: skip
    parts += [_text(LEFT - 6, place(x0, tick)[1] + 4, short(tick), "end") for tick in y_ticks]
    parts += [
        _text(place(tick, y0)[0], HEIGHT - BOTTOM + 16, short(tick), "middle") for tick in x_ticks if x0 <= tick <= x1
    ]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    for number, line in enumerate(drawn):
        style = f"c{number % COLOURS}" + (" faint" if line.faint else "")
        at = [place(x, y) for x, y in line.points]
        if len(at) == 1:
            parts.append(Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(style, *at[0]))
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            parts.append(Markup('<polyline class="{}" points="{}"/>').format(style, path))
    described = "; ".join(_describe(line) for line in drawn if not line.faint or len(drawn) == 1)
    return _figure(
        title, f"{y_label or title} over {x_label}. {described}", HEIGHT, parts, [line.name for line in drawn]
    )


def bar_chart(title: str, bars: Mapping[str, float], *, unit: str = "") -> Markup:
    """A figure with one horizontal bar an entry and its number beside it. Empty without entries."""
    if not bars:
        return Markup("")
    row, most = 26, max(bars.values()) or 1.0
    left = min(150, 14 + 7 * max(len(name) for name in bars))
    parts: list[Markup] = []
    for number, (name, value) in enumerate(bars.items()):
        y = 6 + number * row
        length = max(1.0, value / most * (WIDTH - left - 64))
        parts.append(_text(left - 6, y + 14, name, "end"))
        parts.append(
            Markup('<rect class="c0" x="{}" y="{}" width="{:.1f}" height="18" rx="2"/>').format(left, y, length)
        )
        parts.append(_text(left + length + 6, y + 14, short(value), "start"))
    described = ", ".join(f"{name}: {short(value)}{unit and ' ' + unit}" for name, value in bars.items())
    return _figure(title, described, 12 + row * len(bars), parts, [])


def finite(points: Points) -> list[tuple[float, float]]:
    """The points of which both numbers are finite."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thin(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of those that it stands for; the last one stays as it is."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * (len(points) - 1) / (most - 1)) for i in range(most)]
    parts = [points[first:end] for first, end in zip(edges, edges[1:], strict=False)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts if part]
    return [*means, points[-1]]


def smooth(points: Points, window: int | None = None) -> list[tuple[float, float]]:
    """Exponential mean over about `window` points (a 25th of all, at least 10), corrected for its start."""
    kept = finite(points)
    weight = 1 - 1 / (window or max(10, len(kept) // 25))
    mean = norm = 0.0
    smoothed: list[tuple[float, float]] = []
    for x, y in kept:
        mean, norm = weight * mean + (1 - weight) * y, weight * norm + (1 - weight)
        smoothed.append((x, mean / norm))
    return smoothed


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover `low` to `high`, about as many as asked for."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number as people write it: at most four digits, thousands as k and M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    return f"{value:.4g}"


def _span(values: Sequence[float], more: Sequence[float]) -> tuple[float, float]:
    low, high = min(*values, *more), max(*values, *more)
    if high > low:
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _describe(line: Series) -> str:
    low = min(y for _, y in line.points)
    return f"{line.name}: first {short(line.points[0][1])}, last {short(line.points[-1][1])}, lowest {short(low)}"


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _figure(title: str, description: str, height: float, parts: Sequence[Markup], legend: Sequence[str]) -> Markup:
    keys = [
        Markup('<span class="key"><i class="c{}"></i>{}</span>').format(number % COLOURS, name)
        for number, name in enumerate(legend)
        if len(legend) > 1
    ]
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        WIDTH, height, f"{title}. {description}"
    )
    return Markup("\n").join(
        [
            Markup("<figure>"),
            Markup("<figcaption>{} {}</figcaption>").format(title, Markup(" ").join(keys)),
            head + Markup("<title>") + escape(title) + Markup("</title>"),
            *parts,
            Markup("</svg></figure>"),
        ]
    )
