"""Draw the plots that compare runs, as SVG in the page's own colours, light and dark.

Matplotlib draws with stand-in colours, which then become the page's CSS variables: no script, some 20 kB a plot,
where plotly.js would be 4.6 MB for every reader's browser to parse. A plot that would show nothing is left out: one
without data, and a curve that stays within what rounding does.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from routesae.analyze.report.runs import Run
from routesae.analyze.scores.metrics import HIGHER, METRICS
from routesae.reporting import visible

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8  # colours; from the ninth run on they are used again, dashed
_INK, _MUTED, _LINE = "#010203", "#040506", "#070809"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _LINE: "var(--line)"}
_SERIES = [f"#0a0b{i:02x}" for i in range(SERIES)]
_VARIABLES |= {colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's font, readable by screen readers
    "svg.hashsalt": "routesae",  # the same runs make the same bytes
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    **{f"{axis}tick.color": _MUTED for axis in "xy"},
    **{f"{axis}tick.{which}.size": 0 for axis in "xy" for which in ("major", "minor")},
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
}
_SIZE_INCHES = (5.0, 3.2)  # 360 × 230 points: text is as large as the page's on a phone, and no smaller on a desk
_BINS = 40
_LABEL_POINTS = 11  # from the baseline of one name to the next
_LETTER_POINTS = 5.5  # wide, of most letters


class Plot(NamedTuple):
    """section: of the page it belongs to. title: with the unit. alternative: the numbers, for screen readers."""

    section: str
    title: str
    alternative: str
    svg: Markup


class Curve(NamedTuple):
    """A number of metrics.jsonl. least: the span of all runs together below which it is not drawn."""

    key: str
    section: str
    title: str
    least: float


CURVES = (
    Curve("norm_mse", "curves", "NormMSE in training", 0.0),
    Curve("l0", "curves", "L0 in training, active latents a token", 2.0),
    Curve("dead", "curves", "Dead latents in training, share of the dictionary", 0.02),
    Curve("routing_entropy", "routing", "Entropy of routing in training, nats", 0.1),
)


def draw_plots(runs: Sequence[Run]) -> list[Plot]:
    """The plots for which the runs have data."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        plots = [
            *(_pareto(runs, metric) for metric in ("NormMSE", "Recovered")),
            *(_curves(runs, curve) for curve in CURVES),
            _shares(runs),
            _densities(runs),
        ]
    return [plot for plot in plots if plot is not None]


def colour_of(number: int) -> tuple[str, str]:
    """Colour and line style of the run of that number."""
    return _SERIES[number % SERIES], "-" if number < SERIES else "--"


def _pareto(runs: Sequence[Run], metric: str) -> Plot | None:
    """A point a run, with its name and 95 % intervals, and a line through those of a variant."""
    scored = {number: run for number, run in enumerate(runs) if {"L0", metric} <= run.scores.keys()}
    if not scored:
        return None
    points = {number: (run.scores["L0"], run.scores[metric]) for number, run in scored.items()}
    figure, axes = _figure("L0, active latents a token")
    for variant in dict.fromkeys(run.recipe.sae for run in scored.values()):
        line = sorted(point for number, point in points.items() if runs[number].recipe.sae == variant)
        axes.plot([l0 for l0, _ in line], [value for _, value in line], color=_MUTED, linewidth=1, zorder=2)
    for number, (l0, value) in points.items():
        ends = (runs[number].intervals.get(name, (at, at)) for name, at in (("L0", l0), (metric, value)))
        xerr, yerr = (
            [[max(0, at - low)], [max(0, high - at)]] for at, (low, high) in zip((l0, value), ends, strict=True)
        )
        axes.errorbar(l0, value, yerr, xerr, "o", color=colour_of(number)[0], markersize=7, elinewidth=1.2, zorder=3)
    axes.margins(0.15)
    figure.draw_without_rendering()  # only then it is known where the points are
    _name_points(axes, {run.name: points[number] for number, run in scored.items()})
    better = "higher" if METRICS[metric].better == HIGHER else "lower"
    said = {n: f"L0 {l0:.1f}, {metric} {value:.3f}" for n, (l0, value) in points.items()}
    return _plot(runs, "runs", f"{metric} against L0, held out; {better} is better", said, figure)


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, on the side with more room, none over another."""
    low, high = axes.get_xlim()
    placed: list[tuple[float, float, float]] = []  # where names begin and end, and their baselines, in points
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        side = "right" if x > (low + high) / 2 else "left"  # of the text, that is at the point
        across, at = (float(pixels) * 72 / axes.figure.dpi for pixels in axes.transData.transform((x, y)))
        shown = name if len(name) <= 34 else f"{name[:33]}…"
        width, base = _LETTER_POINTS * len(shown), at + 4
        begins = across - 9 - width if side == "right" else across + 9
        for first, last, other in sorted(placed, key=lambda one: -one[2]):
            if begins < last and first < begins + width and abs(base - other) < _LABEL_POINTS:
                base = other - _LABEL_POINTS
        placed.append((begins, begins + width, base))
        shift = (-9 if side == "right" else 9, base - at)
        axes.annotate(shown, (x, y), shift, textcoords="offset points", ha=side, fontsize=8.5, color=_INK)


def _curves(runs: Sequence[Run], curve: Curve) -> Plot | None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    lines = {
        number: [
            (tokens, value)
            for line in run.curve
            if isinstance(tokens := line.get("tokens"), int | float)
            if isinstance(value := line.get(curve.key), int | float)
        ]
        for number, run in enumerate(runs)
    }
    values = [value for points in lines.values() for _, value in points]
    if not values or max(values) - min(values) < curve.least:
        return None
    figure, axes = _figure("training tokens")
    for number, points in lines.items():
        colour, style = colour_of(number)
        axes.plot([x for x, _ in points], [y for _, y in points], style, color=colour)
    if curve.key == "norm_mse" and min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if curve.key == "dead":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    said = {number: f"{points[-1][1]:.3g} at the end" for number, points in lines.items() if points}
    return _plot(runs, curve.section, curve.title, said, figure)


def _shares(runs: Sequence[Run]) -> Plot | None:
    from matplotlib.ticker import FuncFormatter

    routed = {number: run.shares for number, run in enumerate(runs) if run.shares}
    if not routed:
        return None
    layers = sorted({layer for shares in routed.values() for layer in shares}, key=lambda layer: (len(layer), layer))
    figure, axes = _figure("layer")
    width = 0.8 / len(routed)
    for place, (number, shares) in enumerate(routed.items()):
        left = [at - 0.4 + (place + 0.5) * width for at in range(len(layers))]
        axes.bar(left, [shares.get(layer, 0.0) for layer in layers], width * 0.92, color=colour_of(number)[0])
    axes.set_xticks(range(len(layers)), [visible(layer) for layer in layers])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.grid(visible=False, axis="x")
    said = {
        number: ", ".join(f"layer {layer} {share:.0%}" for layer, share in shares.items() if share)
        for number, shares in routed.items()
    }
    return _plot(runs, "routing", "Tokens routed to each layer, share, held out", said, figure)


def _densities(runs: Sequence[Run]) -> Plot | None:
    """A histogram for each run. Latents that are never active have no logarithm; the alternative counts them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    logs = {
        number: np.array([math.log10(summary.density) for summary in run.contexts.summaries if summary.density > 0])
        for number, run in enumerate(runs)
        if run.contexts is not None
    }
    densities = {number: values for number, values in logs.items() if len(values)}
    if not densities:
        return None
    figure, axes = _figure("density, share of tokens a latent is active on")
    edges = np.linspace(math.floor(min(float(values.min()) for values in densities.values())), 0, _BINS + 1)
    for number, values in densities.items():
        colour, style = colour_of(number)
        counts, _ = np.histogram(values, edges)
        axes.stairs(counts, edges, color=colour, linestyle=style, linewidth=1.6)
        axes.stairs(counts, edges, color=colour, alpha=0.12, fill=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    names = {0: "1", -1: "0.1", -2: "0.01"}
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: names.get(round(value), f"1e{value:.0f}")))
    said = {
        n: f"median {10 ** float(np.median(values)):.2g}, {runs[n].recipe.latents - len(values)} never active"
        for n, values in densities.items()
    }
    return _plot(runs, "density", "Latents by density", said, figure)


def _figure(xlabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return figure, axes


def _plot(runs: Sequence[Run], section: str, title: str, said: Mapping[int, str], figure: Figure) -> Plot:
    """said: the numbers of each run, in words. The SVG has no size of its own, and the page's colours."""
    from markupsafe import Markup

    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Plot(section, title, "; ".join(f"{runs[n].name}: {words}" for n, words in said.items()), Markup(svg))
