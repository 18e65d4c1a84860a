"""The command line: parse, call a room, print. Nothing else in the package prints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from routesae import __version__
from routesae.console.cache_commands import cache
from routesae.console.options import (
    CACHE,
    CACHE_BYTES,
    CACHE_DIR,
    LOG_JSON,
    QUIET,
    SAES,
    SAES_FOLDER,
    long_run,
    status_of,
    watching,
)
from routesae.console.terminal import COUNT, Commands, Numbers, shown, side_by_side, table
from routesae.console.watch import Watch, configure_logging, status_beside, status_in
from routesae.reporting import WrongInput

COMMANDLINE = click.core.ParameterSource.COMMANDLINE


@click.group(cls=Commands, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@QUIET
@LOG_JSON
@click.pass_context
def main(ctx: click.Context) -> None:
    """Sparse autoencoders over the middle layers of language models, the model paid for once.

    \b
    routesae harvest                       run the LM once, write its hidden states to shards/
    routesae train --cache shards/         train an SAE on them, no LM in sight
    routesae analyze --metric KLDiv        score every SAE under saes/
    """
    # Buffers of many megabytes on huge pages: on small ones a CPU spends a third of a step on page faults. torch
    # reads this once, when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    configure_logging(ctx.obj or Watch())


@main.command(epilog="Example: routesae harvest --model demo --data demo --tokens 200k --context 256")
@click.option("--model", default="meta-llama/Llama-3.2-1B", help="Hub id, local folder, .gguf file, or demo.")
@click.option(
    "--data",
    default="Skylion007/openwebtext",
    help="A .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a folder of them, a hub dataset id, or demo.",
)
@click.option("--split", default="train", help="Split of a hub dataset.")
@click.option("--text-field", default="text", help="Field or column that holds a document's text.")
@click.option("--min-chars", default=100, help="Shorter documents are skipped, in characters.")
@click.option(
    "--layers", metavar="LIST", help='Layers to keep, such as "4-12" or "4,8,12".  [default: n//4 to 3n//4]'
)
@click.option("--tokens", type=COUNT, default="10M", help="Tokens of the corpus to run, such as 200k or 10M.")
@click.option("--context", default=512, help="Tokens a row, that is, a sequence of the LM.")
@click.option("--shard-tokens", type=COUNT, default=65_536, help="Tokens a shard; two shards are held in memory.")
@click.option("--batch-sequences", type=int, help="Rows a forward pass.  [default: 8 on a CPU, what fits on CUDA]")
@click.option(
    "--dtype",
    default="float16",
    metavar="float16|float32|int8",
    help="Of the hidden states on disk. int8 takes half of float16's bytes; cache info says what it lost.",
)
@click.option(
    "--overflow",
    default="error",
    metavar="error|clip",
    help="What to do with a value that dtype cannot hold.",
)
@click.option("--skip-positions", default=1, help="Positions at the start of each row not kept (the attention sink).")
@click.option("--keep-special", is_flag=True, help="Keep the positions of special tokens too.")
@click.option("--seed", default=0, help="Of the shuffle.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where the LM runs.")
@click.option(
    "--lm-dtype",
    default="auto",
    metavar="auto|float32|bfloat16",
    help="Precision of the LM; auto is bfloat16 on CUDA and on a CPU with AMX, else float32.",
)
@click.option(
    "--worker", type=int, help="Of several that share the work, which this is, from 0.  [default: torchrun's RANK]"
)
@click.option("--workers", type=int, help="How many share the work.  [default: torchrun's WORLD_SIZE, else 1]")
@click.option("--out", default="shards", type=click.Path(), help="Folder of the cache, or a URL: s3://bucket/shards.")
@CACHE_DIR
@long_run
def harvest(**options: Any) -> None:
    """Run the LM once over a corpus and write shards.

    A shard holds the hidden states of the model's middle layers as fp16 Zarr arrays, one a layer. The same
    command goes on where a stopped one stood; given several times at once, they share the work.
    """
    from routesae.harvest.run import harvest as run
    from routesae.harvest.settings import HarvestSettings

    with watching(status_beside(options["out"], options["worker"])) as report:
        cache = run(HarvestSettings(**options), report)
    manifest = cache.manifest
    click.echo(
        f"{cache.path}: {manifest.kept_tokens:,} tokens x {len(manifest.layers)} layers x {manifest.width} "
        f"in {manifest.shard_count} shards"
    )


@main.command(epilog="Example: routesae train --cache shards/ --sae topk --sae jumprelu --layer 12 --k 32 --k 64")
@click.option("--config", type=click.Path(), help="TOML file with the names of these flags; flags win.")
@CACHE
@click.option(
    "--sae",
    multiple=True,
    metavar="NAME",
    help="vanilla, gated, topk, batchtopk, jumprelu, matryoshka, routesae, crosscoder, mlsae or random. "
    "This, --layer, --k and --sparsity may be given several times: all combinations train in one pass.  "
    "[default: routesae]",
)
@click.option(
    "--layer", type=int, multiple=True, help="Layer an SAE over one layer reads.  [default: the cache's middle one]"
)
@click.option("--latents", type=COUNT, help="Size of the dictionary.  [default: 8 x width]")
@click.option("--expansion", type=int, help="Size of the dictionary in widths, instead of --latents.  [default: 8]")
@click.option("--k", type=int, multiple=True, help="Active latents a token, or the number aimed at.  [default: 64]")
@click.option("--anneal-k-from", type=int, help="k at the start, falling to --k over the sparsity warm-up.")
@click.option(
    "--sparsity",
    type=float,
    multiple=True,
    help="Penalty weight of vanilla, gated, jumprelu, crosscoder.  [default: steered until --k latents are active]",
)
@click.option("--sparsity-warmup", default=0.1, help="Share of the steps over which the penalty rises.")
@click.option("--pre-act-loss", type=float, help="jumprelu: weight of what revives dead latents, such as 3e-6.")
@click.option("--prefixes", metavar="LIST", help='matryoshka: nested sizes, "512,1024,4096".  [default: F/16 … F]')
@click.option("--normalize", default="token", metavar="token|dataset|none", help="Of the hidden states.")
@click.option("--routing", metavar="hard|soft", help="routesae: one layer a token, or all weighted.  [default: hard]")
@click.option("--aggregate", metavar="sum|mean", help="routesae: what of the layers the router sees.  [default: sum]")
@click.option("--routed", metavar="NAME", help="routesae: the variant its layers share.  [default: topk]")
@click.option(
    "--router",
    metavar="NAME",
    help="routesae: published or top2; frozen or random as controls.  [default: published]",
)
@click.option("--balance", type=float, help="routesae: weight of the load-balancing term.  [default: 0.01]")
@click.option(
    "--recipe",
    default="routesae",
    metavar="routesae|published",
    help="Objective; published: the RouteSAE code's.",
)
@click.option("--lr", default=5e-4, help="Peak learning rate of Adam.")
@click.option("--clip", type=float, help="Largest norm of the squared error's gradient; 0 for any.  [default: 1]")
@click.option("--batch-tokens", type=COUNT, default=4096, help="Tokens a step.")
@click.option("--epochs", type=int, help="Passes over the training tokens.  [default: 1]")
@click.option("--tokens", type=COUNT, help="Training tokens in all, instead of --epochs.")
@click.option(
    "--dead-after-tokens",
    type=COUNT,
    help="Tokens without activity that make a latent dead.  [default: 10M, or a quarter of a shorter run]",
)
@click.option("--precision", default="auto", metavar="auto|float32|bfloat16", help="auto is bfloat16 on CUDA alone.")
@click.option("--max-memory", type=COUNT, help="Bytes that encoding may take at a time, such as 64M.  [default: any]")
@click.option("--log", multiple=True, metavar="NAME", help="Beside metrics.jsonl: tensorboard, wandb, trackio.")
@click.option("--log-every-steps", default=10, help="Steps between lines of metrics.jsonl.")
@click.option("--checkpoint-every", default=1000, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the same command.")
@click.option("--seed", default=0, help="Of weights and batch order.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where to train.")
@click.option("--shard", is_flag=True, help="Divide weights and Adam's moments among torchrun's processes.")
@click.option("--cpu-offload", is_flag=True, help="Keep them in host memory between steps, for an SAE too large.")
@click.option("--name", help="Folder of the SAE under --out.  [default: from variant, layer, latents and k]")
@SAES_FOLDER
@click.option("--overwrite", is_flag=True, help="Replace an SAE of the same name.")
@click.option("--verify", is_flag=True, help="Compare every checksum of the cache first, which reads all of it.")
@long_run
@click.pass_context
def train(ctx: click.Context, /, config: str | None, **options: Any) -> None:
    """Train SAEs on a cache, all in one pass. No LM is loaded."""
    from routesae.train.run import train as run
    from routesae.train.settings import settings_of

    settings = settings_of(given_options(ctx, options), config)
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


def given_options(ctx: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Those that stand on the command line, under the names of the settings; defaults are the settings' own."""
    given = {name: value for name, value in options.items() if ctx.get_parameter_source(name) is COMMANDLINE}
    if "prefixes" in given:
        try:
            given["prefixes"] = [int(size) for size in given["prefixes"].split(",")]
        except ValueError:
            raise WrongInput(f"--prefixes {given['prefixes']!r} is no list such as 512,1024,4096") from None
    if "checkpoint_every" in given:
        given["checkpoint_every_steps"] = given.pop("checkpoint_every")
    return given


@main.command(epilog="Example: routesae ablation --cache shards/ --layer 12 --k 32 --k 64 --epochs 2")
@click.option("--config", type=click.Path(), help="TOML file with the names of train's flags; flags win.")
@CACHE
@click.option(
    "--sae",
    multiple=True,
    metavar="NAME",
    help="Variant; may be given several times.  "
    "[default, without --config: vanilla, gated, topk, jumprelu, routesae, crosscoder]",
)
@click.option("--layer", type=int, help="Layer of the SAEs over one layer.  [default: the cache's middle one]")
@click.option("--latents", type=COUNT, help="Size of the dictionaries.  [default: 8 x width]")
@click.option("--k", type=int, multiple=True, help="Active latents a token; several draw a line.  [default: 64]")
@click.option("--lr", default=5e-4, help="Peak learning rate of Adam.")
@click.option("--batch-tokens", type=COUNT, default=4096, help="Tokens a step.")
@click.option("--epochs", type=int, help="Passes over the training tokens.  [default: 1]")
@click.option("--tokens", type=COUNT, help="Training tokens in all, instead of --epochs.")
@click.option("--seed", default=0, help="Of weights and batch order.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where SAEs and LM run.")
@click.option("--score-tokens", type=COUNT, help="Held-out tokens to score on.  [default: all]")
@click.option("--model", help="Where the LM is, if not where the cache says.")
@click.option("--lm-dtype", default="auto", metavar="auto|float32|bfloat16", help="Precision of the LM.")
@click.option("--plot/--no-plot", default=True, help="Draw pareto.png and pareto.svg; needs the extra plot.")
@click.option(
    "--contexts", is_flag=True, help="Collect contexts too, for the column Features; reads the cache again."
)
@click.option("--threshold", default=15.0, help="Of contexts: activations above it count.")
@click.option("--out", default="ablation", type=click.Path(), help="Folder of SAEs, table and plot.")
@long_run
@click.pass_context
def ablation(
    ctx: click.Context, /, config: str | None, plot: bool, out: str, contexts: bool, threshold: float, **options: Any
) -> None:
    """Train the variants in one pass over a cache, score all, and compare: table, CSV, JSON and Pareto plot.

    The same command goes on with a stopped one. Features, the latents that the published rule keeps, and Score are
    columns where contexts, and interpret, have read the SAEs.
    """
    from routesae.analyze.pipeline.ablation import VARIANTS
    from routesae.analyze.pipeline.ablation import ablation as run
    from routesae.train.settings import settings_of

    scoring = {"tokens": options.pop("score_tokens"), "device": options["device"]}
    scoring |= {name: options.pop(name) for name in ("model", "lm_dtype")}
    flags = given_options(ctx, options) | {"resume": True, "out": str(Path(out) / "saes")}
    settings = settings_of({"sae": VARIANTS} | flags if config is None else flags, config)
    Path(out).mkdir(parents=True, exist_ok=True)
    with watching(status_in(out)) as report:
        rows = run(settings, scoring, Path(out), plot=plot, threshold=threshold if contexts else None, report=report)
    click.echo(table(rows))
    click.echo(f"{out}: ablation.csv, ablation.json" + (", pareto.png, pareto.svg" if plot else ""))


@main.command(epilog="Example: routesae analyze --metric KLDiv --metric Recovered --tokens 20k --json scores.json")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="NormMSE, FVU, L0, Dead or Routing, from the cache alone; KLDiv, DeltaCE or Recovered, with the LM. "
    "May be given several times.  [default: those of the cache]",
)
@SAES
@SAES_FOLDER
@CACHE
@click.option("--tokens", type=COUNT, help="Held-out tokens to score on.  [default: all]")
@click.option("--batch-sequences", default=8, help="Rows a forward pass of the LM.")
@click.option(
    "--infer-k",
    default=(),
    type=Numbers(COUNT),
    help="Score with so many active latents a token, a row of the table for each: 16,32,64.  [default: as trained]",
)
@click.option(
    "--theta",
    default=(),
    type=Numbers(click.FLOAT),
    help="Score with latents active above it alone, on the SAE's normalised input: 0.5,1.  [default: as trained]",
)
@click.option("--seed", default=0, help="Of the draws of rows that confidence intervals are made of.")
@click.option("--model", help="Where the LM is, if not where the cache says.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where SAEs and LM run.")
@click.option("--lm-dtype", default="auto", metavar="auto|float32|bfloat16", help="Precision of the LM.")
@click.option("--json", "json_file", type=click.Path(), help="Write the results to this file too, for programs.")
@long_run
def analyze(json_file: str | None, **options: Any) -> None:
    """Score SAEs on the held-out rows of a cache.

    What follows ± is half of a 95 % confidence interval, by bootstrap over rows; --json has both its ends.
    """
    from routesae.analyze.scores.run import analyze as run
    from routesae.analyze.scores.settings import AnalyzeSettings

    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise WrongInput(f"--json {json_file}: there is no folder {Path(json_file).parent} to write it to")
    if not options["metrics"]:
        del options["metrics"]  # the settings' own default
    with watching() as report:
        results = run(AnalyzeSettings(**options), report)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(results, indent=2) + "\n")
    click.echo(table([shown(row) for row in results["saes"]]))
    click.echo(f"on {results['tokens_scored']:,} held-out tokens")


@main.command(epilog="Example: routesae clamp --sae saes/topk --set 1234=30 --prompt 'My favourite place is'")
@click.option(
    "--sae",
    type=click.Path(),
    help="SAE folder, or user/repo[/folder][@revision] on the hub.  [default: the only one under --out]",
)
@SAES_FOLDER
@click.option("--add", multiple=True, metavar="LATENT=VALUE", help="Add VALUE to the latent at every token.")
@click.option("--multiply", multiple=True, metavar="LATENT=VALUE", help="Multiply the latent by VALUE where active.")
@click.option("--set", multiple=True, metavar="LATENT=VALUE", help="Make the latent VALUE at every token.")
@click.option("--ablate", multiple=True, metavar="LATENT", help="Make the latent 0.")
@click.option(
    "--error-term/--no-error-term",
    default=True,
    help="Add back what the SAE fails to reconstruct, so that nothing else changes; the published code does not.",
)
@click.option("--prompt", multiple=True, metavar="TEXT", help="To go on from; may be given several times.")
@click.option(
    "--prompts",
    type=click.Path(),
    help="A .txt, a prompt a line, or a .jsonl[.gz] of texts, messages or HH-RLHF pairs.",
)
@click.option("--text-field", default="prompt", help="Field of the .jsonl that holds the text.")
@click.option(
    "--hh",
    default="conversation",
    metavar="conversation|text",
    help="HH-RLHF pairs: a prompt a human turn, or both replies in one text.",
)
@click.option("--max-prompts", type=COUNT, help="Only the first so many.  [default: all]")
@click.option("--chat/--no-chat", default=None, help="Use the chat template.  [default: where the tokenizer has one]")
@click.option("--max-new-tokens", default=64, help="Longest text, in tokens.")
@click.option("--temperature", type=float, help="Draw tokens at it.  [default: the likeliest token each time]")
@click.option("--seed", default=0, help="Of the draws, the same for both texts.")
@click.option("--batch-sequences", default=8, help="Prompts a forward pass of the LM.")
@click.option("--model", help="Where the LM is, if not where the SAE says.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where SAE and LM run.")
@click.option("--lm-dtype", default="auto", metavar="auto|float32|bfloat16", help="Precision of the LM.")
@click.option("--json", "json_file", type=click.Path(), help="Write texts, token ids and settings to this file too.")
@long_run
def clamp(json_file: str | None, **options: Any) -> None:
    """Generate text with an SAE's latents changed, beside the text without.

    VALUE is in the SAE's own activation units, those of its normalised input. Changes may be several, one a latent,
    and hold at every token, of the prompt and generated, but special tokens and the first.
    """
    from routesae.analyze.clamp.run import clamp as run
    from routesae.analyze.clamp.settings import ClampSettings

    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise WrongInput(f"--json {json_file}: there is no folder {Path(json_file).parent} to write it to")
    with watching() as report:
        results = run(ClampSettings(**options), report)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(results, indent=2) + "\n")
    for text in results["texts"]:
        click.echo(side_by_side(text))


@main.command(epilog="Example: routesae contexts --sae saes/topk --threshold 4")
@SAES
@SAES_FOLDER
@CACHE
@click.option("--threshold", default=15.0, help="Activations above it count; on the SAE's normalised input.")
@click.option("--per-class", default=2, help="Contexts, at most, of tokens alike but for case and blanks.")
@click.option("--max-classes", default=32, help="Latents of more token classes are left out.")
@click.option("--min-contexts", default=5, help="Latents of fewer contexts are left out.")
@click.option("--top", type=int, metavar="N", help="Every latent's N strongest, instead of what the rule keeps.")
@click.option("--window", default=64, help="Tokens of a context, at most; it ends where its sentence ends.")
@click.option("--samples", default=5, help="Further contexts of each third, strong, middle, weak, of a sample.")
@click.option("--seed", default=0, help="Of that sample.")
@click.option("--batch-tokens", type=COUNT, default=4096, help="Tokens the SAE reads at a time.")
@click.option("--model", help="Where the tokenizer is, if not where the cache says.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where SAEs run.")
@long_run
def contexts(**options: Any) -> None:
    """Write the text that every latent is active on, from the cache and the tokenizer alone.

    Into the SAE's folder: contexts.json, in the shape of the published RouteSAE code, contexts.parquet and
    latents.parquet. The features counted are the latents that the published rule keeps.
    """
    from routesae.analyze.contexts.run import contexts as run
    from routesae.analyze.contexts.settings import ContextSettings

    with watching(status_of(options["saes"], options["out"])) as report:
        results = run(ContextSettings(**options), report)
    click.echo(table([result.row() for result in results]))
    for result in results:
        click.echo(f"{result.folder}: contexts.json, contexts.parquet, latents.parquet")


@main.command(epilog="Example: routesae interpret --sae saes/routesae_hard_16384_k64 --model gpt-4o --max-cost 2")
@click.option(
    "--sae",
    "saes",
    multiple=True,
    type=click.Path(),
    help="SAE folder that contexts wrote into; may be given several times.  [default: all under --out with contexts]",
)
@SAES_FOLDER
@click.option(
    "--latents", default="100", metavar="N|all", help="A seeded sample of those that contexts kept, or all."
)
@click.option("--examples", default=64, help="Contexts shown of a latent, the strongest.")
@click.option("--seed", default=0, help="Of the sample.")
@click.option(
    "--prompt", type=click.Path(), help="Template of the question, with $examples in it.  [default: the paper's]"
)
@click.option(
    "--score",
    "scores",
    multiple=True,
    metavar="detection|fuzzing",
    help="Test explanations on texts held out from them: balanced accuracy. May be given several times.",
)
@click.option("--cache", type=click.Path(), help="For detection: where the cache is, if not where contexts found it.")
@CACHE_DIR
@CACHE_BYTES
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="For detection: where the SAE runs.")
@click.option("--model", default="gpt-4o", help="Chat model; with Azure, the deployment.")
@click.option(
    "--base-url",
    metavar="URL",
    help="Of a compatible server (vLLM, Ollama, llama.cpp), or Azure's endpoint.  [default: OpenAI]",
)
@click.option("--api-version", metavar="DATE", help="Azure's; makes it Azure.")
@click.option(
    "--key-env",
    metavar="NAME",
    help="Environment variable that holds the key.  [default: OPENAI_API_KEY, with Azure AZURE_OPENAI_API_KEY]",
)
@click.option("--concurrency", default=8, help="Requests under way at once.")
@click.option("--timeout", default=120.0, help="Seconds for a request.")
@click.option("--retries", default=6, help="Tries after the first, where a server is busy, fails or stays silent.")
@click.option("--temperature", default=0.1, help="Of the chat model.")
@click.option("--max-output-tokens", default=512, help="Of an answer; reasoning models want thousands.")
@click.option(
    "--max-cost", type=float, help="US dollars, with what earlier runs spent on these SAEs.  [default: no limit]"
)
@click.option("--prices", type=click.Path(), help="TOML file of US dollars a million tokens, by model.")
@click.option("--dry-run", is_flag=True, help="Only show the prompts and about what they would cost.")
@click.option("--retry-unparsed", is_flag=True, help="Ask again where an answer was no answer to the question.")
@click.option("--overwrite", is_flag=True, help="Begin anew; earlier answers are lost.")
@long_run
def interpret(latents: str, dry_run: bool, **options: Any) -> None:
    """Have a chat model explain latents: category, monosemanticity from 1 to 5, explanation.

    Each answer is kept as it comes, and the same command goes on with a stopped one. The key is read from the
    environment and written nowhere.
    """
    from dataclasses import fields

    from routesae.analyze.interpret.run import estimate, row_of
    from routesae.analyze.interpret.run import interpret as run
    from routesae.analyze.interpret.settings import ChatSettings, InterpretSettings

    chat = ChatSettings(**{field.name: options.pop(field.name) for field in fields(ChatSettings)})
    settings = InterpretSettings(chat=chat, latents=count_or_all(latents), **options)
    if dry_run:
        expected = estimate(settings)
        for name, prompt in expected.prompts.items():
            click.echo(f"---- {name}\n{prompt}")
        click.echo(f"---- {expected}")
        return
    with watching(status_of(settings.saes, settings.out)) as report:
        summaries = run(settings, report)
    click.echo(table([row_of(summary) for summary in summaries]))


def count_or_all(text: str) -> int | None:
    """--latents: a number, or None for all."""
    return None if text.strip().lower() == "all" else COUNT.convert(text, None, None)


@main.command(epilog="Example: routesae report --scores scores.json --model demo")
@SAES
@SAES_FOLDER
@click.option("--html", default="report.html", type=click.Path(), help="File to write.")
@click.option("--scores", type=click.Path(), help="File of analyze --json, for the metrics that need the LM.")
@click.option(
    "--cache",
    type=click.Path(),
    help="For routing by token.  [default: the one that contexts read, where it is still there]",
)
@CACHE_DIR
@CACHE_BYTES
@click.option("--model", help="Hub id, folder, .gguf or demo: shows what latents do to the logits.  [default: none]")
@click.option("--contexts", default=8, help="Strongest shown of a latent; of each third of its sample a quarter.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where SAEs and LM run.")
@click.option("--lm-dtype", default="auto", metavar="auto|float32|bfloat16", help="Precision of the LM.")
@long_run
def report(**options: Any) -> None:
    """Write one HTML page of the SAEs: compared, their training, routing and densities, and every latent to look at.

    A browser opens it from disk; it needs no network. Latents can be looked at of the SAEs that `routesae contexts`
    has read, with their explanations where `routesae interpret` has written any.
    """
    from routesae.analyze.report.run import write_report
    from routesae.analyze.report.settings import ReportSettings
    from routesae.reporting import human_bytes

    with watching() as show:
        page = write_report(ReportSettings(**options), show)
    click.echo(f"{page.path}: {page.saes} SAEs, {page.latents:,} latents to look at, {human_bytes(page.bytes)}")


@main.command(epilog="Example: routesae run --config examples/pipeline.toml")
@click.option("--config", required=True, type=click.Path(), help="TOML file with a table a stage, of its flags.")
@long_run
def run(config: str) -> None:
    """Harvest, train, analyze, contexts, interpret and report in one go, as a TOML file says.

    A stage whose inputs have not changed and whose output is there is skipped; a stage without a table is not run.
    The same command goes on with a stopped one.
    """
    from routesae.analyze.pipeline.run import run_pipeline
    from routesae.analyze.pipeline.settings import read_pipeline

    settings = read_pipeline(config)
    with watching(status_in(settings.out)) as report:
        result = run_pipeline(settings, report)
    if result.scores is not None:
        click.echo(table([shown(row) for row in result.scores["saes"]]))
    click.echo("; ".join(f"{stage}: {'done' if ran else 'unchanged'}" for stage, ran in result.stages.items()))
    click.echo(f"{settings.out}: {', '.join(sorted(file.name for file in settings.out.iterdir() if file.is_file()))}")


@main.command(epilog="Example: routesae convert sum_hard_K64_1B_data_16384.pt --layers 4-12 --name llama")
@click.argument("file", type=click.Path())
@click.option(
    "--sae",
    metavar="NAME",
    help="vanilla, gated, topk, jumprelu, routesae, crosscoder, mlsae or random.  [default: from keys and file name]",
)
@click.option("--k", type=int, help="Active latents a token.  [default: from the file name]")
@click.option("--layer", type=int, help="Layer an SAE over one layer reads.  [default: from the file name]")
@click.option("--layers", metavar="LIST", help='Layers the others read, such as "4-12".  [default: n//4 to 3n//4]')
@click.option("--routing", metavar="hard|soft", help="routesae.  [default: from the file name, else hard]")
@click.option("--aggregate", metavar="sum|mean", help="routesae.  [default: from the file name, else sum]")
@click.option("--model", help="Hub id of the LM it was trained on, kept in its cfg.json.")
@click.option("--name", help="Folder of the SAE under --out.  [default: the file's name]")
@SAES_FOLDER
@click.option("--overwrite", is_flag=True, help="Replace an SAE of the same name.")
def convert(**options: Any) -> None:
    """Make an SAE folder of a checkpoint of the published RouteSAE code.

    FILE is a .pt that it saved. Tensors are read from it; no code in it runs.
    """
    from routesae.train.folder.convert import convert as run
    from routesae.train.folder.settings import ConvertSettings

    converted = run(ConvertSettings(**options))
    recipe, layers = converted.recipe, ", ".join(map(str, converted.recipe.layers))
    size = f"{recipe.latents:,} latents of width {recipe.width}"
    click.echo(f"{converted.folder}: {recipe.sae} of layer {layers}; {size}")


@main.command(epilog="Example: routesae push saes/topk_layer12_16384_k64 user/topk --private")
@click.argument("folder", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="Where the repository is created, make it a private one.")
@click.option("--message", help="Of the commit.  [default: the folder's name]")
def push(folder: str, repo: str, private: bool, message: str | None) -> None:
    """Upload an SAE folder to the Hugging Face hub, with a model card.

    REPO is user/name, or user/name/folder to keep several SAEs in one repository. Log in with `hf auth login`.
    """
    from routesae.train.folder.hub import push_sae

    click.echo(push_sae(Path(folder), repo, private=private, message=message))


main.add_command(cache)
