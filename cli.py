"""The command line: parse, call a room, print. Nothing else in the package prints."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from routesae import __version__
from routesae.reporting import FailedRun, Progress, Stopped, WrongInput

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("routesae")
COMMANDLINE = click.core.ParameterSource.COMMANDLINE
LOG_LINE_SECONDS = 10.0  # between progress lines where there is no terminal


class Count(click.ParamType[int]):
    """A number of things: 200000, 200k, 10M, 1.5B."""

    name = "count"
    suffixes: ClassVar = {"k": 10**3, "m": 10**6, "b": 10**9}
    limit = 10**15

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number, factor = value.strip().lower(), 1
        if number and number[-1] in self.suffixes:
            number, factor = number[:-1], self.suffixes[number[-1]]
        try:
            count = Decimal(number) * factor  # exact: as a float 16.1k is no whole number
            if count == int(count) and abs(count) <= self.limit:
                return int(count)
        except (InvalidOperation, OverflowError, ValueError):
            pass
        return self.fail(f"{value!r} is not a whole number such as 200000, 200k or 10M", param, ctx)


COUNT = Count()


class Commands(click.Group):
    """Turns what the rooms raise into one line and an exit code: 2 wrong input, 1 failed run, 130 Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except WrongInput as error:
            self._end(error, 2)
        except Stopped as error:
            self._end(error, error.code)
        except (FailedRun, OSError) as error:
            self._end(error, 1)
        except KeyboardInterrupt:
            self._end(
                "stopped; the same command goes on where harvest stood, train with --resume",
                130,
            )

    def _end(self, message: object, code: int) -> None:
        click.echo(f"routesae: {message}", err=True)
        sys.exit(code)


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with rate and time left on a terminal; a log line every ten seconds elsewhere."""
    bars: dict[str, tqdm[Any]] = {}
    starts: dict[str, tuple[float, int, int]] = {}  # when a stage began, where it stood then, and where it stands
    last_line = time.monotonic()

    def bar(now: Progress) -> None:
        from tqdm import tqdm

        if now.stage in bars and now.done < bars[now.stage].n:  # the same work on the next SAE
            bars.pop(now.stage).close()
        if now.stage not in bars:
            for other in bars.values():
                other.close()
            scale = now.unit == "tokens"
            bars[now.stage] = tqdm(total=now.total, unit=f" {now.unit}", unit_scale=scale, desc=now.stage)
        bars[now.stage].set_postfix(now.facts, refresh=False)
        bars[now.stage].update(now.done - bars[now.stage].n)

    def line(now: Progress) -> None:
        nonlocal last_line
        if now.stage in starts and now.done < starts[now.stage][2]:  # the same work on the next SAE
            del starts[now.stage]
        began, done, _ = starts.get(now.stage, (time.monotonic(), now.done, 0))
        starts[now.stage] = (began, done, now.done)
        if time.monotonic() - last_line < LOG_LINE_SECONDS and now.done != now.total:
            return
        last_line = time.monotonic()
        rate = (now.done - done) / max(last_line - began, 1e-9)
        facts = dict(now.facts)
        if rate:
            facts |= {f"{now.unit}/s": f"{rate:,.0f}" if rate > 10 else f"{rate:.2f}"}
            facts |= {"left": f"{(now.total - now.done) / rate:,.0f} s"}
        shown = "".join(f", {name} {value}" for name, value in facts.items())
        log.info("%s: %s of %s %s%s", now.stage, f"{now.done:,}", f"{now.total:,}", now.unit, shown)

    if not sys.stderr.isatty():
        yield line
        return
    from tqdm.contrib.logging import logging_redirect_tqdm

    try:
        with logging_redirect_tqdm():
            yield bar
    finally:
        for open_bar in bars.values():
            open_bar.close()


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of named values for a person; numbers to four digits, absent ones as a dash."""
    from tabulate import tabulate

    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    return tabulate(cells, headers=names, disable_numparse=True, stralign="right")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):  # shares of layers: the largest three
        top = sorted(value.items(), key=lambda item: -item[1])[:3]
        return ", ".join(f"{key}: {share:.0%}" for key, share in top)
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return str(value)


@click.group(cls=Commands, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--quiet", is_flag=True, help="Only warnings, errors and results.")
def main(quiet: bool) -> None:
    """Sparse autoencoders over the middle layers of language models, the model paid for once.

    \b
    routesae harvest                       run the LM once, write its hidden states to shards/
    routesae train --cache shards/         train an SAE on them, no LM in sight
    routesae analyze --metric KLDiv        score every SAE under saes/
    """
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("routesae").setLevel(level)
    for retrying in ("huggingface_hub", "httpx", "httpcore"):  # the last failure is reported, once, as an error
        logging.getLogger(retrying).setLevel(logging.ERROR)


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
@click.option("--batch-sequences", type=int, help="Rows a forward pass.  [default: 8 on a CPU, 32 on CUDA]")
@click.option("--dtype", default="float16", metavar="float16|float32", help="Of the hidden states on disk.")
@click.option(
    "--overflow",
    default="error",
    metavar="error|clip",
    help="What to do with a value that dtype cannot hold.",
)
@click.option(
    "--compress",
    default="none",
    metavar="none|zstd",
    help="zstd saves little of the disk and is slow to train from.",
)
@click.option("--skip-positions", default=1, help="Positions at the start of each row not kept (the attention sink).")
@click.option("--keep-special", is_flag=True, help="Keep the positions of special tokens too.")
@click.option("--seed", default=0, help="Of the shuffle.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where the LM runs.")
@click.option(
    "--lm-dtype",
    default="auto",
    metavar="auto|float32|bfloat16",
    help="Precision of the LM; auto is bfloat16 on CUDA and float32 on a CPU.",
)
@click.option("--out", default="shards", type=click.Path(), help="Folder of the cache.")
def harvest(**options: Any) -> None:
    """Run the LM once over a corpus and write shards.

    A shard holds the hidden states of the model's middle layers as fp16 Zarr arrays, one a layer. The same
    command goes on where a stopped one stood.
    """
    from routesae.harvest.run import harvest as run
    from routesae.harvest.settings import HarvestSettings

    with progress() as report:
        cache = run(HarvestSettings(**options), report)
    manifest = cache.manifest
    click.echo(
        f"{cache.path}: {manifest.kept_tokens:,} tokens x {len(manifest.layers)} layers x {manifest.width} "
        f"in {manifest.shard_count} shards"
    )


@main.command(epilog="Example: routesae train --cache shards/ --sae topk --sae jumprelu --layer 12 --k 32 --k 64")
@click.option("--config", type=click.Path(), help="TOML file with the names of these flags; flags win.")
@click.option("--cache", default="shards", type=click.Path(), help="Folder that harvest wrote.")
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
@click.option("--log", multiple=True, metavar="NAME", help="Beside metrics.jsonl: tensorboard, wandb, trackio.")
@click.option("--log-every-steps", default=10, help="Steps between lines of metrics.jsonl.")
@click.option("--checkpoint-every", default=1000, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the same command.")
@click.option("--seed", default=0, help="Of weights and batch order.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where to train.")
@click.option("--name", help="Folder of the SAE under --out.  [default: from variant, layer, latents and k]")
@click.option("--out", default="saes", type=click.Path(), help="Folder of SAE folders.")
@click.option("--overwrite", is_flag=True, help="Replace an SAE of the same name.")
@click.pass_context
def train(ctx: click.Context, /, config: str | None, **options: Any) -> None:
    """Train SAEs on a cache, all in one pass. No LM is loaded."""
    from routesae.train.run import train as run
    from routesae.train.settings import settings_of

    with progress() as report:
        results = run(settings_of(given_options(ctx, options), config), report)
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
@click.option("--cache", default="shards", type=click.Path(), help="Folder that harvest wrote.")
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
@click.option("--out", default="ablation", type=click.Path(), help="Folder of SAEs, table and plot.")
@click.pass_context
def ablation(ctx: click.Context, /, config: str | None, plot: bool, out: str, **options: Any) -> None:
    """Train the variants in one pass over a cache, score all, and compare: table, CSV, JSON and Pareto plot.

    The same command goes on with a stopped one.
    """
    from routesae.analyze.ablation import VARIANTS
    from routesae.analyze.ablation import ablation as run
    from routesae.train.settings import settings_of

    scoring = {"tokens": options.pop("score_tokens"), "device": options["device"]}
    scoring |= {name: options.pop(name) for name in ("model", "lm_dtype")}
    flags = given_options(ctx, options) | {"resume": True, "out": str(Path(out) / "saes")}
    settings = settings_of({"sae": VARIANTS} | flags if config is None else flags, config)
    Path(out).mkdir(parents=True, exist_ok=True)
    with progress() as report:
        rows = run(settings, scoring, Path(out), plot=plot, report=report)
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
@click.option(
    "--sae",
    "saes",
    multiple=True,
    type=click.Path(),
    help="SAE folder, or user/repo[/folder][@revision] on the hub; may be given several times.  "
    "[default: all under --out]",
)
@click.option("--out", default="saes", type=click.Path(), help="Folder of SAE folders.")
@click.option("--cache", default="shards", type=click.Path(), help="Folder that harvest wrote.")
@click.option("--tokens", type=COUNT, help="Held-out tokens to score on.  [default: all]")
@click.option("--batch-sequences", default=8, help="Rows a forward pass of the LM.")
@click.option("--model", help="Where the LM is, if not where the cache says.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where SAEs and LM run.")
@click.option("--lm-dtype", default="auto", metavar="auto|float32|bfloat16", help="Precision of the LM.")
@click.option("--json", "json_file", type=click.Path(), help="Write the results to this file too, for programs.")
def analyze(json_file: str | None, **options: Any) -> None:
    """Score SAEs on the held-out rows of a cache."""
    from routesae.analyze.run import AnalyzeSettings
    from routesae.analyze.run import analyze as run

    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise WrongInput(f"--json {json_file}: there is no folder {Path(json_file).parent} to write it to")
    if not options["metrics"]:
        del options["metrics"]  # the settings' own default
    with progress() as report:
        results = run(AnalyzeSettings(**options), report)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(results, indent=2) + "\n")
    click.echo(table([{key: value for key, value in row.items() if key != "folder"} for row in results["saes"]]))
    click.echo(f"on {results['tokens_scored']:,} held-out tokens")


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
@click.option("--out", default="saes", type=click.Path(), help="Folder of SAE folders.")
@click.option("--overwrite", is_flag=True, help="Replace an SAE of the same name.")
def convert(**options: Any) -> None:
    """Make an SAE folder of a checkpoint of the published RouteSAE code.

    FILE is a .pt that it saved. Tensors are read from it; no code in it runs.
    """
    from routesae.train.convert import ConvertSettings
    from routesae.train.convert import convert as run

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
    from routesae.train.hub import push_sae

    click.echo(push_sae(Path(folder), repo, private=private, message=message))


@main.group()
def cache() -> None:
    """Look at a cache, or prove it whole."""


@cache.command(epilog="Example: routesae cache info shards/")
@click.argument("path", type=click.Path())
def info(path: str) -> None:
    """Manifest, shards present and missing, bytes, statistics a layer."""
    from routesae.harvest.inspect import describe

    found = describe(path)
    for name, value in found.facts.items():
        click.echo(f"{name:22} {value}")
    click.echo()
    click.echo(table(found.layers))


@cache.command(epilog="Example: routesae cache verify shards/")
@click.argument("path", type=click.Path())
def verify(path: str) -> None:
    """Check sizes, indexes and checksums of every shard; exit code 1 and a line for each that is bad."""
    from routesae.harvest.inspect import verify as run

    with progress() as report:
        problems = run(path, report)
    for problem in problems:
        click.echo(problem)
    if problems:
        raise FailedRun(f"{path}: {len(problems)} problems; delete the shards named and run the same harvest again")
    click.echo(f"{path}: every shard is whole")
