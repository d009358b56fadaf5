"""The plots of a page as Vega-Lite, without their points, which the page's scripts fill in.

A point: x, y, where its bars end (x0, x1, y0, y1), `name` of its line, `order` along it, `text` for readers and who
hovers over it, and its look, which the scripts choose: `colour`, `shape`, `dash`, `opacity`, and `alone` where no line
joins it to others. Colours are variables of the page's style, so that the plots follow its theme.
"""

from typing import Any

_CONFIG = {
    "background": None,
    "view": {"stroke": None},
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": "var(--soft)",
        "labelFontSize": 12,
        "labelPadding": 6,
        "titleColor": "var(--ink)",
        "titleFontSize": 12.5,
        "titleFontWeight": 500,
        "titlePadding": 10,
        "gridColor": "var(--rule)",
        "domain": False,
        "ticks": False,
    },
}

_AXIS = {"type": "quantitative", "scale": {"zero": False}, "axis": {"tickCount": 5}}

_LOOK: dict[str, Any] = {
    "color": {"field": "colour", "type": "nominal", "scale": None},
    "detail": {"field": "name", "type": "nominal"},
    "opacity": {"field": "opacity", "type": "quantitative", "scale": None},
}


def _base(description: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "description": description,
        "width": "container",
        "height": 280,
        "autosize": {"type": "fit", "contains": "padding"},
        "config": _CONFIG,
        "data": {"name": "points", "values": []},
        "encoding": {
            **{axis: {"field": axis, **_AXIS} for axis in ("x", "y")},
            **_LOOK,
        },
        "layer": layers,
    }


def _line(width: float = 2) -> dict[str, Any]:
    # A description of each line would repeat that of its points.
    return {
        "transform": [{"filter": "!datum.alone"}],
        "mark": {"type": "line", "strokeWidth": width, "strokeJoin": "round", "aria": False, "invalid": "filter"},
        "encoding": {"order": {"field": "order"}, "strokeDash": {"field": "dash", "scale": None}},
    }


def _bars(axis: str) -> dict[str, Any]:
    ends = {axis: {"field": f"{axis}0", "type": "quantitative"}, f"{axis}2": {"field": f"{axis}1"}}
    return {
        "needs": f"{axis}0",  # for the scripts: without such points the layer is left out
        "transform": [{"filter": f"isValid(datum.{axis}0)"}],
        "mark": {"type": "rule", "strokeWidth": 1.5, "aria": False},
        "encoding": ends,
    }


def _dots() -> dict[str, Any]:
    return {
        "mark": {"type": "point", "filled": True, "size": 64, "stroke": "var(--page)", "strokeWidth": 1},
        "encoding": {
            "shape": {"field": "shape", "type": "nominal", "scale": None},
            "tooltip": {"field": "text", "type": "nominal"},
            "description": {"field": "text", "type": "nominal"},
        },
    }


def charts() -> dict[str, Any]:
    """cost: a measure against network calls; trade: one against another; loss: curves of training."""
    cost = _base("A measure of quality against network calls", [_bars("y"), _line(), _dots()])
    cost["encoding"]["x"] |= {
        "title": "network calls",
        "scale": {"type": "log", "base": 2, "nice": False, "padding": 14},
    }
    trade = _base("Quality against diversity", [_bars("x"), _bars("y"), _line(), _dots()])
    loss = _base("Curves of training", [_line(1.8)])
    loss["encoding"]["x"] |= {"title": "steps"}
    return {"cost": cost, "trade": trade, "loss": loss}
