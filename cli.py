"""The command line: parse, call a room, print. Nothing else in the package prints.

Options, their help and their errors are made from the settings class that each command names. A command builds its
settings, calls the room with them, and hands both to the function below that prints.
"""

import os
import textwrap
from pathlib import Path
from typing import Any

import click

from routesae import __version__
from routesae.console.commands import BLOCKS, CONFIG, DRY_RUN, JSON, PIPELINE, WATCH, Commands, command, watching
from routesae.console.terminal import columns, echo, side_by_side, table
from routesae.reporting import FailedRun, amount, human_bytes, shortened, visible

TOKENS_OF = {"held-out": "held-out tokens", "all": "tokens of all rows"}


@click.group(
    "routesae", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 10_000}
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
    # Buffers of many megabytes on huge pages: on small ones a CPU spends a third of a step on page faults. torch
    # reads this once, when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    ctx.obj = {"quiet": quiet, "log_json": log_json}


def directions() -> tuple[dict[str, int], dict[str, str]]:
    """Which way each column of the scores is better, and its unit."""
    from routesae.analyze.scores.metrics import METRICS

    better = {metric.column: metric.better for metric in METRICS.values()}
    return better, {column: metric.unit for metric in METRICS.values() for column in metric.numbers}


@command(main, "harvest.settings:HarvestSettings", BLOCKS, WATCH, run="harvest.run:harvest")
def harvest(settings: Any, cache: Any) -> None:
    """Run the LM once over a corpus and write shards.

    A shard holds the hidden states of the model's middle layers as fp16 Zarr arrays, one a layer. The same
    command goes on where a stopped one stood; given several times at once, they share the work.

    Example: routesae harvest --model demo --data demo --tokens 200k --context 256
    """
    manifest = cache.manifest
    echo(
        f"{cache.path}: {manifest.kept_tokens:,} tokens x {amount(len(manifest.layers), 'layer')} x {manifest.width} "
        f"in {amount(manifest.shard_count, 'shard')}"
    )


@command(
    main, "train.settings:TrainSettings", "train.settings:RunSettings", CONFIG, BLOCKS, WATCH, run="train.run:train"
)
def train(settings: Any, results: Any) -> None:
    """Train SAEs on a cache, all in one pass. No LM is loaded.

    Flags marked ... may be given several times; every combination is trained.

    Example: routesae train --cache shards/ --sae topk --sae jumprelu --layer 12 --k 32 --k 64
    """
    for result in results:
        if result.held_out is None:
            echo(f"{result.folder}: no held-out rows to score it on")
        else:
            scores = result.held_out
            error, l0 = f"{scores.norm_mse:.4f}", f"{scores.l0:.1f}"
            echo(f"{result.folder}: held-out NormMSE {error}, L0 {l0} on {scores.tokens:,} tokens")


@command(
    main,
    "analyze.pipeline.settings:AblationSettings",
    "train.settings:TrainSettings",
    "train.settings:RunSettings",
    CONFIG,
    BLOCKS,
    WATCH,
    run="analyze.pipeline.ablation:ablation",
    hidden=("overwrite", "resume", "name"),
)
def ablation(settings: Any, rows: list[dict[str, Any]]) -> None:
    """Train the variants in one pass over a cache, score all, and compare: table, CSV, JSON and Pareto plot.

    The same command goes on with a stopped one. Features, the latents that the published rule keeps, and Score are
    columns where contexts, and interpret, have read the SAEs.

    Example: routesae ablation --cache shards/ --layer 12 --k 32 --k 64 --epochs 2
    """
    echo(*table(rows, *directions()))
    echo(f"{settings.out}: ablation.csv, ablation.json" + (", pareto.png, pareto.svg" if settings.plot else ""))


@command(main, "analyze.scores.settings:AnalyzeSettings", JSON, BLOCKS, WATCH, run="analyze.scores.run:analyze")
def analyze(settings: Any, results: dict[str, Any]) -> None:
    """Score SAEs on a cache: its held-out rows, or all of a corpus that they were not trained on.

    What follows ± is half of a 95 % confidence interval, by bootstrap over rows; --json has both its ends.

    Example: routesae analyze --metric KLDiv --metric Recovered --tokens 20k --json scores.json
    """
    echo(*table(results["saes"], *directions()))
    corpus, probed = shortened(results["cache"]["corpus"], 40), results.get("rows_probed")
    also = ""
    if probed and probed != results["rows_scored"]:
        asked = " and ".join(name for name in ("Probe", "Absorption") if name in settings.metrics)
        also = f"; {asked} on its rows {probed[0]:,} to {probed[1] - 1:,}"
    echo(f"on {results['tokens_scored']:,} {TOKENS_OF[results['rows']]} of {corpus}{also}")


@command(main, "analyze.clamp.settings:ClampSettings", JSON, WATCH, run="analyze.clamp.run:clamp")
def clamp(settings: Any, results: dict[str, Any]) -> None:
    """Generate text with an SAE's latents changed, beside the text without.

    VALUE is in the SAE's own activation units, those of its normalised input. Changes may be several, one a latent,
    and hold at every token, of the prompt and generated, but special tokens and the first.

    Example: routesae clamp --sae saes/topk --set 1234=30 --prompt 'My favourite place is'
    """
    for text in results["texts"]:
        echo(*side_by_side(text))


@command(main, "analyze.latents.settings:LatentsSettings", JSON, WATCH, run="analyze.latents.text:latents_of_text")
def latents(settings: Any, found: Any) -> None:
    """List the latents that are active on a text of one's own, token by token.

    What is said of a latent is its explanation, or its strongest context, where interpret or contexts has been there.

    Example: routesae latents --sae saes/topk --text 'The striker scored twice.'
    """
    echo(*str(found).split("\n"))


@command(main, "analyze.latents.settings:CompareSettings", JSON, BLOCKS, WATCH, run="analyze.latents.compare:compare")
def compare(settings: Any, found: Any) -> None:
    """Match the latents of two SAEs, by their decoder rows and by when they are active, and count what is shared.

    Shared are latents that are each other's nearest and at least --threshold alike. The SAEs may read different
    layers.

    Example: routesae compare saes/topk_layer15_4608_k64 saes/jumprelu_layer15_4608_k64
    """
    echo(*str(found).split("\n"))
    echo(f"A: {found['a']}", f"B: {found['b']}")
    echo(f"on {found['tokens']:,} {TOKENS_OF[found['rows']]} of {shortened(found['corpus'], 40)}")


@command(main, "analyze.contexts.settings:ContextSettings", JSON, BLOCKS, WATCH, run="analyze.contexts.run:contexts")
def contexts(settings: Any, results: Any) -> None:
    """Write the text that every latent is active on, from the cache and the tokenizer alone.

    Into the SAE's folder, under contexts, a folder for each corpus: contexts.json, in the shape of the published
    RouteSAE code, contexts.parquet and latents.parquet. The features counted are the latents that the rule keeps.

    Example: routesae contexts --sae saes/topk --threshold 4
    """
    written, groups = [row.pop("written") for row in results], [row.pop("groups", ()) for row in results]
    echo(*table(results))
    for row, of_groups in zip(results, groups, strict=True):
        if of_groups:
            echo("", f"{row['sae']}, by {settings.group_by}:", *table(of_groups))
    for folder in written:
        echo(f"{folder}: contexts.json, contexts.parquet, latents.parquet")


@command(main, "analyze.interpret.settings:InterpretSettings", DRY_RUN, BLOCKS, WATCH)
def interpret(settings: Any, dry_run: bool = False) -> None:
    """Have a chat model explain latents: category, monosemanticity from 1 to 5, explanation.

    Each answer is kept as it comes, and the same command goes on with a stopped one. The key is read from the
    environment and written nowhere.

    Example: routesae interpret --sae saes/routesae_hard_16384_k64 --model gpt-4o --max-cost 2
    """
    from routesae.analyze.interpret.run import estimate
    from routesae.analyze.interpret.run import interpret as run
    from routesae.analyze.interpret.summary import require_answers, row_of

    if dry_run:
        prompts, cost = estimate(settings)
        for name, prompt in prompts.items():
            echo(f"---- {name}", *prompt.split("\n"))
        echo(f"---- {cost}")
        return
    with watching(settings) as report:
        summaries = run(settings, report)
    echo(*table([row_of(summary) for summary in summaries]))
    require_answers(summaries)


@command(main, "analyze.report.settings:ReportSettings", BLOCKS, WATCH, run="analyze.report.run:write_report")
def report(settings: Any, page: Any) -> None:
    """Write one HTML page of the SAEs: compared, their training, routing and densities, and every latent to look at.

    A browser opens it from disk; it needs no network. Latents can be looked at of the SAEs that `routesae contexts`
    has read, with their explanations where `routesae interpret` has written any.

    Example: routesae report --scores scores.json
    """
    echo(f"{page.path}: {amount(page.saes, 'SAE')}, {page.latents:,} latents to look at, {human_bytes(page.bytes)}")
    if page.server is not None:
        echo("http://{}:{}/ until Ctrl-C".format(*page.server.server_address))
        with page.server:
            page.server.serve_forever()


@command(main, PIPELINE, WATCH, run="analyze.pipeline.run:run_pipeline")
def run(settings: Any, result: Any) -> None:
    """Harvest, train, analyze, contexts, interpret and report in one go, as a TOML file says.

    A stage whose inputs have not changed and whose output is there is skipped; a stage without a table is not run.
    The same command goes on with a stopped one.

    Example: routesae run --config examples/pipeline.toml
    """
    if result.scores is not None:
        echo(*table(result.scores["saes"], *directions()))
    echo("; ".join(f"{stage}: {'done' if ran else 'unchanged'}" for stage, ran in result.stages.items()))
    echo(f"{settings.out}: {', '.join(sorted(file.name for file in settings.out.iterdir() if file.is_file()))}")


@command(main, "train.settings:ConvertSettings", run="train.folder.convert:convert")
def convert(settings: Any, converted: Any) -> None:
    """Make an SAE folder of a checkpoint of the published RouteSAE code.

    FILE is a .pt that it saved. Tensors are read from it; no code in it runs.

    Example: routesae convert sum_hard_K64_1B_data_16384.pt --layers 4-12 --name llama
    """
    recipe, layers = converted.recipe, ", ".join(map(str, converted.recipe.layers))
    size = f"{recipe.latents:,} latents of width {recipe.width}"
    echo(f"{converted.folder}: {recipe.sae} of layer {layers}; {size}")


@command(main, "train.settings:PushSettings")
def push(settings: Any) -> None:
    """Upload an SAE folder to the Hugging Face hub, with a model card.

    REPO is user/name, or user/name/folder to keep several SAEs in one repository. Log in with `hf auth login`.

    Example: routesae push saes/topk_layer12_16384_k64 user/topk --private
    """
    from routesae.train.folder.hub import push_sae

    echo(push_sae(Path(settings.folder), settings.repo, private=settings.private, message=settings.message))


@main.group()
def cache() -> None:
    """Look at a cache, or prove it whole."""


@command(cache)
@click.argument("path", help="Folder or URL of the cache.")
def info(path: str) -> None:
    """Manifest, shards present and missing, bytes, statistics a layer.

    Example: routesae cache info shards/
    """
    from routesae.harvest.cache.inspect import describe

    description = describe(path)
    for name, value in description.facts.items():
        echo(*textwrap.wrap(visible(f"{name:12} {value}"), columns(), subsequent_indent=" " * 13))
    echo("", *table(description.layers))


@command(cache, WATCH, BLOCKS)
@click.argument("path", help="Folder or URL of the cache.")
@click.option("--digest", is_flag=True, help="Print one digest of what the cache holds, however it was written.")
def verify(path: str, digest: bool = False) -> None:
    """Check sizes, indexes and checksums of every shard; exit code 1 and a line for each that is bad.

    Example: routesae cache verify shards/ --digest
    """
    from routesae.harvest.cache.verify import verify as run

    with watching() as report:
        result = run(path, report)
    for problem in result.problems:
        echo(problem)
    if digest:
        echo(f"sha256:{result.digest}")
    if result.problems:
        raise FailedRun(
            f"{path}: {amount(len(result.problems), 'problem')}; `routesae cache repair {path}` removes bad shards, "
            "and the same routesae harvest then writes what is missing"
        )
    if not digest:
        echo(f"{path}: every shard is whole")


@command(cache, WATCH)
@click.argument("path", help="Folder or URL of the cache.")
def repair(path: str) -> None:
    """Remove the shards that `cache verify` finds bad, and nothing else; harvest then writes those again.

    Example: routesae cache repair shards/
    """
    from routesae.harvest.cache.verify import repair as run

    with watching() as report:
        result = run(path, report)
    for name in result.removed:
        echo(f"removed {name}")
    if result.missing:
        echo(f"{path}: {amount(result.missing, 'shard')} missing, which the same routesae harvest writes")
    else:
        echo(f"{path}: every shard is whole")


@command(cache, WATCH, BLOCKS)
@click.argument("sources", nargs=-1, required=True, help="Caches to take shards from.")
@click.argument("target", help="Folder or URL of the cache to make.")
@click.option("--link", is_flag=True, help="Make hard links instead of copies where both are on one file system.")
def merge(sources: tuple[str, ...], target: str, link: bool = False) -> None:
    """Make TARGET one cache of parts that were harvested apart; every checksum is compared.

    The same command goes on where it was stopped, and further parts may come later.

    Example: routesae cache merge node0/shards node1/shards shards/
    """
    _copy(sources, target, link=link)


@command(cache, WATCH, BLOCKS)
@click.argument("source", help="Folder or URL to copy from.")
@click.argument("target", help="Folder or URL of the cache to make.")
def copy(source: str, target: str) -> None:
    """Copy a cache from a folder or URL to another; what arrived is read again and every checksum compared.

    The same command goes on where it was stopped.

    Example: routesae cache copy shards/ s3://bucket/shards
    """
    _copy((source,), target)


def _copy(sources: tuple[str, ...], target: str, *, link: bool = False) -> None:
    from routesae.harvest.cache.copying import copy as run

    with watching() as report:
        result = run(sources, target, link=link, report=report)
    echo(f"{target}: {amount(result.copied, 'shard')} copied")
    if result.missing:
        echo(
            f"{target}: {amount(result.missing, 'shard')} missing in {', '.join(sources)}; add further parts with "
            "routesae cache merge, or harvest them"
        )
