"""The command line: parse, call a room, print. Nothing else in the package prints.

Options, their help and their errors are made from the settings classes that each command names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from routesae import __version__
from routesae.console.cache_commands import cache
from routesae.console.commands import BLOCKS, WATCH, Commands, command


@click.group(
    "routesae", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.version_option(__version__)
@click.option("--quiet", is_flag=True, help="Only warnings, errors and results.")
@click.option("--log-json", is_flag=True, help="Log and progress on standard error as a JSON object a line.")
@click.pass_context
def main(ctx: click.Context, quiet: bool, log_json: bool) -> None:
    """Sparse autoencoders over the middle layers of language models, the model paid for once.

    \b
    routesae harvest                       run the LM once, write its hidden states to shards/
    routesae train --cache shards/         train an SAE on them, no LM in sight
    routesae analyze --metric KLDiv        score every SAE under saes/
    """
    from routesae.console.watch import Watch, configure_logging

    # Buffers of many megabytes on huge pages: on small ones a CPU spends a third of a step on page faults. torch
    # reads this once, when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    ctx.obj = Watch(quiet=quiet, log_json=log_json)
    configure_logging(ctx.obj)


@command(
    main,
    "routesae.harvest.settings:HarvestSettings",
    BLOCKS,
    WATCH,
    example="harvest --model demo --data demo --tokens 200k --context 256",
)
def harvest(**flags: Any) -> None:
    """Run the LM once over a corpus and write shards.

    A shard holds the hidden states of the model's middle layers as fp16 Zarr arrays, one a layer. The same
    command goes on where a stopped one stood; given several times at once, they share the work.
    """
    from routesae.console.options import watching
    from routesae.console.watch import status_beside
    from routesae.harvest.run import harvest as run
    from routesae.harvest.settings import HarvestSettings

    settings = HarvestSettings(**flags)
    with watching(status_beside(settings.out, settings.worker)) as report:
        cache = run(settings, report)
    manifest = cache.manifest
    click.echo(
        f"{cache.path}: {manifest.kept_tokens:,} tokens x {len(manifest.layers)} layers x {manifest.width} "
        f"in {manifest.shard_count} shards"
    )


@command(
    main,
    "routesae.train.settings:TrainSettings",
    "routesae.train.settings:RunSettings",
    "routesae.console.options:ConfigFile",
    BLOCKS,
    WATCH,
    example="train --cache shards/ --sae topk --sae jumprelu --layer 12 --k 32 --k 64",
)
def train(config: str | None = None, **flags: Any) -> None:
    """Train SAEs on a cache, all in one pass. No LM is loaded.

    Flags marked ... may be given several times; every combination is trained.
    """
    from routesae.console.options import watching
    from routesae.console.watch import status_in
    from routesae.train.run import train as run
    from routesae.train.settings import settings_of

    settings = settings_of(flags, config)
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, the one that reports for all
    with watching(status_in(settings.out) if first else None) as report:
        results = run(settings, report)
    for result in results:
        if result.held_out is None:
            click.echo(f"{result.folder}: no held-out rows to score it on")
        else:
            scores = result.held_out
            error, l0 = f"{scores.norm_mse:.4f}", f"{scores.l0:.1f}"
            click.echo(f"{result.folder}: held-out NormMSE {error}, L0 {l0} on {scores.tokens:,} tokens")


@command(
    main,
    "routesae.train.settings:TrainSettings",
    "routesae.train.settings:RunSettings",
    "routesae.analyze.pipeline.settings:AblationSettings",
    "routesae.console.options:ConfigFile",
    BLOCKS,
    WATCH,
    hidden=("overwrite", "resume", "name"),
    example="ablation --cache shards/ --layer 12 --k 32 --k 64 --epochs 2",
)
def ablation(config: str | None = None, **flags: Any) -> None:
    """Train the variants in one pass over a cache, score all, and compare: table, CSV, JSON and Pareto plot.

    The same command goes on with a stopped one. Features, the latents that the published rule keeps, and Score are
    columns where contexts, and interpret, have read the SAEs.
    """
    from routesae.analyze.pipeline.ablation import ablation as run
    from routesae.analyze.pipeline.settings import ablation_settings
    from routesae.console.options import watching
    from routesae.console.terminal import table
    from routesae.console.watch import status_in

    settings, training = ablation_settings(flags, config)
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    with watching(status_in(settings.out)) as report:
        rows = run(settings, training, report)
    click.echo(table(rows))
    click.echo(f"{settings.out}: ablation.csv, ablation.json" + (", pareto.png, pareto.svg" if settings.plot else ""))


@command(
    main,
    "routesae.analyze.scores.settings:AnalyzeSettings",
    "routesae.console.options:JsonFile",
    BLOCKS,
    WATCH,
    example="analyze --metric KLDiv --metric Recovered --tokens 20k --json scores.json",
)
def analyze(json_file: str | None = None, **flags: Any) -> None:
    """Score SAEs on the held-out rows of a cache.

    What follows ± is half of a 95 % confidence interval, by bootstrap over rows; --json has both its ends.
    """
    from routesae.analyze.scores.run import analyze as run
    from routesae.analyze.scores.settings import AnalyzeSettings
    from routesae.console.options import JsonFile, watching
    from routesae.console.terminal import shown, table

    JsonFile(json_file=json_file)
    with watching() as report:
        results = run(AnalyzeSettings(**flags), report)
    write_json(json_file, results)
    click.echo(table([shown(row) for row in results["saes"]]))
    click.echo(f"on {results['tokens_scored']:,} held-out tokens")


def write_json(file: str | None, results: dict[str, Any]) -> None:
    """Write results where --json says."""
    if file is not None:
        Path(file).write_text(json.dumps(results, indent=2) + "\n")


@command(
    main,
    "routesae.analyze.clamp.settings:ClampSettings",
    "routesae.console.options:JsonFile",
    WATCH,
    example="clamp --sae saes/topk --set 1234=30 --prompt 'My favourite place is'",
)
def clamp(json_file: str | None = None, **flags: Any) -> None:
    """Generate text with an SAE's latents changed, beside the text without.

    VALUE is in the SAE's own activation units, those of its normalised input. Changes may be several, one a latent,
    and hold at every token, of the prompt and generated, but special tokens and the first.
    """
    from routesae.analyze.clamp.run import clamp as run
    from routesae.analyze.clamp.settings import ClampSettings
    from routesae.console.options import JsonFile, watching
    from routesae.console.terminal import side_by_side

    JsonFile(json_file=json_file)
    with watching() as report:
        results = run(ClampSettings(**flags), report)
    write_json(json_file, results)
    for text in results["texts"]:
        click.echo(side_by_side(text))


@command(
    main,
    "routesae.analyze.contexts.settings:ContextSettings",
    BLOCKS,
    WATCH,
    example="contexts --sae saes/topk --threshold 4",
)
def contexts(**flags: Any) -> None:
    """Write the text that every latent is active on, from the cache and the tokenizer alone.

    Into the SAE's folder: contexts.json, in the shape of the published RouteSAE code, contexts.parquet and
    latents.parquet. The features counted are the latents that the published rule keeps.
    """
    from routesae.analyze.contexts.run import contexts as run
    from routesae.analyze.contexts.settings import ContextSettings
    from routesae.console.options import status_of, watching
    from routesae.console.terminal import table

    settings = ContextSettings(**flags)
    with watching(status_of(settings.saes, settings.out)) as report:
        results = run(settings, report)
    click.echo(table([result.row() for result in results]))
    for result in results:
        click.echo(f"{result.folder}: contexts.json, contexts.parquet, latents.parquet")


@command(
    main,
    "routesae.analyze.interpret.settings:InterpretSettings",
    "routesae.console.options:DryRun",
    BLOCKS,
    WATCH,
    example="interpret --sae saes/routesae_hard_16384_k64 --model gpt-4o --max-cost 2",
)
def interpret(dry_run: bool = False, **flags: Any) -> None:
    """Have a chat model explain latents: category, monosemanticity from 1 to 5, explanation.

    Each answer is kept as it comes, and the same command goes on with a stopped one. The key is read from the
    environment and written nowhere.
    """
    from routesae.analyze.interpret.run import estimate, require_answers, row_of
    from routesae.analyze.interpret.run import interpret as run
    from routesae.analyze.interpret.settings import InterpretSettings
    from routesae.console.options import status_of, watching
    from routesae.console.terminal import table

    settings = InterpretSettings(**flags)
    if dry_run:
        expected = estimate(settings)
        for name, prompt in expected.prompts.items():
            click.echo(f"---- {name}\n{prompt}")
        click.echo(f"---- {expected}")
        return
    with watching(status_of(settings.saes, settings.out)) as report:
        summaries = run(settings, report)
    click.echo(table([row_of(summary) for summary in summaries]))
    require_answers(summaries)


@command(
    main,
    "routesae.analyze.report.settings:ReportSettings",
    BLOCKS,
    WATCH,
    example="report --scores scores.json --model demo",
)
def report(**flags: Any) -> None:
    """Write one HTML page of the SAEs: compared, their training, routing and densities, and every latent to look at.

    A browser opens it from disk; it needs no network. Latents can be looked at of the SAEs that `routesae contexts`
    has read, with their explanations where `routesae interpret` has written any.
    """
    from routesae.analyze.report.run import write_report
    from routesae.analyze.report.settings import ReportSettings
    from routesae.console.options import watching
    from routesae.reporting import human_bytes

    with watching() as show:
        page = write_report(ReportSettings(**flags), show)
    click.echo(f"{page.path}: {page.saes} SAEs, {page.latents:,} latents to look at, {human_bytes(page.bytes)}")


@command(main, "routesae.console.options:PipelineFile", WATCH, example="run --config examples/pipeline.toml")
def run(**flags: Any) -> None:
    """Harvest, train, analyze, contexts, interpret and report in one go, as a TOML file says.

    A stage whose inputs have not changed and whose output is there is skipped; a stage without a table is not run.
    The same command goes on with a stopped one.
    """
    from routesae.analyze.pipeline.run import run_pipeline
    from routesae.analyze.pipeline.settings import read_pipeline
    from routesae.console.options import PipelineFile, watching
    from routesae.console.terminal import shown, table
    from routesae.console.watch import status_in

    settings = read_pipeline(PipelineFile(**flags).config)
    with watching(status_in(settings.out)) as report:
        result = run_pipeline(settings, report)
    if result.scores is not None:
        click.echo(table([shown(row) for row in result.scores["saes"]]))
    click.echo("; ".join(f"{stage}: {'done' if ran else 'unchanged'}" for stage, ran in result.stages.items()))
    files = sorted(file.name for file in Path(settings.out).iterdir() if file.is_file())
    click.echo(f"{settings.out}: {', '.join(files)}")


@command(
    main,
    "routesae.train.folder.settings:ConvertSettings",
    example="convert sum_hard_K64_1B_data_16384.pt --layers 4-12 --name llama",
)
def convert(**flags: Any) -> None:
    """Make an SAE folder of a checkpoint of the published RouteSAE code.

    FILE is a .pt that it saved. Tensors are read from it; no code in it runs.
    """
    from routesae.train.folder.convert import convert as run
    from routesae.train.folder.settings import ConvertSettings

    converted = run(ConvertSettings(**flags))
    recipe, layers = converted.recipe, ", ".join(map(str, converted.recipe.layers))
    size = f"{recipe.latents:,} latents of width {recipe.width}"
    click.echo(f"{converted.folder}: {recipe.sae} of layer {layers}; {size}")


@command(
    main,
    "routesae.train.folder.settings:PushSettings",
    example="push saes/topk_layer12_16384_k64 user/topk --private",
)
def push(**flags: Any) -> None:
    """Upload an SAE folder to the Hugging Face hub, with a model card.

    REPO is user/name, or user/name/folder to keep several SAEs in one repository. Log in with `hf auth login`.
    """
    from routesae.train.folder.hub import push_sae
    from routesae.train.folder.settings import PushSettings

    settings = PushSettings(**flags)
    click.echo(push_sae(Path(settings.folder), settings.repo, private=settings.private, message=settings.message))


main.add_command(cache)
