"""The stage report: SAE folders and what lies in them in; one HTML file that a browser opens from disk, out.

The page needs no network and no file beside it. Its data are JSON, gzip and base64 in script elements that no browser
runs: a list of latents an SAE, which the page reads when it opens, and pieces of PIECE latents with their contexts,
which it reads when one is looked at. So the page opens fast however long it is, and corpus text cannot become markup.
Only the page's own script may run: its hash is in the page's content security policy.

What is shown of a latent: routesae.analyze.report.latents. The plots: routesae.analyze.report.plots.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from routesae import __version__
from routesae.analyze.report.latents import PIECE, Shown, latent_pieces, packed
from routesae.analyze.report.lens import LogitLens
from routesae.analyze.report.plots import draw_plots
from routesae.analyze.report.routes import routes_by_class
from routesae.analyze.report.runs import Run, read_runs, table_of
from routesae.analyze.report.settings import ReportSettings
from routesae.analyze.scores.run import load_harvested_lm, load_harvested_tokenizer
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.store.folder import is_url
from routesae.machine.device import pick_device, pick_lm_dtype
from routesae.reporting import Report, WrongInput, silent

if TYPE_CHECKING:
    from jinja2 import Template

    from routesae.analyze.contexts.windows import Vocabulary

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
LIBRARIES = ("jinja2", "matplotlib")


class Page(NamedTuple):
    """The file written, its size, and how many latents of how many SAEs can be looked at in it."""

    path: Path
    bytes: int
    saes: int
    latents: int


def write_report(settings: ReportSettings, report: Report = silent) -> Page:
    """Write the page. Raises WrongInput where a library is missing, or a folder, cache or LM does not fit."""
    require_libraries()
    runs = read_runs(settings.saes, Path(settings.out), settings.scores)
    sources = _sources(settings, runs)
    routes = [_routes(run, settings, sources, report) for run in runs]
    with tempfile.TemporaryFile("w+", encoding="ascii") as pieces:
        lists = []
        for number, run in enumerate(runs):
            shown = _write_pieces(number, run, settings, sources, pieces, report)
            lists.append(None if shown is None else packed(shown.columns))
        blocks = {f"list-{number}": data for number, data in enumerate(lists) if data is not None}
        blocks = {"shared": packed(_shared(runs, routes)), **blocks}
        size = _render(Path(settings.html), runs, blocks, pieces, logits=sources.lens is not None)
    browsable = [run.recipe.latents for run, data in zip(runs, lists, strict=True) if data is not None]
    return Page(Path(settings.html), size, len(runs), sum(browsable))


def require_libraries() -> None:
    """Raises WrongInput where what draws the page is not installed."""
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        raise WrongInput(f"the report needs {' and '.join(missing)}: pip install 'routesae[report]'")


class Sources(NamedTuple):
    """What is not in the SAEs' folders, each only where it could be had."""

    cache: Cache | None
    vocabulary: Vocabulary | None
    lens: LogitLens | None


def _sources(settings: ReportSettings, runs: Sequence[Run]) -> Sources:
    from routesae.analyze.contexts.windows import Vocabulary
    from routesae.harvest.lm import model as lm

    cache, vocabulary, lens = _cache(settings, runs), None, None
    if cache is not None and any(run.recipe.sae == "routesae" for run in runs):
        try:
            vocabulary = Vocabulary(load_harvested_tokenizer(cache, settings.model or cache.manifest.model))
        except WrongInput as refusal:
            if settings.cache is not None or settings.model is not None:
                raise
            log.warning("routing by token is left out: %s", refusal)
    if settings.model is not None:
        if cache is not None:
            model = load_harvested_lm(cache, settings.model, settings.device, settings.lm_dtype)
        else:
            device = pick_device(settings.device)
            dtype = pick_lm_dtype(settings.lm_dtype, device)
            model = lm.load_lm(settings.model, device=device, lm_dtype=dtype)
        vocabulary = vocabulary or Vocabulary(lm.load_tokenizer(settings.model))
        lens = LogitLens(model, vocabulary.texts)
        for run in runs:
            if run.recipe.width != model.width:
                raise WrongInput(f"{run.folder} is of width {run.recipe.width}, {settings.model} of {model.width}")
    return Sources(cache, vocabulary, lens)


def _cache(settings: ReportSettings, runs: Sequence[Run]) -> Cache | None:
    """The one asked for, or the one all contexts came from, where it is still there and still that one."""
    if settings.cache is not None:
        cache = Cache(settings.cache)
        cache.require_whole()
        return cache
    read = {(facts["path"], facts.get("tokens_hash")) for facts in _caches_read(runs)}
    if len(read) != 1:
        return None
    ((path, tokens_hash),) = read
    if not is_url(path) and not Path(path).is_dir():
        return None
    try:
        cache = Cache(path)
        cache.require_whole()
    except WrongInput as refusal:
        log.warning("routing by token is left out: %s", refusal)
        return None
    return cache if cache.manifest.tokens_hash == tokens_hash else None


def _caches_read(runs: Sequence[Run]) -> list[Mapping[str, Any]]:
    return [run.contexts.facts["cache"] for run in runs if run.contexts is not None]


def _routes(run: Run, settings: ReportSettings, sources: Sources, report: Report) -> dict[str, Any] | None:
    if run.recipe.sae != "routesae" or sources.cache is None or sources.vocabulary is None:
        return None
    sae = run.load(pick_device(settings.device))
    return routes_by_class(sae, sources.cache, sources.vocabulary, report)._asdict()


def _write_pieces(
    number: int, run: Run, settings: ReportSettings, sources: Sources, pieces: IO[str], report: Report
) -> Shown | None:
    """One line a piece: its id and its data. None where the SAE has no contexts."""
    if run.contexts is None:
        return None
    shown = Shown(run, settings.contexts)
    sae = run.load(pick_device(settings.device))
    for at, piece in enumerate(latent_pieces(shown, sae, sources.lens, report)):
        pieces.write(f"piece-{number}-{at} {packed(piece)}\n")
    return shown


def _shared(runs: Sequence[Run], routes: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    return {
        "piece": PIECE,
        "runs": [
            {
                "name": run.name,
                "latents": run.recipe.latents,
                "browsable": run.contexts is not None,
                "routes": by_class,
            }
            for run, by_class in zip(runs, routes, strict=True)
        ],
    }


# ------------------------------------------------------------------------------------------------- the page


def _render(path: Path, runs: Sequence[Run], blocks: Mapping[str, str], pieces: IO[str], *, logits: bool) -> int:
    """Write the file under a dot-name, then give it its name; its bytes."""
    from markupsafe import Markup

    script = (PAGE / "page.js").read_text()
    columns, rows = table_of(runs)
    parts = _template().generate(
        version=__version__,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((PAGE / "page.css").read_text()),
        runs=runs,
        columns=columns,
        rows=rows,
        plots=draw_plots(runs),
        routed=any(run.recipe.sae == "routesae" for run in runs),
        browsable=any(run.contexts is not None for run in runs),
        logits=logits,
        facts=_facts(runs),
        blocks=blocks.items(),
        pieces=_lines(pieces),
    )
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            _write_all(file, parts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(PAGE)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    return environment.get_template("report.html.j2")


def _write_all(file: IO[str], parts: Iterable[str]) -> None:
    for part in parts:
        file.write(part)


def _lines(pieces: IO[str]) -> Iterator[tuple[str, str]]:
    pieces.seek(0)
    for line in pieces:
        name, data = line.rstrip("\n").split(" ", 1)
        yield name, data


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What all the runs came from, a line each: model, corpus, tokens."""
    found: dict[str, dict[str, None]] = {"model": {}, "corpus": {}, "tokens": {}}
    for run in runs:
        cache = run.source.get("cache") or {}
        for name, value in (("model", run.source.get("model")), ("corpus", run.source.get("corpus"))):
            if value:
                found[name][str(value)] = None
        if "kept_tokens" in cache:
            found["tokens"][f"{cache['kept_tokens']:,}"] = None
    return [(name, ", ".join(values)) for name, values in found.items() if values]
