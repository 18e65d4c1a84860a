"""SAE folders on the Hugging Face hub: a reference in, a folder here out; and a folder in, a repository out.

    user/repo                    the SAE at the top of a model repository
    user/repo/sub/folder         the SAE in a folder of it
    user/repo/sub/folder@v1      … as a branch, tag or commit has it

huggingface_hub is imported only when one of these is asked for. Downloaded are cfg.json and the safetensors files,
nothing that could run.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from routesae.reporting import FailedRun, WrongInput
from routesae.train.folder.checkpoint import CONFIG, METRICS_FILE, load_sae, read_config
from routesae.train.saes import Recipe
from routesae.train.saes.crosscoder import CROSSCODER
from routesae.train.saes.routesae import ROUTER
from routesae.train.saes.single import WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

log = logging.getLogger(__name__)

FILES = (CONFIG, WEIGHTS, ROUTER, CROSSCODER)  # all that an SAE may consist of
CARD = "README.md"
SAE_LENS_OPENS = ("vanilla", "gated", "topk", "batchtopk", "jumprelu", "matryoshka", "routesae")
REFERENCE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<folder>(?:/\w[\w.-]*)*)(?:@(?P<revision>[\w./-]+))?")
WAYS_OUT = "log in with `hf auth login`, or give a local folder"


class Reference(NamedTuple):
    """An SAE on the hub. folder: inside the repository, "" for its top. revision: None for the main branch."""

    repo: str
    folder: str
    revision: str | None

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name


def parse_reference(reference: str) -> Reference | None:
    """None where it is no user/repo[/folder][@revision], such as an absolute path."""
    found = REFERENCE.fullmatch(reference)
    return Reference(found["repo"], found["folder"].strip("/"), found["revision"]) if found else None


def fetch_sae(reference: str) -> Path:
    """The folder of an SAE: the local one of that name, or where the hub's was downloaded to.

    What can be neither is given back as it is, for whoever reads it to refuse. Raises WrongInput where the hub has no
    such SAE or does not give it, FailedRun where it cannot be reached.
    """
    wanted = parse_reference(reference)
    if wanted is None or Path(reference).exists():
        return Path(reference)
    from huggingface_hub import snapshot_download

    log.info("fetching %s from the hub", reference)
    _quieten()
    with _hub_errors(f"{reference} is no folder here, and the hub does not give it"):
        snapshot = snapshot_download(
            wanted.repo, revision=wanted.revision, allow_patterns=[wanted.path(name) for name in FILES]
        )
    folder = Path(snapshot) / wanted.folder
    if not (folder / CONFIG).is_file():
        raise WrongInput(f"{reference} is no folder here, and on the hub {wanted.repo} has no {wanted.path(CONFIG)}")
    return folder


def push_sae(folder: Path, repo: str, *, private: bool = False, message: str | None = None) -> str:
    """Create the repository where there is none, and upload the SAE with a model card in one commit. Gives its URL.

    repo: user/repo, or user/repo/sub/folder. Raises WrongInput where `folder` is no SAE or the hub refuses,
    FailedRun where it cannot be reached.
    """
    target = parse_reference(repo)
    if target is None or target.revision is not None:
        raise WrongInput(f"{repo!r} is no repository such as user/name or user/name/folder")
    sae = load_sae(folder, torch.device("cpu"))  # refuses a folder that nobody could load again
    names = [CONFIG, *sae.files(), *[METRICS_FILE] * (folder / METRICS_FILE).is_file()]
    card = model_card(sae.recipe, read_config(folder), repo)
    from huggingface_hub import CommitOperationAdd, HfApi

    _quieten()
    added = [CommitOperationAdd(target.path(name), folder / name) for name in names]
    added.append(CommitOperationAdd(target.path(CARD), card.encode()))
    with _hub_errors(f"the hub does not take {folder} as {repo}"):
        api = HfApi(library_name="routesae")
        url = api.create_repo(target.repo, private=private or None, exist_ok=True)
        api.create_commit(target.repo, added, commit_message=message or f"{folder.name}, by routesae push")
    return f"{url}/tree/main/{target.folder}" if target.folder else str(url)


def _quieten() -> None:
    """No warnings of what is reported, once, as an error; no bars where there is no terminal."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its import has set another
    if not os.isatty(2):
        disable_progress_bars()


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Errors of huggingface_hub in one line: WrongInput where the hub refuses, FailedRun where it cannot answer."""
    from huggingface_hub.errors import HfHubHTTPError

    transport: type[Exception] = HfHubHTTPError.__bases__[0]  # httpx' or httpx2's, by huggingface_hub's version
    try:
        yield
    except (transport, OSError, ValueError) as error:  # ValueError: a name or a commit that the hub finds malformed
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(answer, HfHubHTTPError):
            status = answer.response.status_code
            line = f"{what}: {_reason(answer)} ({status}); {WAYS_OUT}"
            raise (FailedRun(line) if status >= 500 or status == 429 else WrongInput(line)) from error
        line = f"{what} ({_first_line(error)}); {WAYS_OUT}"
        raise (WrongInput(line) if isinstance(error, ValueError) else FailedRun(line)) from error


def _reason(answer: HfHubHTTPError) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(answer, GatedRepoError):
        return "its licence must be accepted on its page first"
    if isinstance(answer, RepositoryNotFoundError):
        return "there is no such repository, or it wants a login"
    if isinstance(answer, RevisionNotFoundError):
        return "there is no such revision"
    by_status = {401: "it wants a login", 403: "this login may not"}
    return by_status.get(answer.response.status_code) or _first_line(answer)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def model_card(recipe: Recipe, config: Mapping[str, Any], repo: str) -> str:
    """README.md of the SAE: what it is, how it scored and how to load it, from its cfg.json."""
    metadata = config.get("metadata") or {}
    source = (metadata.get("routesae") or {}).get("source") or {}
    model = source.get("model") or metadata.get("model_name")
    corpus = source.get("corpus") or metadata.get("dataset_path")
    layers = str(recipe.layers[0]) if len(recipe.layers) == 1 else f"{recipe.layers[0]}-{recipe.layers[-1]}"
    facts = {
        "Language model": model or "not recorded",
        "Corpus": corpus or "not recorded",
        "Layers": f"{layers}, the outputs of decoder blocks counted from 1",
        "Variant": recipe.sae,
        "Latents": f"{recipe.latents:,} over a width of {recipe.width:,}",
        "k": recipe.k,
        "Input normalisation": recipe.normalize,
    }
    if recipe.sae == "routesae":
        facts |= {"Routing": f"{recipe.routing}, {recipe.aggregate}, router {recipe.router}", "Shared": recipe.routed}
    parts = [
        _header(model),
        f"# {repo.rpartition('/')[2]}",
        f"A sparse autoencoder ({recipe.sae}) trained with routesae.",
        _table(("", ""), facts),
        _scores(source.get("held_out")),
        f"## How to load it\n\n    routesae analyze --cache shards/ --sae {repo}",
        "In Python:\n\n" + _loading(recipe, repo),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(model: object) -> str:
    """YAML. base_model only where it is a hub id: the hub refuses cards that name a local path."""
    lines = ["---", "library_name: routesae", "tags:", "- sparse-autoencoder", "- interpretability", "- saelens"]
    if isinstance(model, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        lines += [f'base_model: "{model}"']
    return "\n".join([*lines, "---"])


def _table(heads: tuple[str, str], rows: Mapping[str, Any]) -> str:
    cells = {name: str(value).replace("|", "\\|").replace("\n", " ") for name, value in rows.items()}
    lines = [f"| {name} | {cell} |" for name, cell in cells.items()]
    return "\n".join([f"| {heads[0]} | {heads[1]} |", "|---|---|", *lines])


def _scores(held_out: object) -> str:
    if not isinstance(held_out, Mapping):
        return ""
    named = {"norm_mse": "NormMSE", "fvu": "FVU", "l0": "L0", "dead": "Dead latents", "routing_entropy": "Entropy"}
    numbers = {title: held_out.get(key) for key, title in named.items()}
    rows = {title: f"{number:.4f}" for title, number in numbers.items() if isinstance(number, float | int)}
    tokens = held_out.get("tokens")
    head = f"## On {tokens:,} held-out tokens" if isinstance(tokens, int) else "## On held-out tokens"
    return f"{head}\n\n{_table(('Metric', 'Value'), rows)}" if rows else ""


def _loading(recipe: Recipe, repo: str) -> str:
    ours = f"""    import torch
    from routesae.train.folder.checkpoint import load_sae
    from routesae.train.folder.hub import fetch_sae

    sae = load_sae(fetch_sae("{repo}"), torch.device("cpu"))"""
    if recipe.sae not in SAE_LENS_OPENS:
        return f"{ours}\n\nSAELens has no word for a {recipe.sae}."
    what = "The SAE that its layers share" if recipe.sae == "routesae" else "It"
    lens = f"""    from routesae.train.folder.hub import fetch_sae
    from sae_lens import SAE

    sae = SAE.load_from_disk(fetch_sae("{repo}"))"""
    return f"{ours}\n\n{what} opens in SAELens as it is:\n\n{lens}"
