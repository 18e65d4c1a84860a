"""Write the page of `routesae report`: one HTML file about SAEs that a browser opens from disk.

The page needs no network and no file beside it. Its data are JSON, gzip and base64 in script elements that no browser
runs: a list of latents for each SAE, which the page reads when it opens, and pieces of PIECE latents with their
contexts, which it reads as they are looked at. So the page opens fast however long it is, and corpus text cannot
become markup. Only the page's own script may run: its hash is in the page's content security policy.

What is shown of a latent: routesae.analyze.report.latents. The plots: routesae.analyze.report.plots.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from routesae import __version__
from routesae.analyze.inputs.lm import lm_of_cache, lm_of_sae, load_lm_of, load_tokenizer_of, require_same_lm_as_cache
from routesae.analyze.report.latents import PIECE, latent_list, latent_pieces, packed
from routesae.analyze.report.lens import LogitLens
from routesae.analyze.report.plots import draw_plots
from routesae.analyze.report.routes import routes_by_class
from routesae.analyze.report.runs import Run, read_runs, table_of
from routesae.analyze.report.settings import ReportSettings
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.storage import is_url
from routesae.machine.device import pick_device
from routesae.reporting import Report, WrongInput, silent, visible

if TYPE_CHECKING:
    from routesae.analyze.contexts.windows import Vocabulary

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
LIBRARIES = ("jinja2", "matplotlib")


class Page(NamedTuple):
    """The file written, its size, how many SAEs it compares and how many latents can be looked at in it."""

    path: Path
    bytes: int
    saes: int
    latents: int


def write_report(settings: ReportSettings, report: Report = silent) -> Page:
    """Write the page. Raises WrongInput where a library is missing, or a folder, cache or LM does not fit."""
    require_libraries()
    cache = None if settings.cache is None else Cache(settings.cache)
    tokens_hash = None if cache is None else cache.manifest.tokens_hash
    runs = read_runs(settings.saes, Path(settings.out), settings.scores, tokens_hash)
    device = pick_device(settings.device)
    cache = _open_cache(settings, runs)
    vocabulary, lens = _load_lm(settings, cache, runs)
    about: list[dict[str, Any]] = []
    lists: dict[str, str] = {}
    with tempfile.TemporaryFile("w+", encoding="ascii") as pieces:  # a line a piece: its id and its data
        for number, run in enumerate(runs):
            browsable, routes = run.contexts is not None, None
            if run.recipe.sae == "routesae" and cache is not None and vocabulary is not None:
                routes = routes_by_class(run.load(device), cache, vocabulary, report)
            about.append({"name": run.name, "latents": run.recipe.latents, "browsable": browsable, "routes": routes})
            if browsable:
                listed = latent_list(run)
                of_run = latent_pieces(run, listed, run.load(device), lens, settings.contexts, report)
                for at, piece in enumerate(of_run):
                    pieces.write(f"piece-{number}-{at} {packed(piece)}\n")
                lists[f"list-{number}"] = packed(listed)
        blocks = {"shared": packed({"piece": PIECE, "runs": about}), **lists}
        size = _render(Path(settings.html), runs, blocks, pieces, logits=lens is not None)
    return Page(Path(settings.html), size, len(runs), sum(one["latents"] for one in about if one["browsable"]))


def require_libraries() -> None:
    """Raises WrongInput where a library that draws the page is not installed."""
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        raise WrongInput(f"the report needs {' and '.join(missing)}: pip install 'routesae[report]'")


def _load_lm(
    settings: ReportSettings, cache: Cache | None, runs: Sequence[Run]
) -> tuple[Vocabulary | None, LogitLens | None]:
    """The vocabulary, for routing by token, and the logit lens, each where the settings allow it."""
    from routesae.analyze.contexts.windows import Vocabulary

    vocabulary = None
    if cache is not None and any(run.recipe.sae == "routesae" for run in runs):
        try:
            vocabulary = Vocabulary(load_tokenizer_of([lm_of_cache(cache)], settings.model))
        except WrongInput as refusal:
            if settings.cache is not None or settings.model is not None:
                raise
            log.warning("routing by token is left out: %s", refusal)
    of_saes = [lm_of_sae(run.folder, run.recipe) for run in runs]
    if cache is not None:
        for of_sae in of_saes:
            if warning := require_same_lm_as_cache(of_sae, lm_of_cache(cache)):
                log.warning("%s", warning)
    if settings.model is None:
        return vocabulary, None
    of_lm = [lm_of_cache(cache)] if cache is not None else of_saes
    loaded = load_lm_of(of_lm, settings.model, device=settings.device, lm_dtype=settings.lm_dtype)
    vocabulary = vocabulary or Vocabulary(loaded.tokenizer)
    texts = [  # a token that is a part of a character has no text of its own, only the vocabulary's name for it
        vocabulary.class_texts[number] if "\ufffd" in text else text
        for text, number in zip(vocabulary.texts, vocabulary.class_V.tolist(), strict=True)
    ]
    return vocabulary, LogitLens(loaded.lm, texts)


def _open_cache(settings: ReportSettings, runs: Sequence[Run]) -> Cache | None:
    """The cache asked for, or the one that all contexts came from if it is still there and unchanged."""
    if settings.cache is not None:
        cache = Cache(settings.cache)
        cache.require_whole()
        return cache
    sources = [run.contexts.facts["cache"] for run in runs if run.contexts is not None]
    places = {(source["path"], source.get("tokens_hash")) for source in sources}
    if len(places) != 1:
        return None
    ((path, tokens_hash),) = places
    if not is_url(path) and not Path(path).is_dir():
        return None
    try:
        cache = Cache(path)
        cache.require_whole()
    except WrongInput as refusal:
        log.warning("routing by token is left out: %s", refusal)
        return None
    return cache if cache.manifest.tokens_hash == tokens_hash else None


def _render(path: Path, runs: Sequence[Run], blocks: Mapping[str, str], pieces: IO[str], *, logits: bool) -> int:
    """Write the file under a dot-name, give it its name, and return its size in bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (PAGE / "page.js").read_text()
    columns, rows = table_of(runs)
    parts = environment.get_template("report.html.j2").generate(
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
            file.writelines(parts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def _lines(pieces: IO[str]) -> Iterator[tuple[str, str]]:
    pieces.seek(0)
    for line in pieces:
        name, data = line.rstrip("\n").split(" ", 1)
        yield name, data


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Model, corpus and tokens of the runs, those that are known."""
    values: dict[str, dict[str, None]] = {"model": {}, "corpus": {}, "tokens": {}}
    for run in runs:
        tokens = (run.source.get("cache") or {}).get("kept_tokens")
        for name in ("model", "corpus"):
            if run.source.get(name):
                values[name][visible(str(run.source[name]))] = None
        if tokens is not None:
            values["tokens"][f"{tokens:,}"] = None
    return [(name, ", ".join(of_runs)) for name, of_runs in values.items() if of_runs]
