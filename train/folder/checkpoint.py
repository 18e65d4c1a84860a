"""An SAE on disk: a folder that SAELens v6 opens as it is, with what SAELens cannot hold in files beside it.

    sae_weights.safetensors   W_enc [D, F], W_dec [F, D], b_dec [D] and [F]-shaped b_enc, threshold, b_gate …, float32
    cfg.json                  SAELens' configuration; ours is under metadata.routesae: the Recipe and its source
    router.safetensors        routesae only: router [L, D], one row a routed layer
    crosscoder.safetensors    a crosscoder's weights instead: W_enc [L, D, F], W_dec [F, L, D], b_enc, b_dec [L, D]

Never pickle. Dimension letters: D width, F latents, L layers.
"""

import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from routesae.harvest.cache.arrays import fsync, fsync_tree
from routesae.machine.files import read_json, reading, signed, write_json
from routesae.reporting import WrongInput
from routesae.train.folder.saelens import OFF, LensConfig, lens_config
from routesae.train.folder.tensors import read_tensors, write_tensors
from routesae.train.saes import SAE, Recipe, build
from routesae.train.saes.crosscoder import CROSSCODER
from routesae.train.saes.routesae import ROUTER
from routesae.train.saes.single import WEIGHTS

log = logging.getLogger(__name__)

CONFIG, METRICS_FILE, REPLACED = "cfg.json", "metrics.jsonl", "replaced"
# All that train writes into an SAE's folder, so all that it deletes when it replaces the SAE.
WRITTEN = {CONFIG, METRICS_FILE, WEIGHTS, ROUTER, CROSSCODER, "tensorboard", "wandb", "wandb-run", "trackio-run"}
COPY_WHOLE = "copy the SAE's folder whole"
ALTERED = "is not what was saved; copy the SAE again, or make one of what it is now: routesae convert FOLDER"

# A file of each layout of other tools that SAELens reads → SAELens' name of its loader.
LAYOUTS = {
    "params.npz": "gemma_2",
    "hyperparams.json": "llama_scope",
    "sae.safetensors": "sparsify",
    "ae.pt": "dictionary_learning_1",
}

Numbers = dict[str, int | float | dict[str, float] | None]  # a line of metrics.jsonl, or scores on the held-out rows


class Source(BaseModel):
    """What cfg.json says an SAE was trained from; of one from elsewhere at most model and corpus.

    cache: its manifest. identity: all that decided the training. held_out: scores on the rows held out.
    """

    model_config = ConfigDict(strict=True)
    model: str | None = None
    corpus: str | None = None
    cache: dict[str, Any] = {}
    identity: dict[str, Any] = {}
    held_out: Numbers | None = None


def other_layout(folder: Path) -> str | None:
    """SAELens' name of the loader that reads `folder`, or None if the folder is in none of LAYOUTS."""
    return next((loader for name, loader in LAYOUTS.items() if (folder / name).is_file()), None)


def save_sae(folder: Path, sae: SAE, source: Mapping[str, Any]) -> None:
    """Write `sae` into the existing folder. source: what it was trained from, kept under metadata.routesae."""
    sae.hashes = {name: write_tensors(folder / name, tensors) for name, tensors in sae.files().items()}
    ours = signed({"recipe": sae.recipe.to_dict(), "source": dict(source), "files": sae.hashes})
    write_json(folder / CONFIG, lens_config(sae, ours, source))


def commit_folder(written: Path, folder: Path) -> None:
    """Rename the finished `written` to `folder`, safely on the disk; an SAE of that name stays until then.

    It is then deleted, unless its folder holds what train did not write, such as answers that were paid for: then it
    is kept as replaced/NAME-N beside the others, with all that belongs to it.
    """
    fsync_tree(written)
    aside = folder.parent / REPLACED
    if replaces := folder.exists():
        aside.mkdir(exist_ok=True)
        kept = next(place for n in count(1) if not (place := aside / f"{folder.name}-{n}").exists())
        folder.rename(kept)
    written.rename(folder)
    fsync(folder.parent)
    if replaces and (others := sorted(path.name for path in kept.iterdir() if path.name not in WRITTEN)):
        log.warning("the SAE that was %s is kept as %s, for the sake of %s", folder, kept, ", ".join(others[:3]))
    elif replaces:
        shutil.rmtree(kept)
        with suppress(OSError):  # holds others
            aside.rmdir()


def load_sae(folder: Path, device: torch.device) -> SAE:
    """The SAE in `folder`, ours or SAELens', on `device`. Its `hashes` are of the bytes that it was read from.

    Raises WrongInput if something is missing, cut, altered or not finite, or would change the numbers and is not
    understood.
    """
    config = read_config(folder)
    recipe, lens = _described(folder, config)
    try:
        # Allocate only what the weights really hold, not what a stranger's cfg.json says.
        with torch.device("meta"):
            sae = build(recipe)
        expected = sae.files()
        read = {}
        for name in expected:
            with reading(folder / name, "train the SAE again or copy it whole"):
                read[name] = read_tensors(folder / name)
        saved = {} if lens is not None else config["metadata"]["routesae"].get("files", {})
        for name, file in read.items():
            if saved and saved.get(name) != file.hash:
                raise WrongInput(f"{name} {ALTERED}")
        sae.load_files({name: lens.tensors(file.tensors) if lens else file.tensors for name, file in read.items()})
        for name, file in read.items():
            if unknown := sorted(file.tensors.keys() - expected[name].keys()):
                raise WrongInput(f"{name} holds {unknown[0]}, which is not understood here for a {recipe.sae}")
            if bad := [key for key, tensor in file.tensors.items() if not bool(tensor.isfinite().all())]:
                raise WrongInput(f"{name}: {bad[0]} holds NaN or infinite values; the training that made it diverged")
        sae.hashes = {name: file.hash for name, file in read.items()}
    except KeyError as missing:
        raise WrongInput(f"{folder / WEIGHTS} holds no {missing}; save the SAE again or copy it whole") from None
    except WrongInput as error:
        raise error if str(folder) in str(error) else WrongInput(f"{folder}: {error}") from error
    for module in sae.modules():  # buffers that only training needs are in no file
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    sae.folder = folder
    return sae.requires_grad_(False).eval().to(device)


def read_recipe(folder: Path) -> Recipe:
    """What the SAE in `folder` is built from. Raises WrongInput if cfg.json does not say."""
    return _described(folder, read_config(folder))[0]


def _described(folder: Path, config: Mapping[str, Any]) -> tuple[Recipe, LensConfig | None]:
    """The recipe, and SAELens' configuration if the SAE is not ours."""
    metadata = config.get("metadata")
    try:
        if isinstance(metadata, dict) and "routesae" in metadata:
            recipe = Recipe(**metadata["routesae"]["recipe"])
            with torch.device("meta"):
                fields = lens_config(build(recipe), {}, {})
            for name in sorted((config.keys() | fields.keys()) - {"dtype", "device", "metadata"}):
                if config.get(name) != fields.get(name):
                    raise WrongInput(f"{name} {config.get(name)!r} {ALTERED}")
            return recipe, None
        lens = LensConfig.model_validate(config)
        for name, value in (lens.metadata.model_from_pretrained_kwargs or {}).items():
            if value not in OFF:
                log.warning("%s was trained on an LM loaded with %s=%r, a cache's LM is not", folder, name, value)
        return lens.recipe(), lens
    except ValidationError as error:
        first = error.errors()[0]
        field, value = ".".join(map(str, first["loc"])), repr(first["input"])[:80]
        reason = first["msg"].removeprefix("Value error, ")
        reason += "" if "metadata" in config else f"; routesae convert {folder} reads what older SAELens wrote"
        raise WrongInput(f"{folder / CONFIG}: {f'{field} {value}: ' if field else ''}{reason}") from error
    except WrongInput as error:
        raise WrongInput(f"{folder / CONFIG}: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """cfg.json of the SAE in `folder`. Raises WrongInput if it is missing, not JSON or altered."""
    if folder.is_file():
        raise WrongInput(f"{folder} is a file, but an SAE is a folder; routesae convert makes one of a checkpoint")
    if other_layout(folder):
        raise WrongInput(f"{folder} is in the layout of another tool; routesae convert {folder} makes an SAE of it")
    if not (folder / CONFIG).exists():
        raise WrongInput(f"{folder} is not an SAE folder: {CONFIG} is missing")
    with reading(folder / CONFIG, COPY_WHOLE):
        config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise WrongInput(f"{folder / CONFIG} is not a JSON object")
    metadata = config.get("metadata")
    if isinstance(metadata, dict) and "routesae" in metadata:
        ours = metadata["routesae"]
        if not isinstance(ours, dict) or not isinstance(ours.get("recipe"), dict):
            raise WrongInput(f"{folder / CONFIG} does not describe a routesae SAE: it has no recipe")
        if "hash" in ours and ours != signed(ours):
            raise WrongInput(f"{folder / CONFIG} {ALTERED}")
    return config


def read_source(folder: Path) -> Source:
    """What the SAE in `folder` was trained from. Raises WrongInput if cfg.json cannot be read or is a stranger's."""
    metadata = read_config(folder).get("metadata")
    said = metadata if isinstance(metadata, dict) else {}
    known = {"model": said.get("model_name"), "corpus": said.get("dataset_path")}
    with reading(folder / CONFIG, COPY_WHOLE):
        return Source.model_validate({**known, **(said.get("routesae", {}).get("source") or {})})


def find_saes(folder: Path) -> list[Path]:
    """Every SAE folder directly under `folder`, by name. Raises WrongInput if there is none."""
    saes = sorted(path.parent for path in folder.glob(f"[!.]*/{CONFIG}")) if folder.is_dir() else []
    if not saes:
        raise WrongInput(f"no SAE under {folder}; train one with routesae train, or name one with --sae")
    return saes
