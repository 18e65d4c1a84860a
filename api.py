"""The Python API: what a notebook needs, by the same code as the commands. `import routesae` has all of it.

    cache = routesae.Cache("shards/")                  hidden states of an LM, by document and in batches
    sae = routesae.load_sae("saes/topk_layer15")       sae.encode(hidden).top(10)
    lm = routesae.load_lm("demo")                      lm.generate("My favourite place is")
    routesae.latents(lm, sae, "A text of one's own")   which latents are active on it
    with routesae.steer(lm, sae, {1924: 9.0}): …       what the LM says with a latent changed
    routesae.harvest(…), train(…), analyze(…), contexts(…), report(…), compare(…)   the commands, settings by name

Whatever is wrong with what is given raises WrongInput, a ValueError, in one line with the remedy.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from routesae.analyze.clamp.changes import CHANGES, Change, Clamp
from routesae.analyze.clamp.steps import require_cached_attention, steering
from routesae.analyze.inputs.lm import LM, load_lm, require_lm_of
from routesae.analyze.latents.cache import Batches, Cache, Document, LayerRows
from routesae.analyze.latents.compare import Comparison
from routesae.analyze.latents.text import TextLatents, latents
from routesae.cli import main
from routesae.console.commands import imported
from routesae.console.watch import Bars, Pacer
from routesae.machine.device import pick_device
from routesae.machine.settings import by_field, not_one_of
from routesae.reporting import Table, WrongInput
from routesae.train.folder import checkpoint
from routesae.train.folder.hub import fetch_sae
from routesae.train.jobs import folders
from routesae.train.saes import SAE

__all__ = ["LM", "SAE", "Batches", "Cache", "Comparison", "Document", "LayerRows", "Table", "TextLatents"]
__all__ += ["WrongInput", "analyze", "compare", "contexts", "harvest", "latents", "load_lm", "load_sae"]
__all__ += ["report", "steer", "train"]


def load_sae(sae: str | Path, *, device: str = "auto") -> SAE:
    """An SAE of a folder, ours or SAELens', or of the hub: `user/repo[/folder][@revision]`.

    It takes hidden states in the LM's own units, [..., D], or [..., L, D] where it reads several layers. Its weights
    have no gradients until `sae.requires_grad_()`. Raises WrongInput where it cannot be read, or holds what would
    change its numbers and is not understood.
    """
    return checkpoint.load_sae(fetch_sae(str(sae)), pick_device(device))


def steer(
    lm: LM, sae: SAE, changes: Mapping[int, float], *, mode: str = "set", error_term: bool = True
) -> AbstractContextManager[None]:
    """While the context is open, the LM runs with some of the SAE's latents changed, `lm.generate` included.

    changes: {latent: value}, in the units of the SAE's normalised input. mode: "set" makes each latent its value,
    "add" adds it, "multiply" multiplies by it, at every position that training used and as `routesae clamp` does.
    error_term: keep what the SAE fails to reconstruct. Raises WrongInput where SAE and LM do not belong together, for
    a latent or mode that there is not, and for soft routing, which has no inverse.
    """
    if mode not in CHANGES:
        raise WrongInput(f"mode {not_one_of(mode, CHANGES)}")
    made = [Change(latent=latent, how=mode, value=float(value)) for latent, value in changes.items()]
    kept = require_lm_of(sae, lm)
    clamp = Clamp(sae, made, error_term=error_term)
    if clamp.layers_read:
        require_cached_attention(lm.lm)
    return steering(lm.lm, clamp, kept)


# ------------------------------------------------------------------------- the commands, their settings as keywords
# Each takes what `routesae NAME --help` lists, with _ for -, as Python values or as one would type them.


def harvest(**settings: Any) -> Cache:
    """Run an LM once over a corpus: `harvest(model="demo", data="demo", tokens="200k", out="shards")`."""
    _, stored = _run("harvest", settings)
    return Cache(stored.storage.address)


def train(**settings: Any) -> list[SAE]:
    """Train SAEs: `train(cache="shards", sae="topk", layer=12, k=[32, 64])`, or `train(config="a.toml")`.

    Lists are swept, as repeated flags are. Returns every SAE of the settings, also one that resume found trained.
    """
    made, _ = _run("train", settings)
    return [load_sae(folder, device=made.device) for folder in folders(made)]


def analyze(**settings: Any) -> Table:
    """Score SAEs: `analyze(cache="shards", sae="saes/topk", metric=["NormMSE", "KLDiv"])`, a row for each.

    A row has the 95 % confidence intervals of its scores under "intervals".
    """
    return Table(_run("analyze", settings)[1]["saes"])


def contexts(**settings: Any) -> Table:
    """Collect the texts that latents are active on into the SAEs' folders: `contexts(sae="saes/topk")`."""
    return Table(_run("contexts", settings)[1])


def report(**settings: Any) -> Path:
    """Write the page of some SAEs, `report(html="page.html", model="demo")`, and return where it is."""
    path: Path = _run("report", settings)[1].path
    return path


def compare(a: str | Path | SAE, b: str | Path | SAE, **settings: Any) -> Comparison:
    """Which latents two SAEs share: `compare("saes/a", "saes/b", cache="shards", threshold=0.7)`."""
    found: Comparison = _run("compare", {"a": a, "b": b, **settings})[1]
    return found


def _plain(value: Any) -> Any:
    """A setting's value as one would type it: an SAE's folder, a cache's place, the numbers of NumPy or torch."""
    if isinstance(value, SAE):
        if value.folder is None:
            raise WrongInput("an SAE that was never saved has no folder to name; train or load one")
        return str(value.folder)
    if isinstance(value, Cache):
        return str(value.path)
    if isinstance(value, list | tuple | range):
        return [_plain(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _run(name: str, given: dict[str, Any]) -> tuple[Any, Any]:
    """The settings of a command, from keywords, and what its room makes of them, with a bar."""
    command: Any = main.commands[name]
    of, *more = map(imported, command.settings)
    settings = of.from_flags(by_field({key: _plain(one) for key, one in given.items()}, "keyword", of, *more))
    bars, paced = Bars(), Pacer()
    try:
        return settings, imported(command.room)(settings, lambda now: bars.show(now, paced(now)))
    finally:
        bars.close()
