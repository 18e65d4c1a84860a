"""Write the page of `routesae report`: one HTML file about SAEs that a browser opens from disk.

The page needs no network and no file beside it. Its data are JSON, gzip and base64 in script elements that no browser
runs: a list of latents for each SAE, which the page reads when it opens, and pieces of PIECE latents with their
contexts, which it reads as they are looked at. So the page opens fast however long it is, and corpus text cannot
become markup. Only the page's own script may run: its hash is in the page's content security policy.

What is shown of a latent: routesae.analyze.report.latents. The plots: routesae.analyze.report.plots.
"""

import base64
import hashlib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from http.server import ThreadingHTTPServer
from itertools import permutations
from pathlib import Path
from typing import IO, Any, NamedTuple

from torch import Tensor
from torch.nn.functional import normalize

from routesae import __version__
from routesae.analyze.contexts.windows import Vocabulary
from routesae.analyze.inputs.lm import LM, LMRecord, lm_of_sae, load_lm_of, place_of_lm
from routesae.analyze.report.latents import PIECE, latent_list, latent_pairs, latent_pieces, packed
from routesae.analyze.report.lens import LogitLens
from routesae.analyze.report.plots import draw_plots
from routesae.analyze.report.runs import Run, read_runs, table_of
from routesae.analyze.report.serve import asking, page_server
from routesae.analyze.report.settings import ReportSettings
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device, require_packages
from routesae.machine.files import replacing
from routesae.reporting import Report, WrongInput, silent, visible
from routesae.train.saes import SAE

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
PAIRED = 6  # SAEs at most whose latents are paired, each with each
DEMO = "demo"
NAMES = {"model": "SmolLM2-135M-Instruct", "corpus": "BBC news"}  # of the demo's


class Page(NamedTuple):
    """The file written, its size, how many SAEs it compares and how many latents can be looked at in it.

    server: serves it, with --serve.
    """

    path: Path
    bytes: int
    saes: int
    latents: int
    server: ThreadingHTTPServer | None = None


def write_report(settings: ReportSettings, report: Report = silent) -> Page:
    """Write the page. Raises WrongInput where a library is missing, or a folder, cache or LM does not fit."""
    require_packages("the report", "report", "jinja2", "matplotlib")
    tokens_hash = None if settings.cache is None else Cache(settings.cache).manifest.tokens_hash
    runs = read_runs(settings.saes, Path(settings.out), settings.scores, tokens_hash)
    lm = _load_lm(settings, runs)
    lens = None if lm is None or not settings.logits else _lens_of(lm)
    saes: dict[int, SAE] = {}  # those that are served
    device = pick_device(settings.device)
    about: list[dict[str, Any]] = []
    lists: dict[str, str] = {}
    decoders: dict[int, Tensor] = {}  # unit rows of those whose latents are paired
    with tempfile.TemporaryFile("w+", encoding="ascii") as pieces:  # a line a block: its id and its data
        for number, run in enumerate(runs):
            routes = None if run.contexts is None else run.contexts.facts.get("routes") or None
            known = {"name": run.name, "latents": run.recipe.latents, "layer": run.recipe.layers[0], "routes": routes}
            about.append({**known, "browsable": run.contexts is not None, "pairs": []})
            if run.contexts is None:
                continue
            sae, listed = run.load(device), latent_list(run)
            if settings.serve:
                saes[number] = sae
            for at, piece in enumerate(latent_pieces(run, listed, sae, lens, settings.contexts, report)):
                pieces.write(f"piece-{number}-{at} {packed(piece)}\n")
            lists[f"list-{number}"] = packed(listed)
            if len(decoders) < PAIRED and run.recipe.sae != "crosscoder":  # which writes to several layers
                decoders[number] = normalize(sae.dictionary.W_dec_FD.detach())
        for one, other in permutations(decoders, 2):
            first, second = runs[one].recipe, runs[other].recipe
            if set(first.layers) & set(second.layers) and first.width == second.width:
                about[one]["pairs"].append(other)
                pieces.write(f"pairs-{one}-{other} {packed(latent_pairs(decoders[one], decoders[other]))}\n")
        blocks = {"shared": packed({"piece": PIECE, "runs": about}), **lists}
        size = _render(Path(settings.html), runs, blocks, pieces, logits=lens is not None, served=settings.serve)
    count = sum(one["latents"] for one in about if one["browsable"])
    ask = asking(lm, saes) if settings.serve and lm is not None else None
    server = None if ask is None else page_server(Path(settings.html), ask, settings.port)
    return Page(Path(settings.html), size, len(runs), count, server)


def _load_lm(settings: ReportSettings, runs: Sequence[Run]) -> LM | None:
    """The LM that is asked for, or the SAEs' own if it is at hand; None if it is not, or for nothing."""
    browsable = any(run.contexts for run in runs)
    if settings.serve and not browsable:
        raise WrongInput("--serve: no SAE here has contexts; run routesae contexts")
    if not browsable or not (settings.logits or settings.serve):
        return None
    of_saes = [lm_of_sae(run.folder, run.recipe) for run in runs]
    try:
        model = settings.model or _at_hand(of_saes[0])
        return load_lm_of(of_saes, model, settings)
    except WrongInput as refusal:
        if settings.model is not None or settings.serve:
            raise
        log.warning("logit effects are left out: %s", refusal)
        return None


def _lens_of(lm: LM) -> LogitLens:
    vocabulary = Vocabulary(lm.tokenizer)
    texts = [  # a token that is a part of a character has no text of its own, only the vocabulary's name for it
        vocabulary.class_texts[number] if "\ufffd" in text else text
        for text, number in zip(vocabulary.texts, vocabulary.class_V.tolist(), strict=True)
    ]
    return LogitLens(lm.lm, texts)


def _at_hand(recorded: LMRecord) -> str:
    """Where an SAE's own LM can be loaded from without a download. Raises WrongInput if it cannot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    model, revision = place_of_lm(recorded, None)
    if model == DEMO or Path(model).expanduser().exists():
        return model
    try:
        return snapshot_download(model, revision=revision, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        raise WrongInput(f"{visible(model)} is not on this machine; --model {visible(model)} downloads it") from None


def _render(path: Path, runs: Sequence[Run], blocks: Mapping[str, str], pieces: IO[str], **shown: bool) -> int:
    """Write the file, whole or not at all, and return its size in bytes."""
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
    pieces.seek(0)
    parts = environment.get_template("report.html.j2").generate(
        version=__version__,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((PAGE / "page.css").read_text()),
        runs=runs,
        columns=columns,
        rows=rows,
        plots=draw_plots(runs),
        routed=any(run.contexts and run.contexts.facts.get("routes") for run in runs),
        browsable=any(run.contexts is not None for run in runs),
        **shown,
        facts=_facts(runs),
        blocks=blocks.items(),
        pieces=(line.split() for line in pieces),
    )
    with replacing(path) as file:
        file.writelines(part.encode() for part in parts)
    return path.stat().st_size


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Model, corpus and tokens of the runs, those that are known."""
    values: dict[str, dict[str, None]] = {"model": {}, "corpus": {}, "tokens": {}}
    for run in runs:
        for name, value in (("model", run.source.model), ("corpus", run.source.corpus)):
            if value:
                values[name][NAMES[name] if value == DEMO else visible(value)] = None
        if isinstance(tokens := run.source.cache.get("kept_tokens"), int):
            values["tokens"][f"{tokens:,}"] = None
    return [(name, ", ".join(of_runs)) for name, of_runs in values.items() if of_runs]
