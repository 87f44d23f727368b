"""The loss curve as an image, for pages that show no more than images."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.report.figures import ACCENT, GRID, INK, MUTED, SECOND

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 720, 320, 56, 40, 16
_MOST_POINTS = 400
_TICKS = 4

Point = tuple[float, float]


def loss_image(metrics: Sequence[Mapping[str, Any]], steps: int) -> str | None:
    """Training and validation loss over the run's steps, as an SVG in a data URL; None before the first step.

    Args:
        metrics: rows of metrics.jsonl.
        steps: of the whole run, which the axis shows.
    """
    training, validation = _points(metrics, "train/loss"), _points(metrics, "validation/loss")
    if not training:
        return None
    values = [loss for _, loss in training + validation]
    low, high = min(values), max(values)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)

    def place(point: Point) -> Point:
        step, loss = point
        x = _LEFT + step / steps * (_WIDTH - _LEFT - _EDGE)
        return x, _EDGE + (high - loss) / (high - low) * (_HEIGHT - _BOTTOM - _EDGE)

    parts = [_axes(low, high, steps, place)]
    parts.append(_line([place(point) for point in training], ACCENT))
    parts.append(_line([place(point) for point in validation], SECOND))
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{SECOND}"/>' for x, y in map(place, validation)]
    parts.append(_text(_WIDTH - _EDGE, _EDGE + 12, "training", ACCENT, "end"))
    parts.append(_text(_WIDTH - _EDGE, _EDGE + 30, "validation", SECOND, "end"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif">'
    svg = f'{head}<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """As many as the eye tells apart, the last one among them."""
    found = [(float(row["step"]), float(row[key])) for row in metrics if row.get(key) is not None]
    found = [(step, loss) for step, loss in found if abs(loss) < float("inf")]
    every = len(found) // _MOST_POINTS + 1
    return [*found[:-1:every], *found[-1:]]


def _axes(low: float, high: float, steps: int, place: Any) -> str:
    parts = []
    for tick in range(_TICKS + 1):
        loss, step = low + tick / _TICKS * (high - low), tick / _TICKS * steps
        x, y = place((step, loss))
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _EDGE}" stroke="{GRID}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{loss:.2f}", MUTED, "end"))
        parts.append(_text(x, _HEIGHT - _BOTTOM + 18, f"{step:,.0f}", MUTED, "end" if tick == _TICKS else "middle"))
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 6, "step; loss in nats per token", INK, "middle"))
    return "".join(parts)


def _line(points: Sequence[Point], colour: str) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.8"/>'


def _text(x: float, y: float, text: str, colour: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="{colour}" text-anchor="{anchor}">{text}</text>'
