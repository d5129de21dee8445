"""Curves as SVG: a panel for each, both axes logarithmic."""

import math
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

from scripts.benchmarks.curves import Point

_WIDTH, _HEIGHT = 360, 300
_LEFT, _TOP, _RIGHT, _BOTTOM = 56, 40, 16, 76
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def svg_of(points: Sequence[Point]) -> str:
    """One image of all curves; flat lines are what is wanted."""
    curves = list(dict.fromkeys(point.curve for point in points))
    panels = [
        f'<g transform="translate({number * _WIDTH} 0)">'
        + "".join(_panel(curve, [each for each in points if each.curve == curve]))
        + "</g>"
        for number, curve in enumerate(curves)
    ]
    width = _WIDTH * max(1, len(curves))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" '
        f'viewBox="0 0 {width} {_HEIGHT}" font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{_HEIGHT}" fill="white"/>'
        + "".join(panels)
        + "</svg>\n"
    )


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten around `values`, at least one apart."""
    found = sorted(values)
    low, high = math.floor(math.log10(found[0])), math.ceil(math.log10(found[-1]))
    return low, max(high, low + 1)


def _panel(curve: str, points: Sequence[Point]) -> Iterable[str]:
    x_low, x_high = _decades(point.x for point in points)
    y_low, y_high = _decades(point.microseconds for point in points)

    def across(x: float) -> float:
        share = (math.log10(x) - x_low) / (x_high - x_low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        share = (math.log10(y) - y_low) / (y_high - y_low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    title = f"microseconds an operation, over {curve}"
    yield _text(_WIDTH / 2, 20, title, "middle")
    for power in range(x_low, x_high + 1):
        x = across(10**power)
        yield _line(x, down(10**y_low), x, down(10**y_high))
        yield _text(x, _HEIGHT - _BOTTOM + 16, f"{10**power:,}", "middle")
    for power in range(y_low, y_high + 1):
        y = down(10**power)
        yield _line(across(10**x_low), y, across(10**x_high), y)
        yield _text(_LEFT - 6, y + 4, f"{10**power:,g}", "end")
    for number, line in enumerate(dict.fromkeys(point.line for point in points)):
        colour = _COLOURS[number % len(_COLOURS)]
        own = [
            (across(point.x), down(point.microseconds))
            for point in points
            if point.line == line
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in own)
        yield (
            f'<polyline points="{path}" fill="none" stroke="{colour}" '
            'stroke-width="2"/>'
        )
        for x, y in own:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        at = _LEFT + number * 90
        yield (
            f'<rect x="{at}" y="{_HEIGHT - 36}" width="14" height="4" fill="{colour}"/>'
        )
        yield _text(at + 20, _HEIGHT - 29, line, "start")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'
    )
