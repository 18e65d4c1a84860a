"""Draw the plots that compare runs, as SVG in the page's own colours, light and dark.

Matplotlib draws with stand-in colours, which then become the page's CSS variables: no script, some 20 kB a plot,
where plotly.js would be 4.6 MB for every reader's browser to parse. The names of runs stand in the page's legend,
beside their colours, and never in a plot.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from routesae.analyze.report.runs import Run
from routesae.analyze.scores.metrics import HIGHER, METRICS

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
_LEAST_SPAN = {
    "l0": 2.0,
    "dead": 0.02,
    "routing_entropy": 0.1,
}  # of a linear axis, so that rounding errors do not look like mountains


class Plot(NamedTuple):
    """section: of the page it belongs to. title: with the unit. alternative: the numbers, for screen readers."""

    section: str
    title: str
    alternative: str
    svg: Markup


def draw_plots(runs: Sequence[Run]) -> list[Plot]:
    """The plots for which the runs have data."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        plots = [
            _pareto(runs, "NormMSE"),
            _pareto(runs, "Recovered"),
            _curves(runs, "norm_mse", "NormMSE in training", log=True),
            _curves(runs, "l0", "L0 in training, active latents a token"),
            _curves(runs, "dead", "Dead latents in training, share of the dictionary"),
            _shares(runs),
            _curves(runs, "routing_entropy", "Entropy of routing in training, nats", section="routing"),
            _densities(runs),
        ]
    return [plot for plot in plots if plot is not None]


def colour_of(number: int) -> tuple[str, str]:
    """Colour and line style of the run of that number."""
    return _SERIES[number % SERIES], "-" if number < SERIES else "--"


def _pareto(runs: Sequence[Run], metric: str) -> Plot | None:
    points = {
        number: (run.scores["L0"], run.scores[metric])
        for number, run in enumerate(runs)
        if {"L0", metric} <= run.scores.keys()
    }
    if not points:
        return None
    figure, axes = _figure("L0, active latents a token")
    for variant in dict.fromkeys(run.recipe.sae for run in runs):
        line = sorted(point for number, point in points.items() if runs[number].recipe.sae == variant)
        axes.plot([l0 for l0, _ in line], [value for _, value in line], color=_MUTED, linewidth=1, zorder=2)
    for number, (l0, value) in points.items():
        axes.plot(l0, value, "o", color=colour_of(number)[0], markersize=8, zorder=3)
    axes.margins(0.15)
    better = "higher" if METRICS[metric].better == HIGHER else "lower"
    numbers = (f"{runs[n].name}: L0 {l0:.1f}, {metric} {value:.3f}" for n, (l0, value) in points.items())
    return Plot("runs", f"{metric} against L0, held out; {better} is better", "; ".join(numbers), _svg(figure))


def _curves(runs: Sequence[Run], key: str, title: str, *, section: str = "curves", log: bool = False) -> Plot | None:
    """key: of the lines of metrics.jsonl."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    points = {
        number: [(line["tokens"], line[key]) for line in run.curve if isinstance(line.get(key), int | float)]
        for number, run in enumerate(runs)
    }
    curves = {number: curve for number, curve in points.items() if curve}
    if not curves:
        return None
    figure, axes = _figure("training tokens")
    for number, curve in curves.items():
        colour, style = colour_of(number)
        axes.plot([x for x, _ in curve], [y for _, y in curve], style, color=colour)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif axes.dataLim.height < _LEAST_SPAN[key]:
        span, middle = _LEAST_SPAN[key], axes.dataLim.y0 + axes.dataLim.height / 2
        low = max(-0.04 * span, middle - span / 2)  # a line at 0 stands clear of the axis
        axes.set_ylim(low, low + span)
    if key == "dead":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    numbers = (f"{runs[n].name}: {curve[-1][1]:.3g} at the end" for n, curve in curves.items())
    return Plot(section, title, "; ".join(numbers), _svg(figure))


def _shares(runs: Sequence[Run]) -> Plot | None:
    from matplotlib.ticker import PercentFormatter

    routed = {number: run.shares for number, run in enumerate(runs) if run.shares}
    if not routed:
        return None
    layers = sorted({int(layer) for shares in routed.values() for layer in shares})
    figure, axes = _figure("layer")
    width = 0.8 / len(routed)
    for place, (number, shares) in enumerate(routed.items()):
        left = [at - 0.4 + (place + 0.5) * width for at in range(len(layers))]
        heights = [shares.get(str(layer), 0.0) for layer in layers]
        axes.bar(left, heights, width * 0.92, color=colour_of(number)[0])
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False, axis="x")
    numbers = (
        f"{runs[n].name}: " + ", ".join(f"layer {layer} {share:.0%}" for layer, share in shares.items() if share)
        for n, shares in routed.items()
    )
    return Plot("routing", "Tokens routed to each layer, share, held out", "; ".join(numbers), _svg(figure))


def _densities(runs: Sequence[Run]) -> Plot | None:
    """A histogram for each run. Latents that are never active have no logarithm; the alternative counts them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    logs = {
        number: np.array([math.log10(summary.density) for summary in run.contexts.summaries if summary.active])
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
    numbers = (
        f"{runs[n].name}: median {10 ** float(np.median(values)):.2g}, "
        f"{runs[n].recipe.latents - len(values)} never active"
        for n, values in densities.items()
    )
    return Plot("density", "Latents by density", "; ".join(numbers), _svg(figure))


def _figure(xlabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    return figure, axes


def _svg(figure: Figure) -> Markup:
    """The figure without a size of its own and with the page's colours."""
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
    return Markup(svg)
