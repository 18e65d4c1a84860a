"""What `routesae train` was asked for: one pass over a cache, and the SAEs that it trains."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from routesae.machine.files import read_bytes
from routesae.reporting import WrongInput
from routesae.train.saes import SAES, SINGLE_LAYER
from routesae.train.saes.routers import CONTROLS, ROUTERS

RECIPES = ("routesae", "published")
PRECISIONS = ("auto", "float32", "bfloat16")
PENALISED = ("vanilla", "gated", "jumprelu", "crosscoder")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One SAE. Raises WrongInput where a value is impossible."""

    sae: str = "routesae"
    layer: int | None = None
    """The one layer a single-layer SAE reads; None for the middle one of the cache."""
    latents: int | None = None
    """Size of the dictionary; None for expansion times the width."""
    expansion: int | None = None
    """Size of the dictionary in widths, instead of latents; None for 8."""
    k: int = 64
    """Active latents a token."""
    anneal_k_from: int | None = None
    """k at the first step, from where it falls to k over the sparsity warm-up."""
    sparsity: float | None = None
    """λ; None for one that is steered until k latents are active."""
    pre_act_loss: float | None = None
    """jumprelu only: weight of what pulls dead latents up; None for 0."""
    prefixes: tuple[int, ...] | None = None
    """matryoshka only: sizes of its nested dictionaries; None for F/16 … F."""
    normalize: str = "token"
    routing: str | None = None
    """routesae only: "hard" (None) or "soft"."""
    aggregate: str | None = None
    """routesae only, what of the layers the router sees: their "sum" (None) or "mean"."""
    routed: str | None = None
    """routesae only: the variant its layers share; None for topk."""
    router: str | None = None
    """routesae only: one of ROUTERS; None for published."""
    balance: float | None = None
    """routesae only: weight of the load-balancing term; None for 0.01 where a learned router picks one layer."""
    recipe: str = "routesae"
    """"published" for the objective of the published RouteSAE code."""
    lr: float = 5e-4
    """Adam's peak learning rate."""
    clip: float | None = None
    """Largest norm of the gradient of ‖x − x̂‖², D times NormMSE's; 0 for any, None for 1."""
    name: str | None = None
    """Folder under `out`; None for one made of the settings that tell runs apart."""

    def __post_init__(self) -> None:
        _require_types(self)
        if self.sae not in SAES:
            raise WrongInput(f"--sae {self.sae!r} is none of {', '.join(SAES)}")
        for name, value in ((name, getattr(self, name)) for name in ONLY_FOR):
            if value is not None and not applies(name, self.sae, self.routed):
                raise WrongInput(f"--{flag(name)} {value} is not for {self.sae}: {ONLY_FOR[name]}")
        if self.latents is not None and self.expansion is not None:
            raise WrongInput(
                f"--latents {self.latents} and --expansion {self.expansion} both say how large the SAE is; give one"
            )
        _require_counts(self, "latents", "expansion", "k", "anneal_k_from")
        for name, values in (("router", ROUTERS), ("routed", SINGLE_LAYER), ("recipe", RECIPES)):
            if getattr(self, name) is not None and getattr(self, name) not in values:
                raise WrongInput(f"--{name} {getattr(self, name)!r} is none of {', '.join(values)}")
        if self.routing == "soft" and self.router not in (None, "published", "frozen"):
            raise WrongInput(f"--router {self.router} chooses one layer a token; with --routing soft use published")
        if self.balance and (self.routing == "soft" or self.router in CONTROLS):
            how = "soft routing" if self.routing == "soft" else f"--router {self.router}"
            raise WrongInput(f"--balance {self.balance} has nothing to spread with {how}; leave it out")
        if self.recipe == "published" and (self.routed or self.sae) in PENALISED and self.sparsity is None:
            raise WrongInput(f"--recipe published needs --sparsity for {self.sae}, the published code's --lamda")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise WrongInput(f"--lr {self.lr} is not above 0")
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip >= 0):
            raise WrongInput(f"--clip {self.clip} is not a number of 0 or more")
        if self.name is not None and (Path(self.name).name != self.name or self.name.startswith(".")):
            raise WrongInput(f"--name {self.name!r} must be a plain folder name, not a path and not hidden")


# Settings that not every variant has, and what has them.
ONLY_FOR = {
    "layer": f"it reads every layer, and --layer is for {', '.join(SINGLE_LAYER)}",
    "sparsity": f"it has no penalty, as {', '.join(PENALISED)} have",
    "pre_act_loss": "it is a jumprelu's",
    "prefixes": "they are a matryoshka's",
    "routing": "only routesae has a router",
    "aggregate": "only routesae has a router",
    "routed": "only routesae has a router",
    "router": "only routesae has a router",
    "balance": "only routesae has a router",
}


def applies(name: str, sae: str, routed: str | None) -> bool:
    """Whether the setting called `name` means anything to this variant."""
    inner = (routed or "topk") if sae == "routesae" else sae
    if name == "layer":
        return sae in SINGLE_LAYER
    if name == "sparsity":
        return inner in PENALISED
    if name == "pre_act_loss":
        return inner == "jumprelu"
    if name == "prefixes":
        return inner == "matryoshka"
    return sae == "routesae" if name in ONLY_FOR else True


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One pass over a cache. Raises WrongInput where a value is impossible."""

    cache: str = "shards"
    runs: tuple[RunSettings, ...]
    batch_tokens: int = 4096
    epochs: int | None = None
    """Passes over the training tokens; None for one, or for what `tokens` asks."""
    tokens: int | None = None
    """Training tokens in all, over as many passes as that takes; instead of epochs."""
    dead_after_tokens: int | None = None
    """A latent not active for this many tokens is dead; None for 10 M, or a quarter of a shorter run."""
    sparsity_warmup: float = 0.1
    """Share of the steps over which λ rises and k falls."""
    precision: str = "auto"
    """Of dense products: "float32", "bfloat16", or "auto", the latter on CUDA alone."""
    max_memory: int | None = None
    """Bytes that the pre-activations of a batch may take at a time; None for what is fastest."""
    log_every_steps: int = 10
    checkpoint_every_steps: int = 1000
    log: tuple[str, ...] = ()
    """Trackers beside metrics.jsonl (routesae.train.trackers)."""
    seed: int = 0
    out: str = "saes"
    overwrite: bool = False
    resume: bool = False
    verify: bool = False
    """Compare every checksum of the cache before the first step."""
    device: str = "auto"
    shard: bool = False
    """Divide parameters and Adam's moments among the processes that torchrun started (train/ranks/sharding.py)."""
    cpu_offload: bool = False
    """Keep them in host memory between steps; divided as with shard, also where there is one process."""

    def __post_init__(self) -> None:
        _require_types(self)
        if not self.runs:
            raise WrongInput("no SAE to train; name one with --sae")
        counts = ("batch_tokens", "epochs", "tokens", "dead_after_tokens", "max_memory")
        _require_counts(self, *counts, "log_every_steps", "checkpoint_every_steps")
        if self.epochs is not None and self.tokens is not None:
            raise WrongInput(
                f"--epochs {self.epochs} and --tokens {self.tokens} both say how long to train; give one"
            )
        if not 0 <= self.sparsity_warmup <= 1:
            raise WrongInput(f"--sparsity-warmup {self.sparsity_warmup} is not a share from 0 to 1")
        if self.precision not in PRECISIONS:
            raise WrongInput(f"--precision {self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.seed < 0:
            raise WrongInput(f"--seed {self.seed} is below 0")
        if self.seed >= 2**32:
            raise WrongInput(f"--seed {self.seed} is not below 2^32")  # each step's is made of it and of the step
        if self.resume and self.overwrite:
            raise WrongInput("--resume goes on with what --overwrite would delete; give one")


def _require_counts(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise WrongInput(f"--{flag(name)} {value} is below 1")


def _require_types(settings: object) -> None:
    """A TOML file may hold anything: every value is of its field's type, a whole number fine where any is."""
    for name, hint in get_type_hints(type(settings)).items():
        value, kinds = getattr(settings, name), [get_origin(kind) or kind for kind in get_args(hint) or (hint,)]
        if get_origin(hint) is tuple:
            kinds = [tuple]
        fits = isinstance(value, tuple(kinds)) or (float in kinds and isinstance(value, int))
        if not fits or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
            raise WrongInput(f"--{flag(name)} {value!r} is of the wrong type: a {type(value).__name__}, not {names}")


def flag(name: str) -> str:
    return {"checkpoint_every_steps": "checkpoint-every"}.get(name, name.replace("_", "-"))


RUN_NAMES = tuple(field.name for field in fields(RunSettings))
PASS_NAMES = tuple(field.name for field in fields(TrainSettings) if field.name != "runs")
SWEPT = ("sae", "layer", "k", "sparsity")  # may be given several times: one run for every combination


def settings_of(flags: Mapping[str, Any], config: str | None = None) -> TrainSettings:
    """Settings from flags by name, over those of a TOML file, over the defaults.

    Values of SWEPT names may be sequences. In the file, every table [[run]] is a run, and the file's other names
    hold for all of them. What is not for a run's variant is left out of that run, unless it is for none or stands
    in the run's own table.
    Raises WrongInput for an unknown name, naming it.
    """
    return settings_of_table(read_toml(config) if config is not None else {}, flags, str(config))


def settings_of_table(given: Mapping[str, Any], flags: Mapping[str, Any], where: str) -> TrainSettings:
    """The same from what a file says. where: what to call it in errors."""
    shared = _underscored(given)
    tables = shared.pop("run", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise WrongInput(f"{where}: run is not a list of tables; write [[run]] above each")
    for table in tables:
        _require_known(table, RUN_NAMES, f"{where}, [[run]]")
    _require_known(shared, RUN_NAMES + PASS_NAMES, where)
    _require_known(flags, RUN_NAMES + PASS_NAMES, "flags")
    passed = {name: value for name, value in {**shared, **flags}.items() if name in PASS_NAMES}
    own = {name: value for name, value in flags.items() if name in RUN_NAMES}
    common = {name: value for name, value in shared.items() if name in RUN_NAMES}
    combined = [
        (run, {*own, *common} - set(table) | set(own))
        for table in tables
        for run in _combinations({**common, **table, **own})
    ]
    runs = tuple(RunSettings(**{**run, **_tuple(run, "prefixes")}) for run in _applicable(combined))
    return TrainSettings(runs=runs, **{**passed, **_tuple(passed, "log")})


def _tuple(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name)
    return {name: tuple(value)} if isinstance(value, list | tuple) else {}


def _combinations(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    axes = {}
    for name in SWEPT:
        if name in run:
            value = run[name]
            axes[name] = value if isinstance(value, list | tuple) else [value]
    return [{**run, **dict(zip(axes, values, strict=True))} for values in product(*axes.values())]


def _applicable(runs: Sequence[tuple[dict[str, Any], set[str]]]) -> list[dict[str, Any]]:
    """Each run without what is for other runs' variants; without the doubles that this makes.

    runs: with the names that hold for several of them, which alone are left out.
    """

    def fits(name: str, run: Mapping[str, Any]) -> bool:
        return applies(name, run.get("sae", "routesae"), run.get("routed"))

    kept: list[dict[str, Any]] = []
    for run, common in runs:
        elsewhere = {name for name in common if any(name in other and fits(name, other) for other, _ in runs)}
        slim = {name: value for name, value in run.items() if name not in elsewhere or fits(name, run)}
        if slim not in kept:
            kept.append(slim)
    return kept


def _require_known(values: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    if unknown := sorted(set(values) - set(names)):
        raise WrongInput(f"{where}: {', '.join(unknown)} is no setting; there are {', '.join(sorted(names))}")


def read_toml(path: str) -> dict[str, Any]:
    """The TOML file of --config. Raises WrongInput where it cannot be read."""
    try:
        return tomllib.loads(read_bytes(path).decode())
    except FileNotFoundError:
        raise WrongInput(f"--config {path} does not exist") from None
    except RecursionError:
        raise WrongInput(f"--config {path} cannot be read: nested too deeply") from None
    except (OSError, ValueError) as error:  # ValueError: no TOML, no text, too large, or no file at all
        raise WrongInput(f"--config {path} cannot be read: {error}") from error


def _underscored(data: Mapping[str, Any]) -> dict[str, Any]:
    """Names of flags as those of their fields, in tables [[run]] too: dead-after-tokens, dead_after_tokens."""
    spelled = {"checkpoint_every": "checkpoint_every_steps"}

    def named(table: Mapping[str, Any]) -> dict[str, Any]:
        underscored = {name.replace("-", "_"): value for name, value in table.items()}
        return {spelled.get(name, name): value for name, value in underscored.items()}

    data = named(data)
    if isinstance(data.get("run"), list):
        data["run"] = [named(table) if isinstance(table, dict) else table for table in data["run"]]
    return data
