"""Runs in; the plots that compare them out, as SVG whose colours are the page's, light and dark.

Matplotlib draws with stand-in colours, which then become the page's CSS variables: no script, some 20 kB a plot,
where plotly.js would be 4.6 MB that every reader's browser has to parse. Names of runs are in the page's own legend,
beside their colours, and never in a plot.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from routesae.analyze.report.runs import Run

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

SERIES = 8  # colours; from the ninth run on they come again, dashed
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
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
}
_SIZE_INCHES = (5.0, 3.2)  # 360 × 230 points: text is as large as the page's on a phone, and no smaller on a desk
_BINS = 40
_LEAST_SPAN = {"l0": 2.0, "dead": 0.02, "routing_entropy": 0.1}  # of a linear axis, in its unit


class Plot(NamedTuple):
    """section: of the page. title: what is drawn, with its unit. alternative: for who cannot see it."""

    section: str
    title: str
    alternative: str
    svg: Markup


def draw_plots(runs: Sequence[Run]) -> list[Plot]:
    """Those of which there is something to draw."""
    plots = [
        _pareto(runs, "NormMSE", "lower is better"),
        _pareto(runs, "Recovered", "higher is better"),
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


def _pareto(runs: Sequence[Run], metric: str, better: str) -> Plot | None:
    points = {
        number: (run.scores["L0"], run.scores[metric])
        for number, run in enumerate(runs)
        if {"L0", metric} <= run.scores.keys()
    }
    if not points:
        return None

    def draw(axes: Axes) -> None:
        for variant in dict.fromkeys(run.recipe.sae for run in runs):
            line = sorted(point for number, point in points.items() if runs[number].recipe.sae == variant)
            axes.plot([l0 for l0, _ in line], [value for _, value in line], color=_MUTED, linewidth=1, zorder=2)
        for number, (l0, value) in points.items():
            axes.plot(l0, value, "o", color=colour_of(number)[0], markersize=8, zorder=3)
        axes.margins(0.15)
        axes.set_xlabel("L0, active latents a token")

    told = "; ".join(f"{runs[n].name}: L0 {l0:.1f}, {metric} {value:.3f}" for n, (l0, value) in points.items())
    return Plot("runs", f"{metric} against L0, held out; {better}", told, _drawn(draw))


def _curves(runs: Sequence[Run], key: str, title: str, *, section: str = "curves", log: bool = False) -> Plot | None:
    curves = {n: _curve(run.curve, key) for n, run in enumerate(runs)}
    curves = {n: curve for n, curve in curves.items() if curve}
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, PercentFormatter

        for number, curve in curves.items():
            colour, style = colour_of(number)
            axes.plot([x for x, _ in curve], [y for _, y in curve], style, color=colour)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            _give_room(axes, least=_LEAST_SPAN[key])
        if key == "dead":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("training tokens")

    told = "; ".join(f"{runs[n].name}: {curve[-1][1]:.3g} at the end" for n, curve in curves.items())
    return Plot(section, title, told, _drawn(draw))


def _give_room(axes: Axes, least: float) -> None:
    """At least `least` from the bottom to the top, so that rounding errors do not look like mountains."""
    if axes.dataLim.height < least:
        low = max(-0.04 * least, axes.dataLim.y0 + axes.dataLim.height / 2 - least / 2)  # a line on 0 stands clear
        axes.set_ylim(low, low + least)


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["tokens"], line[key]) for line in lines if isinstance(line.get(key), int | float)]


def _shares(runs: Sequence[Run]) -> Plot | None:
    routed = {number: run.shares for number, run in enumerate(runs) if run.shares}
    if not routed:
        return None
    layers = sorted({int(layer) for shares in routed.values() for layer in shares})

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import PercentFormatter

        width = 0.8 / len(routed)
        for place, (number, shares) in enumerate(routed.items()):
            left = [at - 0.4 + (place + 0.5) * width for at in range(len(layers))]
            heights = [shares.get(str(layer), 0.0) for layer in layers]
            axes.bar(left, heights, width * 0.92, color=colour_of(number)[0])
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("layer")

    told = "; ".join(
        f"{runs[n].name}: " + ", ".join(f"layer {layer} {share:.0%}" for layer, share in shares.items() if share)
        for n, shares in routed.items()
    )
    return Plot("routing", "Tokens routed to each layer, share, held out", told, _drawn(draw))


def _densities(runs: Sequence[Run]) -> Plot | None:
    """A histogram a run; the latents that are never active have no logarithm, and stand in the alternative."""
    densities = {
        number: np.array([math.log10(summary.density) for summary in run.contexts.summaries if summary.active])
        for number, run in enumerate(runs)
        if run.contexts is not None
    }
    densities = {number: values for number, values in densities.items() if len(values)}
    if not densities:
        return None
    lowest = min(float(values.min()) for values in densities.values())
    edges = np.linspace(math.floor(lowest), 0, _BINS + 1)

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        for number, values in densities.items():
            colour, style = colour_of(number)
            counts, _ = np.histogram(values, edges)
            axes.stairs(counts, edges, color=colour, linestyle=style, linewidth=1.6)
            axes.stairs(counts, edges, color=colour, alpha=0.12, fill=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        names = {0: "1", -1: "0.1", -2: "0.01"}
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: names.get(round(value), f"1e{value:.0f}")))
        axes.set_xlabel("density, share of tokens a latent is active on")

    told = "; ".join(
        f"{runs[n].name}: median {10 ** float(np.median(values)):.2g}, "
        f"{runs[n].recipe.latents - len(values)} never active"
        for n, values in densities.items()
    )
    return Plot("density", "Latents by density", told, _drawn(draw))


def _drawn(draw: Any) -> Markup:
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        draw(figure.subplots())
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
