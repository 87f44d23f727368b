"""The report's charts, as HTML fragments that need plotly.js on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK, MUTED, GRID, ACCENT, SECOND = "#1f2733", "#667085", "#e6e9ef", "#3b5bdb", "#e8590c"
SOURCE_COLOURS = ("#3b5bdb", "#e8590c", "#0f9d77", "#c2255c", "#7048b6", "#8d6e2f", "#1c8db0", "#5c677d")
"""Told apart by people with colour-blindness too, and dark enough for text on white."""
_FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_LOG_ABOVE = 5.0
"""Ratio of the largest to the smallest value above which an axis is logarithmic."""

_PHASES = {"forward_backward": ACCENT, "reduce": "#0f9d77", "optimizer": SECOND, "logging": "#5c677d"}

Rows = Sequence[Mapping[str, Any]]


def source_colours(names: Sequence[str]) -> dict[str, str]:
    """The colour of each source, the same in every chart and table."""
    return {name: SOURCE_COLOURS[index % len(SOURCE_COLOURS)] for index, name in enumerate(names)}


def loss_figure(metrics: Rows) -> str | None:
    """Training and validation loss over steps; None without either."""
    train, validation = _series(metrics, "train/loss"), _series(metrics, "validation/loss")
    if not train and not validation:
        return None
    figure = _figure(height=360)
    if train:
        figure.add_scatter(**_points(train), name="training", mode="lines", line={"color": ACCENT, "width": 1.8})
    if validation:
        style = {"color": SECOND, "width": 2, "dash": "dot"}
        figure.add_scatter(
            **_points(validation), name="validation", mode="lines+markers", line=style, marker={"size": 8}
        )
    return _html(figure, "loss", "step", "loss, nats per token")


def metric_figure(metrics: Rows, key: str, label: str, number_format: str = ".4~g") -> str | None:
    """One training metric over steps; None if no line has it."""
    series = _series(metrics, key)
    if not series:
        return None
    figure = _figure(height=230)
    figure.add_scatter(**_points(series), name=label, mode="lines", line={"color": ACCENT, "width": 1.6})
    figure.update_yaxes(rangemode="tozero", hoverformat=number_format)
    return _html(figure, key.replace("/", "-"), "step", label)


def source_loss_figure(metrics: Rows, colours: Mapping[str, str]) -> str | None:
    """Training loss of each source over steps; None where it was not recorded."""
    series = {name: _series(metrics, f"loss/{name}") for name in colours}
    lines = {name: (points, colours[name]) for name, points in series.items() if points}
    return _lines_figure("source-loss", lines, "loss, nats per token")


def gradient_norm_figure(metrics: Rows) -> str | None:
    """Gradient norm of each group of layers over steps, from the embedding (blue) to the head; None without any."""
    groups = _measured(metrics, "gradient_norm/")
    shades = dict(zip(groups, _shades(len(groups)), strict=True))
    lines = {name.replace("_", " "): (_series(metrics, f"gradient_norm/{name}"), shades[name]) for name in groups}
    return _lines_figure("gradient-norms", lines, "gradient norm", logarithmic=True)


def time_figure(metrics: Rows) -> str | None:
    """Seconds of a step by phase, stacked, and the wait for data within; None without any."""
    phases = [(name, colour) for name, colour in _PHASES.items() if _series(metrics, f"time/{name}")]
    if not phases:
        return None
    figure = _figure(height=300)
    for name, colour in phases:
        points, line = _points(_series(metrics, f"time/{name}")), {"color": colour, "width": 1.2}
        figure.add_scatter(**points, name=name.replace("_", " and "), mode="lines", line=line, stackgroup="all")
    if waits := _series(metrics, "time/data_wait"):
        line = {"color": INK, "width": 1.6, "dash": "dot"}
        figure.add_scatter(**_points(waits), name="wait for data (longest of all ranks)", mode="lines", line=line)
    figure.update_yaxes(hoverformat=".3~s")
    return _html(figure, "time", "step", "seconds per step")


def _lines_figure(
    name: str, lines: Mapping[str, tuple[list[tuple[int, float]], str]], label: str, logarithmic: bool = False
) -> str | None:
    if not lines:
        return None
    figure = _figure(height=340)
    for title, (series, colour) in lines.items():
        figure.add_scatter(**_points(series), name=title, mode="lines", line={"color": colour, "width": 1.6})
    figure.update_yaxes(hoverformat=".4~g", type="log" if logarithmic else "linear")
    return _html(figure, name, "step", label)


def _measured(metrics: Rows, prefix: str) -> list[str]:
    """Names under a prefix, in the order in which they were logged."""
    return list(dict.fromkeys(key.removeprefix(prefix) for row in metrics for key in row if key.startswith(prefix)))


def _shades(count: int) -> list[str]:
    """Colours from blue to orange, as many as things that have an order."""
    return [f"hsl({round(225 + 160 * i / max(1, count - 1)) % 360}, 65%, 48%)" for i in range(count)]


def evaluation_figure(evaluations: Rows, measure: str, label: str, colours: Mapping[str, str]) -> str | None:
    """A measure of each source over checkpoints; None without evaluations.

    Args:
        measure: 'perplexity' or 'bits_per_byte'.
    """
    figure = _figure(height=340)
    values: list[float] = []
    for name, colour in colours.items():
        series = [(e["step"], e["sources"][name][measure]) for e in evaluations if name in e["sources"]]
        if series:
            values += [value for _, value in series]
            figure.add_scatter(**_points(series), name=name, mode="lines+markers", line={"color": colour, "width": 2.2})
    if not values:
        return None
    if min(values) > 0 and max(values) / min(values) > _LOG_ABOVE:
        ticks = [digit * 10**power for power in range(-3, 7) for digit in (1, 2, 5)]
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks])
    return _html(figure, measure.replace("_", "-"), "step of the checkpoint", label)


def interval_figure(points: Sequence[tuple[int, Mapping[str, float]]], name: str, label: str) -> str | None:
    """A score over checkpoints, each with its interval; None without scores."""
    if not points:
        return None
    figure = _figure(height=300)
    values = [score["value"] for _, score in points]
    bars = {
        "array": [score.get("high", score["value"]) - score["value"] for _, score in points],
        "arrayminus": [score["value"] - score.get("low", score["value"]) for _, score in points],
        "symmetric": False,
    }
    line = {"color": ACCENT, "width": 2.2}
    series = _points([(step, value) for (step, _), value in zip(points, values, strict=True)])
    figure.add_scatter(**series, name=name, mode="lines+markers", line=line, error_y=bars)
    return _html(figure, name.replace(" ", "-").replace(":", ""), "step of the checkpoint", label)


def mixture_figure(run: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> str | None:
    """Share of training sequences and epochs, per source; None without a ledger."""
    if not run:
        return None
    from plotly.subplots import make_subplots

    names = list(run)[::-1]  # plotly draws the first bar at the bottom
    titles = ("share of training sequences, %", "epochs in this run")
    figure = make_subplots(rows=2, cols=1, vertical_spacing=0.16)  # side by side, phones would have them overlap
    shares, epochs = [100 * run[name]["share"] for name in names], [run[name]["epochs"] for name in names]
    for row, (values, text, title) in enumerate(
        zip((shares, epochs), ("%{x:.1f}%", "%{x:.3~g}"), titles, strict=True), 1
    ):
        bars = {"x": values, "y": names, "orientation": "h", "texttemplate": text, "textposition": "outside"}
        figure.add_bar(**bars, marker_color=[colours[name] for name in names], cliponaxis=False, row=row, col=1)
        figure.update_xaxes(range=[0, 1.22 * max(values, default=1) or 1], title_text=title, row=row, col=1)
    _style(figure, height=160 + 64 * len(names))
    figure.update_layout(showlegend=False, hovermode="closest", bargap=0.35)
    figure.update_yaxes(gridcolor="rgba(0,0,0,0)")
    return _html(figure, "mixture")


def consumed_figure(history: Rows, colours: Mapping[str, str]) -> str | None:
    """Tokens consumed of each source by checkpoint, stacked; None without any. A change of weights is a bend."""
    if not history:
        return None
    figure = _figure(height=300)
    steps = [0, *(entry["step"] for entry in history)]
    for name, colour in colours.items():
        tokens = [0, *(entry["sources"].get(name, {}).get("tokens", 0) for entry in history)]
        if any(tokens):
            line = {"color": colour, "width": 1.2}
            figure.add_scatter(x=steps, y=tokens, name=name, mode="lines", line=line, stackgroup="all")
    figure.update_yaxes(hoverformat=",d")
    return _html(figure, "consumed", "step of the checkpoint", "tokens consumed")


def _series(metrics: Rows, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in metrics if row.get(key) is not None]


def _points(series: Sequence[tuple[int, float]]) -> dict[str, list[Any]]:
    return {"x": [step for step, _ in series], "y": [value for _, value in series]}


def _figure(height: int) -> Figure:
    from plotly.graph_objects import Figure

    figure = Figure()
    _style(figure, height)
    return figure


def _style(figure: Figure, height: int) -> None:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 64, "r": 20, "t": 16, "b": 48},
        font={"family": _FONT, "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="x unified",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        hoverlabel={"font": {"family": _FONT}},
    )
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "tickfont": {"color": MUTED}, "automargin": True}
    figure.update_xaxes(**axis, title_font={"color": MUTED, "size": 12}, title_standoff=8)
    figure.update_yaxes(**axis, title_font={"color": MUTED, "size": 12}, title_standoff=8)


def _html(figure: Figure, name: str, x_title: str | None = None, y_title: str | None = None) -> str:
    if x_title:
        figure.update_xaxes(title_text=x_title)
    if y_title:
        figure.update_yaxes(title_text=y_title)
    options = {"displayModeBar": False, "responsive": True}
    html: str = figure.to_html(include_plotlyjs=False, full_html=False, div_id=f"chart-{name}", config=options)
    return html
