"""Compare the variants: train each on one cache in one pass, score all, write a table and a plot.

saes/…               the SAEs, which a second call finds trained
ablation.json, .csv  a row an SAE
pareto.png, .svg     L0 against Recovered, a line a variant
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from routesae.analyze.contexts.file import read_facts
from routesae.analyze.contexts.run import contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.pipeline.settings import AblationSettings
from routesae.analyze.scores.metrics import CACHE_METRICS, LM_METRICS, METRICS
from routesae.analyze.scores.results import DESCRIPTIONS
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import require_packages
from routesae.machine.files import replacing, write_json
from routesae.reporting import Report, WrongInput, silent
from routesae.train.jobs import folders
from routesae.train.run import train

COLUMNS = (*("sae", "variant", "layers", "latents"), *(metric.column for metric in METRICS.values()), *DESCRIPTIONS)


def ablation(settings: AblationSettings, report: Report = silent) -> list[dict[str, Any]]:
    """Train what is not trained yet, score all of it, write the files; returns the rows of the table.

    Contexts, if asked for, are collected of the SAEs that have none by this threshold. Raises WrongInput before
    anything is trained where the plot cannot be drawn.
    """
    if settings.plot:
        require_packages("the Pareto plot", "plot", "matplotlib", instead=", or give --no-plot")
    training, manifest = settings.training, Cache(settings.training.cache).manifest
    if manifest.train_rows == manifest.rows:
        raise WrongInput(f"{training.cache} has no held-out rows to score SAEs on; harvest one with --held-out 0.05")
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    train(training, report)
    out, saes = Path(settings.out), tuple(str(folder) for folder in folders(training))
    common: dict[str, Any] = {"cache": training.cache, "device": training.device, "model": settings.model}
    facts = {sae: read_facts(Path(sae), manifest.tokens_hash) for sae in saes}
    unread = tuple(sae for sae, of in facts.items() if not of or of["settings"]["threshold"] != settings.threshold)
    if settings.contexts and unread:
        contexts(ContextSettings(saes=unread, threshold=settings.threshold, overwrite=True, **common), report)
    metrics = (*CACHE_METRICS, *LM_METRICS)
    scoring = AnalyzeSettings(
        saes=saes, metrics=metrics, tokens=settings.score_tokens, lm_dtype=settings.lm_dtype, **common
    )
    results = analyze(scoring, report)
    known = [name for name in COLUMNS if any(name in row for row in results["saes"])]
    rows = [{name: row.get(name) for name in known} for row in results["saes"]]
    write_json(out / "ablation.json", results)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, known)
    writer.writeheader()
    writer.writerows(rows)
    with replacing(out / "ablation.csv") as file:
        file.write(table.getvalue().encode())
    if settings.plot:
        draw_pareto(rows, [out / "pareto.png", out / "pareto.svg"])
    return rows


def draw_pareto(rows: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
    """Plot L0 against Recovered, with the points of a variant joined in order of L0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for variant in dict.fromkeys(row["variant"] for row in rows):
        points = sorted((row["L0"], row["Recovered"]) for row in rows if row["variant"] == variant)
        axes.plot([l0 for l0, _ in points], [recovered for _, recovered in points], marker="o", label=variant)
    axes.set_xlabel("L0, active latents a token")
    axes.set_ylabel("Recovered, share of the LM's loss")
    axes.grid(alpha=0.3)
    axes.legend(title="SAE", loc="center left", bbox_to_anchor=(1, 0.5))
    for file in files:
        with replacing(file) as image:
            figure.savefig(image, dpi=160, format=file.suffix[1:])
