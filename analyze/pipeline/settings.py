"""What `routesae run` and `routesae ablation` were asked for.

    out = "demo"              # folder of all that is written
    cache = "demo/shards"     # where the cache and the SAEs are, or will be: these are the defaults
    saes = "demo/saes"
    [harvest]                 # the flags of routesae harvest …
    [harvest_analyze]         # … for the corpus that is scored, where that is another, and for the one that
    [harvest_contexts]        #   contexts reads; the LM, layers and context are [harvest]'s unless they say so
    [train]
    [[train.run]]             # … as in the file of routesae train --config
    [analyze]                 # its own cache, and that of [contexts], may be named here too
    [contexts]
    [interpret]
    [report]

A table that is left out is a stage that does not run. Keys are spelled as flags are; what several stages share (where
cache and SAEs are) stands once, at the top. Paths are relative to where the command runs, as with flags.
"""

from pathlib import Path
from typing import Any, Self

from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.interpret.settings import InterpretSettings
from routesae.analyze.report.settings import ReportSettings
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.settings import HarvestSettings
from routesae.machine.files import is_url
from routesae.machine.settings import (
    DICTIONARY,
    LM_DTYPE,
    MODEL,
    RUN,
    Settings,
    by_field,
    read_toml,
    setting,
    unknown,
)
from routesae.reporting import WrongInput
from routesae.train.settings import TrainSettings, settings_of, variants

VARIANTS = ("vanilla", "gated", "topk", "jumprelu", "routesae", "crosscoder")

READS_SAES = ("sae", "saes", "out")
OF_ALL_CACHES = ("model", "layers", "context", "lm_dtype", "device")
SET_BY_PIPELINE = {
    **dict.fromkeys(("harvest", "harvest_analyze", "harvest_contexts"), ("out",)),
    "train": ("cache", "out", "resume", "overwrite", "follow"),
    "analyze": READS_SAES,
    "contexts": READS_SAES,
    "interpret": (*READS_SAES, "cache"),
    "report": (*READS_SAES, "cache", "html", "scores", "serve", "port"),
}
INSTEAD = {  # of those that are not paths
    "follow": "give the flag --follow",
    **dict.fromkeys(("resume", "overwrite"), "what was stopped goes on, and what has changed is made again"),
    **dict.fromkeys(("serve", "port"), "give it to routesae report afterwards"),
}


class PipelineSettings(Settings):
    """Settings of the stages that run; None for those that do not.

    cache, saes: where harvest and train write, or where their work is already. follow: both run at once.
    """

    out: Path
    cache: Path
    saes: Path
    harvest: HarvestSettings | None = None
    harvest_analyze: HarvestSettings | None = None
    harvest_contexts: HarvestSettings | None = None
    train: TrainSettings | None = None
    analyze: AnalyzeSettings | None = None
    contexts: ContextSettings | None = None
    interpret: InterpretSettings | None = None
    report: ReportSettings | None = None
    follow: bool = False

    def check(self) -> None:
        if self.follow and (self.harvest is None or self.train is None):
            raise WrongInput("--follow trains while the harvest runs; give the file tables [harvest] and [train]")
        for name in ("harvest", "harvest_analyze", "harvest_contexts"):
            stage, remedy = getattr(self, name), "add --follow" if name == "harvest" else "leave keep out"
            if stage and stage.keep is not None and not (self.follow and name == "harvest"):
                raise WrongInput(f"[{name}]: keep waits for the SAEs that are trained meanwhile; {remedy}")


STAGES = {name: kind.type for name, kind in PipelineSettings.kinds.items() if kind.optional}


def read_pipeline(config: str, follow: bool = False) -> PipelineSettings:
    """The settings in a TOML file. Raises WrongInput naming what is unknown in it, or impossible."""
    table = read_toml(config)
    for name, value in table.items():
        if name == "follow":
            raise _decided(config, name)
        if name not in PipelineSettings.kinds:
            raise WrongInput(f"{config}: {unknown(name, PipelineSettings.kinds)}")
        if name in STAGES and not isinstance(value, dict):
            raise WrongInput(f"{config}: {name} is not a table; write [{name}] above its keys")
        if name not in STAGES and not (isinstance(value, str) and value):
            raise WrongInput(f"{config}: {name} = {value!r} is not the path of a folder")
    if not table.keys() & STAGES.keys():
        raise WrongInput(f"{config} has no stage to run; give it tables of {', '.join(STAGES)}")
    if is_url(table.get("cache")):
        copy = f"routesae cache copy {table['cache']}"
        raise WrongInput(f"{config}: a pipeline's cache is a folder; `{copy}` makes one")
    out = Path(table.get("out", "run"))
    cache, saes = Path(table.get("cache", out / "shards")), Path(table.get("saes", out / "saes"))
    stages: dict[str, Any] = {}
    own = {name: str(out / f"shards-{name}") for name in ("analyze", "contexts") if f"harvest_{name}" in table}
    own |= {name: table[name]["cache"] for name in ("analyze", "contexts") if "cache" in table.get(name, ())}
    for name, of in STAGES.items():
        if name not in table:
            continue
        where, given = f"{config}, [{name}]", table[name]
        if taken := [key for key in given if key.replace("-", "_") in SET_BY_PIPELINE[name]]:
            raise _decided(where, taken[0])
        read = own.get("contexts" if name in ("interpret", "report") else name, cache)
        shared: dict[str, Any] = {"cache": read, "out": saes}
        if of is HarvestSettings:
            shared = {"out": cache}
            if name != "harvest":
                first = by_field(table.get("harvest", {}), config, of)
                first = {field: value for field, value in first.items() if field in OF_ALL_CACHES}
                shared = {"held_out": 1.0, **first, "out": own[name.removeprefix("harvest_")]}
        if name == "train":
            stages[name] = settings_of({**shared, "follow": follow}, where, given)
            continue
        shared |= by_field(given, where, of)
        try:
            stages[name] = of(**shared)
        except WrongInput as error:
            raise WrongInput(f"{where}: {error}") from error
    return PipelineSettings(out=out, cache=cache, saes=saes, follow=follow, **stages)


def _decided(where: str, key: str) -> WrongInput:
    """Complain of a key that the file may not have."""
    instead = INSTEAD.get(key, "set out, cache and saes at the top of the file")
    return WrongInput(f"{where}: {key} does not belong there, for `run` decides it; leave it out: {instead}")


class AblationSettings(Settings):
    """Settings of one ablation, and of its training."""

    training: TrainSettings
    out: str = setting("ablation", RUN, "Folder of SAEs, table and plot.", metavar="PATH")
    sae: tuple[str, ...] = setting(
        (),
        DICTIONARY,
        "Variants.",
        choices=variants(),
        metavar="NAME",
        unset=f"without --config {', '.join(VARIANTS)}",
    )
    score_tokens: int | None = setting(None, RUN, "Held-out tokens to score on.", ge=1, unset="all")
    model: str | None = setting(None, MODEL, "Where the LM is now.", unset="where the cache says")
    lm_dtype: str = LM_DTYPE
    plot: bool = setting(True, RUN, "Draw pareto.png and pareto.svg; needs the extra plot.")
    contexts: bool = setting(False, RUN, "Collect contexts too, for the column Features; reads the cache again.")
    threshold: float = setting(15.0, RUN, "For --contexts: count activations above this.", ge=0, needs="contexts")

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> Self:
        """The flags that are not the ablation's own are train's; `out` in the file of --config is the ablation's."""
        config = flags.get("config")
        table = {} if config is None else read_toml(config)
        own = {"out": table.pop("out", "ablation"), **{name: flags[name] for name in flags if name in cls.described}}
        training = {name: value for name, value in flags.items() if name not in own and name != "config"}
        if "sae" in own or config is None:
            training["sae"] = own.get("sae", VARIANTS)
        made = settings_of({**training, "out": str(Path(str(own["out"])) / "saes")}, config, table)
        if made.overwrite:
            where = "" if config is None else f"{config}: "
            raise WrongInput(f"{where}overwrite is not for ablation; leave it out, and delete what to train again")
        return cls(**own, training=made.replace(resume=True))
