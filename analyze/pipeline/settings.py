"""What `routesae run` was asked for: a TOML file in; the settings of every stage out, checked before any runs.

    out = "demo"              # folder of all that is written
    cache = "demo/shards"     # where the cache is, or will be, and the SAEs: these are the defaults
    saes = "demo/saes"
    [harvest]                 # the flags of routesae harvest …
    [train]
    [[train.run]]             # … as in the file of routesae train --config
    [analyze]
    [contexts]
    [interpret]
    [report]

A table that is left out is a stage that does not run. Keys are the names of flags; what several stages share (where
cache and SAEs are) stands once, at the top. Paths are taken from where the command runs, as with flags.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.interpret.settings import ChatSettings, InterpretSettings
from routesae.analyze.report.settings import ReportSettings
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.storage import is_url
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import WrongInput
from routesae.train.settings import TrainSettings, read_toml, settings_of_table

TOP = ("out", "cache", "saes")
STAGES = ("harvest", "train", "analyze", "contexts", "interpret", "report")
FLAGS = {"metric": "metrics", "score": "scores"}  # that are fields by another name
ELSEWHERE = {  # flags of the commands that are not for the file, by why
    "out": "it stands at the top of the file",
    "cache": "it stands at the top of the file",
    "sae": "the SAEs are those that [train] names, or all under saes at the top of the file",
    "saes": "it stands at the top of the file",
    "json": "analyze writes scores.json into out",
    "html": "report writes report.html into out",
    "resume": "a stopped run goes on by itself",
    "config": "this file has it all",
    "dry_run": "it is for routesae interpret",
}
OVERWRITE = "an SAE whose settings changed is trained anew by itself"
Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """Settings of the stages that run; None for those that do not.

    cache, saes: where harvest and train write, or where their work is already.
    """

    out: Path
    cache: Path
    saes: Path
    harvest: HarvestSettings | None = None
    train: TrainSettings | None = None
    analyze: AnalyzeSettings | None = None
    contexts: ContextSettings | None = None
    interpret: InterpretSettings | None = None
    report: ReportSettings | None = None


def read_pipeline(config: str) -> PipelineSettings:
    """The settings in a TOML file. Raises WrongInput naming what is unknown in it, or impossible."""
    data = read_toml(config)
    _refuse_unknown(data, (*TOP, *STAGES), config)
    for name in (name for name in TOP if name in data):
        if not (isinstance(data[name], str) and data[name]):
            raise WrongInput(f"{config}: {name} = {data[name]!r} is no path of a folder")
    tables = {name: data[name] for name in STAGES if name in data}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise WrongInput(f"{config}: {name} is not a table; write [{name}] above its keys")
        _refuse_elsewhere(name, table, f"{config}, [{name}]")
    if not tables:
        raise WrongInput(f"{config} has no stage to run; give it tables of {', '.join(STAGES)}")
    out = Path(data.get("out", "run"))
    if is_url(data.get("cache")):
        raise WrongInput(f"{config}: a pipeline's cache is a folder; `routesae cache copy {data['cache']}` makes one")
    cache, saes = Path(data.get("cache", out / "shards")), Path(data.get("saes", out / "saes"))
    places = {"cache": str(cache), "out": str(saes)}
    made: dict[str, Any] = {}
    for name, table in tables.items():
        where = f"{config}, [{name}]"
        match name:
            case "harvest":
                made[name] = _settings(HarvestSettings, table, where, out=str(cache))
            case "train":
                made[name] = settings_of_table(table, places, where)
            case "analyze":
                made[name] = _settings(AnalyzeSettings, table, where, **places)
            case "contexts":
                made[name] = _settings(ContextSettings, table, where, **places)
            case "interpret":
                made[name] = _interpret(table, where, places)
            case "report":  # its file's folder may not be there yet
                made[name] = _settings(ReportSettings, table, where, **places)
    return PipelineSettings(out=out, cache=cache, saes=saes, **made)


def _interpret(table: Mapping[str, Any], where: str, places: Mapping[str, str]) -> InterpretSettings:
    of_chat = {field.name for field in fields(ChatSettings)}
    known = of_chat | {field.name for field in fields(InterpretSettings)} - {"chat"}
    _refuse_unknown({_field(name): value for name, value in table.items()}, known, where)
    chat = _settings(ChatSettings, {name: value for name, value in table.items() if _field(name) in of_chat}, where)
    own = {name: value for name, value in table.items() if _field(name) not in of_chat}
    given: dict[str, Any] = {"chat": chat, **places}
    if own.get("latents") == "all":
        del own["latents"]
        given["latents"] = None
    return _settings(InterpretSettings, own, where, **given)


def _settings(kind: Callable[..., Settings], table: Mapping[str, Any], where: str, **given: Any) -> Settings:
    """Settings of one stage from its table and what it shares with others."""
    hints = get_type_hints(kind)
    named = {_field(name): value for name, value in table.items()}
    _refuse_unknown(named, set(hints) - set(given), where)
    for name, value in named.items():
        if get_origin(hints[name]) is tuple:
            named[name] = tuple(value) if isinstance(value, list) else (value,)
        if not _fits(named[name], hints[name]):
            kinds = getattr(hints[name], "__name__", None) or str(hints[name])
            raise WrongInput(f"{where}: {name} = {value!r} is of the wrong type, not {kinds}")
    try:
        return kind(**named, **given)
    except WrongInput as error:
        raise WrongInput(f"{where}: {error}") from error


def _field(flag: str) -> str:
    underscored = flag.replace("-", "_")
    return FLAGS.get(underscored, underscored)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of a TOML file is of a field's type; a whole number is fine where any number is."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(hint)[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return hint is not NoneType and isinstance(value, hint)


def _refuse_elsewhere(stage: str, table: Mapping[str, Any], where: str) -> None:
    refused = dict(ELSEWHERE)
    if stage == "train":
        del refused["sae"]
        refused["overwrite"] = OVERWRITE
    for name in table:
        if (why := refused.get(name.replace("-", "_"))) is not None:
            raise WrongInput(f"{where}: {name} does not belong there: {why}")


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise WrongInput(f"{where}: {', '.join(unknown)} is no setting; there are {', '.join(sorted(known))}")
