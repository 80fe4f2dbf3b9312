"""The charts of the page, drawn by Plotly: colours that colour-blind readers tell apart (Okabe and Ito), and a second sign beside
each colour: another dash, marker or pattern.

Plotly is chosen since a reader can hover for values, zoom and hide runs in the page, offline, without a build step of ours.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.bench.plan import PLAIN, is_foreign
from pipelines.compare.paired import SPEED
from pipelines.compare.records import Comparison, Curve, Interval, MethodResult, MethodRow

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
PATTERNS = ("", "/", ".", "x", "-", "|")
CONFIG = {"displayModeBar": False, "responsive": True}
INK, RULE = "#1f2933", "#e4e7eb"


def charts(comparison: Comparison) -> dict[str, str]:
    """Name -> an HTML element with its script, of every chart that has something to show. Plotly's own script is not in them."""
    made = {"speed": _bars(comparison, "speed against plain", lambda one: (one.speed_vs_plain, one.interval), 1.0),
            "steps": _bars(comparison, "tokens per step", lambda one: (one.tokens_per_step, None), 1.0),
            "pairs": _pairs(comparison), "depths": _depths(comparison),
            "category_steps": _categories(comparison, "tokens_per_step", "tokens per step"),
            "category_speed": _categories(comparison, "speed_vs_plain", "speed against plain"),
            "held_out_tokens": _held_out(comparison.curves, 0, "tokens trained on"),
            "held_out_seconds": _held_out(comparison.curves, 1, "device-seconds"),
            "loss_tokens": _losses(comparison.curves, "tokens", "tokens trained on"),
            "loss_seconds": _losses(comparison.curves, "device_seconds", "device-seconds")}
    return {name: figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG, div_id=f"chart-{name}",
                                 default_width="100%", default_height=f"{figure.layout.height}px")
            for name, figure in made.items() if figure is not None}


def plotly_script() -> str:
    """Plotly's script, to stand in the page itself."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _figure(height: int, x: str, y: str) -> Figure:
    import plotly.graph_objects as go

    axis = {"gridcolor": RULE, "zerolinecolor": RULE, "linecolor": "#9aa5b1", "automargin": True}
    return go.Figure(layout={
        "template": "none", "height": height, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK}, "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "xaxis": axis | {"title": {"text": x}}, "yaxis": axis | {"title": {"text": y}},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0}, "hovermode": "closest"})


def _bars(comparison: Comparison, what: str, figure_of: Any, baseline: float) -> Figure | None:
    """A horizontal bar for each contender and run, the fastest on top, with whiskers where an interval is known."""
    import plotly.graph_objects as go

    methods = [row for row in comparison.methods if any(one is not None and figure_of(one)[0] for one in row.results)]
    if not methods:
        return None
    count = len(comparison.labels)
    figure = _figure(90 + len(methods) * (14 + 18 * count), what, "")
    names = [html.escape(row.method) for row in methods]
    for place, label in enumerate(comparison.labels):
        values, intervals = zip(*((None, None) if (one := row.results[place]) is None else figure_of(one) for row in methods),
                                strict=True)
        figure.add_trace(go.Bar(
            x=values, y=names, orientation="h", name=html.escape(label), error_x=_whiskers(values, intervals),
            marker=_bar_style(place),
            hovertemplate=f"%{{y}}, {html.escape(label)}: %{{x:.2f}}<extra></extra>"))
    figure.add_vline(x=baseline, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_layout(barmode="group", bargap=0.25, yaxis={"autorange": "reversed"}, xaxis={"rangemode": "tozero"},
                         legend={"traceorder": "normal"})
    return figure


def _bar_style(place: int) -> dict[str, Any]:
    return {"color": _colour(place), "pattern": {"shape": PATTERNS[place % len(PATTERNS)], "fillmode": "overlay",
                                                 "fgcolor": "#ffffff", "fgopacity": 0.6, "size": 6, "solidity": 0.2}}


def _whiskers(values: Sequence[float | None], intervals: Sequence[Interval | None]) -> dict[str, Any]:
    pairs = list(zip(values, intervals, strict=True))
    return {"type": "data", "symmetric": False, "color": INK, "thickness": 1.2, "width": 4,
            "array": [max(0.0, between[1] - value) if value is not None and between else 0.0 for value, between in pairs],
            "arrayminus": [max(0.0, value - between[0]) if value is not None and between else 0.0 for value, between in pairs]}


def _pairs(comparison: Comparison) -> Figure | None:
    """The ratio of each pair with its interval; a line at 1, where nothing differs."""
    import plotly.graph_objects as go

    if not comparison.pairs:
        return None
    several = len(comparison.labels) > 2
    rows = [html.escape(f"{one.method}{f', {one.second}' if several else ''}: "
                        f"{'speed' if one.quantity == SPEED else 'tokens/step'}") for one in comparison.pairs]
    figure = _figure(100 + 30 * len(rows), "ratio of the later-named run to the first" if several else
                     f"ratio of {html.escape(comparison.labels[1])} to {html.escape(comparison.labels[0])}", "")
    for place, quantity in enumerate(dict.fromkeys(one.quantity for one in comparison.pairs)):
        own = [(name, one) for name, one in zip(rows, comparison.pairs, strict=True) if one.quantity == quantity]
        figure.add_trace(go.Scatter(
            x=[one.ratio for _, one in own], y=[name for name, _ in own], mode="markers", name=quantity,
            error_x=_whiskers([one.ratio for _, one in own], [one.interval for _, one in own]),
            marker={"color": _colour(place), "size": 10, "symbol": MARKERS[place % len(MARKERS)]},
            hovertemplate="%{y}<br>" + quantity + " %{x:.3f}<extra></extra>"))
    figure.add_vline(x=1.0, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_layout(yaxis={"autorange": "reversed", "categoryorder": "array", "categoryarray": list(dict.fromkeys(rows))})
    return figure


def _depths(comparison: Comparison) -> Figure | None:
    import plotly.graph_objects as go

    figure = _figure(380, "drafts accepted, at least", "share of steps")
    for row, result, place, number in _drafting(comparison.methods):
        if result.accepted:
            label = f"{row.method}, {comparison.labels[place]}"
            figure.add_trace(go.Scatter(
                x=list(range(1, len(result.accepted) + 1)), y=list(result.accepted), mode="lines+markers",
                name=html.escape(label), line={"color": _colour(number), "dash": DASHES[place % len(DASHES)]},
                marker={"symbol": MARKERS[place % len(MARKERS)], "size": 7},
                hovertemplate=f"{html.escape(label)}<br>%{{x}}+ drafts: %{{y:.1%}}<extra></extra>"))
    figure.update_layout(yaxis={"tickformat": ".0%", "rangemode": "tozero"}, xaxis={"dtick": 1})
    return figure if figure.data else None


def _categories(comparison: Comparison, field: str, what: str) -> Figure | None:
    """Bars by category of each run's fastest contender: all contenders of all runs would hide each other."""
    import plotly.graph_objects as go

    figure = _figure(380, "", what)
    for place, label in enumerate(comparison.labels):
        own = [(row.method, one) for row in comparison.methods if row.method != PLAIN and not is_foreign(row.method)
               and (one := row.results[place]) is not None and one.categories and len(one.categories) > 1]
        if not own:
            continue
        method, best = max(own, key=lambda pair: pair[1].speed_vs_plain or 0.0)
        found = best.categories or {}
        values = [getattr(one, field) for one in found.values()]
        between = [one.interval if field == "speed_vs_plain" else None for one in found.values()]
        figure.add_trace(go.Bar(
            x=[html.escape(name) for name in found], y=values, name=html.escape(f"{method}, {label}"),
            error_y=_whiskers(values, between), marker=_bar_style(place),
            hovertemplate=f"%{{x}}, {html.escape(label)}: %{{y:.2f}}<extra></extra>"))
    figure.add_hline(y=1.0, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_layout(barmode="group", bargap=0.25, yaxis={"rangemode": "tozero"})
    return figure if figure.data else None


def _held_out(curves: Sequence[Curve], axis: int, x: str) -> Figure | None:
    return _lines([(curve, [point[axis] for point in curve.held_out], [point[2] for point in curve.held_out])
                   for curve in curves if curve.held_out], x, "tokens per step, held-out rows", "lines+markers")


def _losses(curves: Sequence[Curve], axis: str, x: str) -> Figure | None:
    return _lines([(curve, list(getattr(curve, axis)), list(curve.loss)) for curve in curves], x, "training loss", "lines")


def _lines(lines: Sequence[tuple[Curve, Sequence[float], Sequence[float]]], x: str, y: str, mode: str) -> Figure | None:
    """A colour for each drafter, a dash and a marker for each run."""
    import plotly.graph_objects as go

    if not lines:
        return None
    figure = _figure(380, x, y)
    drafters = list(dict.fromkeys(curve.drafter for curve, _, _ in lines))
    runs = list(dict.fromkeys(curve.run for curve, _, _ in lines))
    for curve, xs, ys in lines:
        label, place = html.escape(f"{curve.drafter}, {curve.run}"), runs.index(curve.run)
        figure.add_trace(go.Scatter(
            x=xs, y=ys, mode=mode, name=label, marker={"symbol": MARKERS[place % len(MARKERS)], "size": 7},
            line={"color": _colour(drafters.index(curve.drafter) if len(drafters) > 1 else place),
                  "dash": DASHES[place % len(DASHES)]},
            hovertemplate=f"{label}<br>{x} %{{x:,.0f}}<br>%{{y:.3f}}<extra></extra>"))
    return figure


def _drafting(methods: Sequence[MethodRow]) -> Iterable[tuple[MethodRow, MethodResult, int, int]]:
    """(contender, its result, place of the run, number of the contender) of those that draft."""
    drafting = [row for row in methods if row.method != PLAIN and any(one is not None and one.accepted for one in row.results)]
    for number, row in enumerate(drafting):
        for place, one in enumerate(row.results):
            if one is not None:
                yield row, one, place, number


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
