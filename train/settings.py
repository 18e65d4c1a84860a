"""What `routesae train` was asked for, one pass over a cache and the SAEs that it trains; and convert, and push."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routesae.machine.settings import (
    CACHE,
    DEVICE,
    DICTIONARY,
    MODEL,
    OPTIMISER,
    OUT,
    RUN,
    SEED,
    VARIANT,
    Settings,
    by_field,
    flag_of,
    not_one_of,
    read_toml,
    setting,
)
from routesae.reporting import WrongInput

if TYPE_CHECKING:
    from routesae.train.saes import SAE

FOLLOWED_WINDOW = 16  # shards: about as many as a batch of 4,096 tokens has blocks
MOST_RUNS = 1_000  # SAEs in one pass; what a file of settings could ask for has no end
CONVERTED = ("vanilla", "topk", "mlsae", "random", "jumprelu", "gated", "routesae", "crosscoder")


@cache
def variants() -> list[str]:
    """The names in the registry routesae.train.saes.SAES, read from its source: importing it would import torch."""
    tree = ast.parse((Path(__file__).parent / "saes" / "__init__.py").read_text("utf-8"))
    registry = next(
        node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and "SAES" in ast.unparse(node)
    )
    assert isinstance(registry.value, ast.Dict)
    return [str(ast.literal_eval(key)) for key in registry.value.keys if key is not None]


def register(name: str, variant: type[SAE]) -> None:
    """Make a class a variant of this process, so that `sae=name` trains it and its folders load.

    Registering a name again replaces the class, as running a notebook's cell twice does. A file in train/saes/ makes
    a variant permanent. Raises WrongInput for the name of a variant that the package itself has.
    """
    from routesae.train.saes import PENALISED, SAES, SINGLE_LAYER

    if name in SAES and SAES[name].__module__.startswith("routesae."):
        raise WrongInput(f"{name!r} is a variant already; register the class under a name of its own")
    SAES[name] = variant
    for names, belongs in ((variants(), True), (SINGLE_LAYER, variant.one_layer), (PENALISED, variant.penalised)):
        if name in names:
            names.remove(name)
        if belongs:
            names.append(name)


def only_for(which: str, help: str, **more: Any) -> Any:
    """A setting of one variant or of those with one trait."""
    return setting(None, VARIANT, help, only_for=which, **more)


class RunSettings(Settings):
    """Settings of one SAE. Raises WrongInput where a value is impossible.

    only_for names a trait of the variant ("one layer", "penalised") or a variant; see `reason_against`.
    """

    sae: str = setting("routesae", DICTIONARY, "Variant.", choices=variants(), metavar="NAME", swept=True)
    layer: int | None = only_for("one layer", "the layer it reads.", ge=0, swept=True, unset="the cache's middle one")
    latents: int | None = setting(
        None, DICTIONARY, "Size of the dictionary.", ge=1, instead_of="expansion", unset="8 x width"
    )
    expansion: int | None = setting(
        None, DICTIONARY, "Size of the dictionary in widths, instead of --latents.", ge=1, unset="8"
    )
    k: int = setting(64, DICTIONARY, "Active latents a token, or the number aimed at.", ge=1, swept=True)
    anneal_k_from: int | None = setting(
        None, OPTIMISER, "k at the start, falling to --k over the sparsity warm-up.", ge=1
    )
    sparsity: float | None = only_for(
        "penalised", "weight of the penalty.", swept=True, unset="steered until --k latents are active"
    )
    pre_act_loss: float | None = only_for("jumprelu", "weight of what revives dead latents, such as 3e-6.", unset="0")
    prefixes: tuple[int, ...] | None = only_for(
        "matryoshka", 'sizes of the nested dictionaries, such as "512,1024,4096".', metavar="N,N,…", unset="F/16 … F"
    )
    normalize: str = setting(
        "token",
        DICTIONARY,
        "How hidden states are normalised before the SAE, and back after it.",
        choices=("token", "dataset", "none"),
    )
    routing: str | None = only_for(
        "routesae", "one layer a token, or all weighted.", choices=("hard", "soft"), unset="hard"
    )
    aggregate: str | None = only_for(
        "routesae", "what of the layers the router sees.", choices=("sum", "mean"), unset="sum"
    )
    routed: str | None = only_for(
        "routesae", "the one-layer variant that its layers share.", metavar="NAME", unset="topk"
    )
    router: str | None = only_for(
        "routesae",
        "how the router learns; frozen and random are controls.",
        choices=("published", "top2", "frozen", "random"),
        metavar="NAME",
        unset="top2, or published with soft routing or the published recipe",
    )
    balance: float | None = only_for(
        "routesae", "weight of the load-balancing term.", unset="0.01 where the published router picks one layer"
    )
    recipe: str = setting(
        "routesae",
        OPTIMISER,
        "Objective, schedules and Adam's epsilon. published trains as the published RouteSAE code, but a "
        "jumprelu's thresholds below 0 act as 0, a topk's latents are never below 0, and random draws its layer from "
        "those harvested.",
        choices=("routesae", "published"),
    )
    warm_start: str | None = setting(
        None,
        OPTIMISER,
        "SAE whose weights training begins from: of the same variant, and as many latents or fewer. Folder or hub.",
        flag="from",
        metavar="SAE",
        unset="random weights",
    )
    freeze: str = setting(
        "none",
        OPTIMISER,
        "Train an SAE without its encoder or decoder, which stays random, as a control (2602.14111).",
        choices=("none", "encoder", "decoder"),
        swept=True,
    )
    lr: float | None = setting(
        None, OPTIMISER, "Peak learning rate of Adam.", gt=0, none="auto", unset="auto: 0.192/√F for F latents"
    )
    clip: float | None = setting(
        None,
        OPTIMISER,
        "Largest norm of the squared error's gradient (D times NormMSE's); 0 for any.",
        ge=0,
        unset="1",
    )
    name: str | None = setting(
        None, RUN, "Folder of the SAE under --out.", unset="from variant, layer, latents and k"
    )

    def check(self) -> None:
        if self.routed is not None:
            from routesae.train.saes import SINGLE_LAYER

            if self.routed not in SINGLE_LAYER:
                raise WrongInput(f"--routed {not_one_of(self.routed, SINGLE_LAYER)}")
        for name, value in vars(self).items():
            if value is not None and (why := reason_against(name, vars(self))):
                raise WrongInput(f"{flag_of(RunSettings, name)} {value} is not for {self.sae}: {why}; leave it out")
        if self.routing == "soft" and self.router not in (None, "published", "frozen"):
            raise WrongInput(f"--router {self.router} chooses one layer a token; with --routing soft use published")
        if self.recipe == "published" and self.sparsity is None and not reason_against("sparsity", vars(self)):
            raise WrongInput(f"--recipe published needs --sparsity for {self.sae}, the published code's --lamda")
        if self.name is not None:
            require_plain_name(self.name)


def require_plain_name(name: str) -> None:
    """Raise WrongInput for a folder name that a shell, a URL or another system would take for something else."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}", name):
        raise WrongInput(f"--name {name!r} is not a plain folder name; use letters, digits and . _ - + = only")


def reason_against(name: str, run: Mapping[str, Any]) -> str | None:
    """Why a setting does nothing for a run, by its variant, the one that it routes or another setting; None if it
    does something."""
    from routesae.train.saes import PENALISED, SAES, SINGLE_LAYER
    from routesae.train.saes.penalty import SteeredSAE

    sae, router, soft = run.get("sae", "routesae"), run.get("router"), run.get("routing") == "soft"
    inner = (run.get("routed") or "topk") if sae == "routesae" else sae
    fixed = inner in PENALISED and run.get("sparsity") is not None
    if name == "anneal_k_from" and fixed:
        return "a fixed --sparsity aims at no k"
    if name == "sparsity_warmup":
        rising = inner in PENALISED and (fixed or not issubclass(SAES[inner], SteeredSAE))
        does = run.get("anneal_k_from") is not None or (rising and run.get("recipe") != "published")
        return None if does else "it has no --anneal-k-from, and no weight of a penalty that rises"
    if name == "aggregate" and router == "random":
        return "--router random reads no layer"
    if name == "balance" and run.get(name) and (soft or router in ("frozen", "random")):
        return f"there is nothing to spread with {'soft routing' if soft else f'--router {router}'}"
    match RunSettings.described[name].only_for:
        case None:
            return None
        case "one layer":
            return None if sae in SINGLE_LAYER else f"it reads every layer, not one as {', '.join(SINGLE_LAYER)} do"
        case "penalised":
            return None if inner in PENALISED else f"only {', '.join(PENALISED)} have a penalty"
        case variant:
            return None if variant in (sae, inner) else f"it is a setting of {variant}"


class TrainSettings(Settings):
    """Settings of one pass over a cache. Raises WrongInput where a value is impossible."""

    cache: str = CACHE
    runs: tuple[RunSettings, ...]
    batch_tokens: int = setting(4096, OPTIMISER, "Tokens in a step.", ge=1)
    epochs: int | None = setting(
        None, OPTIMISER, "Passes over the training tokens.", ge=1, instead_of="tokens", unset="1"
    )
    tokens: int | None = setting(
        None, OPTIMISER, "Training tokens in all, over as many passes as that takes, instead of --epochs.", ge=1
    )
    window: int | None = setting(
        None, OPTIMISER, "Shards that batches are mixed from at a time.", ge=1, unset="all; 16 with --follow"
    )
    dead_after_tokens: int | None = setting(
        None,
        OPTIMISER,
        "Tokens without activity that make a latent dead.",
        ge=1,
        unset="10M, or a quarter of a shorter run",
    )
    sparsity_warmup: float = setting(
        0.1, OPTIMISER, "Share of the steps, from 0 to 1, over which the penalty rises.", ge=0, le=1
    )
    precision: str = setting(
        "auto",
        RUN,
        "Precision of dense products; auto is bfloat16 on CUDA with units for it, else float32, on CUDA in TF32.",
        choices=("auto", "float32", "bfloat16"),
    )
    max_memory: int | None = setting(
        None, RUN, "Bytes that encoding may take at a time, such as 64M.", ge=1, unset="what is fastest"
    )
    log_every_steps: int = setting(10, RUN, "Steps between lines of metrics.jsonl.", ge=1)
    checkpoint_every_steps: int = setting(1000, RUN, "Steps between checkpoints.", ge=1, flag="checkpoint-every")
    log: tuple[str, ...] = setting(
        (), RUN, "Trackers beside metrics.jsonl.", choices=("tensorboard", "wandb", "trackio")
    )
    log_project: str | None = setting(
        None, RUN, "Project of wandb's and trackio's runs.", unset="WANDB_PROJECT, or routesae"
    )
    seed: int = SEED
    out: str = OUT
    follow: bool = setting(False, RUN, "Train on the shards as a harvest writes them, in windows.")
    overwrite: bool = setting(False, RUN, "Replace an SAE of the same name.")
    resume: bool = setting(False, RUN, "Go on from the last checkpoint of the same command.")
    verify: bool = setting(False, RUN, "Compare every checksum of the cache first, which reads all of it.")
    device: str = DEVICE
    shard: bool = setting(False, RUN, "Divide weights and Adam's moments among torchrun's processes.")
    cpu_offload: bool = setting(False, RUN, "Keep them in host memory between steps, for an SAE too large.")

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> TrainSettings:
        """Settings from flags, over those of the TOML file that --config names."""
        return settings_of({name: flags[name] for name in flags if name != "config"}, flags.get("config"))

    def check(self) -> None:
        if not self.runs:
            raise WrongInput("no SAE to train; name one with --sae")
        if self.resume and self.overwrite:
            raise WrongInput("--resume goes on with what --overwrite would delete; give one of them")
        if self.follow and self.verify:
            raise WrongInput("--verify reads the whole cache, which --follow does not wait for; give one of them")
        if self.follow and (self.epochs or 1) > 1:
            raise WrongInput(f"--follow sees every token once; leave out --epochs {self.epochs}")
        if self.log_project is not None and not {"wandb", "trackio"} & {*self.log}:
            raise WrongInput(f"--log-project {self.log_project} is for --log wandb and trackio; leave it out")
        if self.follow and self.window is None:
            vars(self)["window"] = FOLLOWED_WINDOW


def settings_of(
    flags: Mapping[str, Any], config: str | None = None, table: Mapping[str, Any] | None = None
) -> TrainSettings:
    """Settings from flags by field name, over those of a TOML file, over the defaults.

    Values of swept settings may be sequences: one run is made for every combination. In the file, every table [[run]]
    is a run, and the file's other names hold for all of them. What is not for a run's variant is left out of that
    run, unless it is for none or stands in the run's own table. table: what the file `config` holds, if it is read.
    Raises WrongInput for an unknown name, naming it.
    """
    table = dict(read_toml(config) if table is None and config is not None else table or {})
    tables = table.pop("run", [{}])
    if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
        raise WrongInput(f"{config}: run is not a list of tables; write [[run]] above each")
    shared = by_field(table, str(config), RunSettings, TrainSettings)
    flags = by_field(flags, "flags", RunSettings, TrainSettings)
    runs: list[tuple[dict[str, Any], set[str]]] = []
    for one in tables:
        own = by_field(one, f"{config}, [[run]]", RunSettings)
        run = {name: value for name, value in overridden(shared, own, flags).items() if name in RunSettings.described}
        swept = {name: run[name] for name, one in RunSettings.described.items() if one.swept and name in run}
        axes = [value if isinstance(value, list | tuple) else [value] for value in swept.values()]
        if len(tables) * math.prod(map(len, axes)) > MOST_RUNS:
            raise WrongInput(
                f"{config or 'flags'}: more than {MOST_RUNS:,} SAEs in one pass; divide them among several"
            )
        common = {name for name in run if name in flags or name not in own}
        runs += [({**run, **dict(zip(swept, values, strict=True))}, common) for values in product(*axes)]
    of_pass = {name: v for name, v in overridden(shared, flags).items() if name not in RunSettings.described}
    settings = TrainSettings(runs=tuple(RunSettings(**run) for run in _applicable(runs)), **of_pass)
    whys = [reason_against("sparsity_warmup", vars(run)) for run in settings.runs]
    if "sparsity_warmup" in of_pass and all(whys):
        asked = f"--sparsity-warmup {settings.sparsity_warmup:g} is not for {settings.runs[0].sae}"
        raise WrongInput(f"{asked}: {whys[0]}; leave it out")
    return settings


def overridden(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Values of which the later win, also over the other of two alternatives: --tokens over an earlier `epochs`."""
    fields = {**RunSettings.described, **TrainSettings.described}
    pairs = [(name, one.instead_of) for name, one in fields.items() if one.instead_of]
    values: dict[str, Any] = {}
    for layer in layers:
        gone = {name for pair in pairs if any(one in layer for one in pair) for name in pair}
        values = {name: value for name, value in values.items() if name not in gone} | dict(layer)
    return values


def _applicable(runs: Sequence[tuple[dict[str, Any], set[str]]]) -> list[dict[str, Any]]:
    """Each run without the common settings that are for other runs' variants, and without the doubles this makes.

    runs: with the names that hold for several of them, which alone are left out.
    """

    def fits(name: str, run: Mapping[str, Any]) -> bool:
        return reason_against(name, run) is None

    kept: list[dict[str, Any]] = []
    for run, common in runs:
        elsewhere = {name for name in common if any(name in other and fits(name, other) for other, _ in runs)}
        slim = {name: value for name, value in run.items() if name not in elsewhere or fits(name, run)}
        if slim not in kept:
            kept.append(slim)
    return kept


TRAINED: dict[str, Any] = dict(RunSettings.described)


class ConvertSettings(Settings):
    """Settings of one conversion. Raises WrongInput where a value is impossible."""

    file: str = setting(
        ..., MODEL, "A .pt of the published code, a folder of another tool, or lens:RELEASE/ID.", positional=True
    )
    sae: str | None = setting(
        None, DICTIONARY, "Variant.", choices=CONVERTED, metavar="NAME", unset="from the keys and the file name"
    )
    k: int | None = setting(None, DICTIONARY, "Active latents a token.", ge=1, unset="from the file name")
    layer: int | None = setting(None, DICTIONARY, "Layer an SAE over one layer reads.", unset="from the file name")
    layers: str | None = setting(
        None, DICTIONARY, 'Layers the other SAEs read, such as "4-12".', metavar="LIST", unset="n//4 to 3n//4"
    )
    routing: str | None = replace(TRAINED["routing"], unset="from the file name, else hard")
    aggregate: str | None = replace(TRAINED["aggregate"], unset="from the file name, else sum")
    normalize: str = setting(
        "token",
        DICTIONARY,
        "What a .pt was trained on: states normalised per token, or raw ones (none).",
        choices=("token", "none"),
    )
    model: str | None = setting(None, MODEL, "Hub id of the LM it was trained on, kept in its cfg.json.")
    out: str = OUT
    name: str | None = setting(None, RUN, "Folder of the SAE under --out.", unset="the file's name")
    overwrite: bool = setting(False, RUN, "Replace an SAE of the same name.")

    def check(self) -> None:
        if self.layer is not None and self.layers is not None:
            raise WrongInput(f"--layer {self.layer} is for an SAE over one layer, --layers for the others; give one")
        require_plain_name(self.folder_name)

    @property
    def folder_name(self) -> str:
        """The folder's name under `out`."""
        file = Path(self.file)
        default = file.name if file.is_dir() else file.stem
        if self.file.startswith("lens:"):
            default = self.file.partition("/")[2].replace("/", "_")
        return default if self.name is None else self.name


class PushSettings(Settings):
    """What `routesae push` was asked for."""

    folder: str = setting(..., RUN, "The SAE's folder.", positional=True)
    repo: str = setting(..., RUN, "user/name, or user/name/folder.", positional=True)
    private: bool = setting(False, RUN, "Where the repository does not exist yet, make it a private one.")
    message: str | None = setting(None, RUN, "Message of the commit.", unset="the folder's name")
