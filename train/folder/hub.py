"""SAE folders on the Hugging Face hub: fetched by reference, pushed with a model card.

    user/repo                    the SAE at the top of a model repository
    user/repo/sub/folder         the SAE in a folder of it
    user/repo/sub/folder@v1      … at a branch, tag or commit

huggingface_hub is imported only when one of these is used. Only cfg.json and safetensors files are downloaded,
nothing that could run.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from routesae.harvest.settings import layer_list
from routesae.machine.files import problem_of
from routesae.reporting import FailedRun, WrongInput
from routesae.train.folder.checkpoint import CONFIG, METRICS_FILE, Source, load_sae, read_source
from routesae.train.saes import SAES, Recipe
from routesae.train.saes.crosscoder import CROSSCODER
from routesae.train.saes.routesae import ROUTER
from routesae.train.saes.single import WEIGHTS

log = logging.getLogger(__name__)

FILES = (CONFIG, WEIGHTS, ROUTER, CROSSCODER)  # all that an SAE may consist of
CARD = "README.md"
REPO = r"\w[\w.-]*/\w[\w.-]*"
REFERENCE = re.compile(rf"(?P<repo>{REPO})(?P<folder>(?:/\w[\w.-]*)*)(?:@(?P<revision>[\w./-]+))?")
REMEDY = "log in with `hf auth login`, or give a local folder"
REASONS = {
    "GatedRepoError": "its licence must be accepted on its page first",
    "RepositoryNotFoundError": "there is no such repository, or it wants a login",
    "RevisionNotFoundError": "there is no such revision",
    401: "it wants a login",
    403: "this login may not",
}
SCORES = {"norm_mse": "NormMSE", "fvu": "FVU", "l0": "L0", "dead": "Dead latents", "routing_entropy": "Entropy"}


class Reference(NamedTuple):
    """An SAE on the hub. folder: inside the repository, "" for its top. revision: None for the main branch."""

    repo: str
    folder: str
    revision: str | None

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name


def parse_reference(reference: str) -> Reference | None:
    """Return None for what is not user/repo[/folder][@revision], such as an absolute path."""
    found = REFERENCE.fullmatch(reference)
    return Reference(found["repo"], found["folder"].strip("/"), found["revision"]) if found else None


def fetch_sae(reference: str) -> Path:
    """Return the folder of an SAE: the local one of that name, or where the hub's was downloaded to.

    What can be neither is returned as it is, for its reader to refuse. Raises WrongInput if the hub has no such SAE
    or does not give it, FailedRun if it cannot be reached.
    """
    parsed = parse_reference(reference)
    if parsed is None or Path(reference).exists():
        return Path(reference)
    from huggingface_hub import snapshot_download

    log.info("fetching %s from the hub", reference)
    _quieten()
    with hub_errors(f"{reference} is not a folder here, and the hub does not give it"):
        snapshot = snapshot_download(
            parsed.repo, revision=parsed.revision, allow_patterns=[parsed.path(name) for name in FILES]
        )
    folder = Path(snapshot) / parsed.folder
    if not (folder / CONFIG).is_file():
        raise WrongInput(
            f"{reference} is not a folder here, and on the hub {parsed.repo} has no {parsed.path(CONFIG)}"
        )
    return folder


def push_sae(folder: Path, repo: str, *, private: bool = False, message: str | None = None) -> str:
    """Upload the SAE with a model card in one commit, creating the repository if there is none; return its URL.

    repo: user/repo, or user/repo/sub/folder. Raises WrongInput if `folder` is not an SAE or the hub refuses,
    FailedRun if it cannot be reached.
    """
    target = parse_reference(repo)
    if target is None or target.revision is not None:
        raise WrongInput(f"{repo!r} is not a repository such as user/name or user/name/folder")
    sae = load_sae(folder, torch.device("cpu"))  # refuses a folder that nobody could load again
    names = [CONFIG, *sae.files(), *[METRICS_FILE] * (folder / METRICS_FILE).is_file()]
    card = model_card(sae.recipe, read_source(folder), repo)
    from huggingface_hub import CommitOperationAdd, HfApi

    _quieten()
    added = [CommitOperationAdd(target.path(name), folder / name) for name in names]
    added.append(CommitOperationAdd(target.path(CARD), card.encode()))
    with hub_errors(f"the hub does not take {folder} as {repo}"):
        api = HfApi(library_name="routesae")
        url = api.create_repo(target.repo, private=private or None, exist_ok=True)
        api.create_commit(target.repo, added, commit_message=message or f"{folder.name}, by routesae push")
    return f"{url}/tree/main/{target.folder}" if target.folder else str(url)


def _quieten() -> None:
    """Silence its warnings, which become one error here, and its bars if there is no terminal."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its import has set another
    if not os.isatty(2):
        disable_progress_bars()


@contextmanager
def hub_errors(what: str, remedy: str = REMEDY) -> Iterator[None]:
    """Turn huggingface_hub's errors into one line: WrongInput if the hub refuses, FailedRun if it cannot answer."""
    from huggingface_hub.errors import HfHubHTTPError

    transport: type[Exception] = HfHubHTTPError.__bases__[0]  # httpx' or httpx2's, by huggingface_hub's version
    try:
        yield
    except WrongInput:
        raise
    except (transport, OSError, ValueError) as error:  # ValueError: a name or a commit that the hub finds malformed
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(answer, HfHubHTTPError):
            status = answer.response.status_code
            reason = REASONS.get(type(answer).__name__) or REASONS.get(status) or problem_of(answer).rstrip(".")
            line = f"{what}: {reason} ({status}); {remedy}"
            raise (FailedRun(line) if status >= 500 or status == 429 else WrongInput(line)) from error
        line = f"{what} ({problem_of(error).rstrip('.')}); {remedy}"
        raise (WrongInput(line) if isinstance(error, ValueError) else FailedRun(line)) from error


def model_card(recipe: Recipe, source: Source, repo: str) -> str:
    """README.md of the SAE: what it is, how it scored and how to load it."""
    facts = {
        "Language model": source.model or "not recorded",
        "Corpus": source.corpus or "not recorded",
        "Layers": f"{layer_list(recipe.layers)}, the outputs of decoder blocks counted from 1",
        "Variant": recipe.sae,
        "Latents": f"{recipe.latents:,} over a width of {recipe.width:,}",
        "k": recipe.k,
        "Input normalisation": recipe.normalize,
    }
    if recipe.sae == "routesae":
        facts |= {"Routing": f"{recipe.routing}, {recipe.aggregate}, router {recipe.router}", "Shared": recipe.routed}
    header = ["---", "library_name: routesae", "tags:", "- sparse-autoencoder", "- interpretability", "- saelens"]
    if source.model and re.fullmatch(REPO, source.model):  # the hub refuses cards that name a local path
        header.append(f'base_model: "{source.model}"')
    parts = [
        "\n".join([*header, "---"]),
        f"# {repo.rpartition('/')[2]}",
        f"A sparse autoencoder ({recipe.sae}) trained with routesae.",
        _table(("", ""), facts),
    ]
    held_out = source.held_out or {}
    numbers = {title: held_out.get(key) for key, title in SCORES.items()}
    if rows := {title: f"{number:.4f}" for title, number in numbers.items() if isinstance(number, float | int)}:
        tokens = f"{count:,} " if isinstance(count := held_out.get("tokens"), int) else ""
        parts += [f"## On {tokens}held-out tokens", _table(("Metric", "Value"), rows)]
    parts += ["## How to load it", f"    routesae analyze --cache shards/ --sae {repo}", "In Python:"]
    fetch = "    from routesae.train.folder.hub import fetch_sae\n"
    parts.append(f"""    import torch
    from routesae.train.folder.checkpoint import load_sae
{fetch}
    sae = load_sae(fetch_sae("{repo}"), torch.device("cpu"))""")
    if what := SAES[recipe.sae].lens_opens:
        parts.append(f"{what} opens in SAELens as it is:")
        parts.append(f'{fetch}    from sae_lens import SAE\n\n    sae = SAE.load_from_disk(fetch_sae("{repo}"))')
    else:
        parts.append(f"SAELens cannot hold a {recipe.sae}.")
    return "\n\n".join(parts) + "\n"


def _table(heads: tuple[str, str], rows: Mapping[str, Any]) -> str:
    cells = {name: str(value).replace("|", "\\|").replace("\n", " ") for name, value in rows.items()}
    lines = [f"| {name} | {cell} |" for name, cell in cells.items()]
    return "\n".join([f"| {heads[0]} | {heads[1]} |", "|---|---|", *lines])
