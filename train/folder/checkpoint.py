"""An SAE on disk: a folder that SAELens v6 opens as it is, with what SAELens cannot hold in files beside it.

    sae_weights.safetensors   W_enc [D, F], W_dec [F, D], b_dec [D] and [F]-shaped b_enc, threshold, b_gate …, float32
    cfg.json                  SAELens' configuration; ours is under metadata.routesae: the Recipe and its source
    router.safetensors        routesae only: router [L, D], one row a routed layer
    crosscoder.safetensors    a crosscoder's weights instead: W_enc [L, D, F], W_dec [F, L, D], b_enc, b_dec [L, D]

Never pickle. Dimension letters: D width, F latents, L layers.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from routesae.harvest.cache.arrays import fsync, fsync_tree
from routesae.machine.files import BadFile, read_json, write_json
from routesae.reporting import WrongInput
from routesae.train.folder.saelens import OFF, LensConfig, changed_fields, lens_config
from routesae.train.saes import SAE, SAES, Recipe, build
from routesae.train.saes.batchtopk import BatchTopK
from routesae.train.saes.single import WEIGHTS

log = logging.getLogger(__name__)

CONFIG, METRICS_FILE = "cfg.json", "metrics.jsonl"

# A file of each layout of other tools that SAELens reads → SAELens' name of its loader.
LAYOUTS = {
    "params.npz": "gemma_2",
    "hyperparams.json": "llama_scope",
    "sae.safetensors": "sparsify",
    "ae.pt": "dictionary_learning_1",
}


def other_layout(folder: Path) -> str | None:
    """SAELens' name of the loader that reads `folder`, or None if the folder is in none of LAYOUTS."""
    return next((loader for name, loader in LAYOUTS.items() if (folder / name).is_file()), None)


def save_sae(folder: Path, sae: SAE, source: Mapping[str, Any]) -> None:
    """Write `sae` into the existing folder. source: what it was trained from, kept under metadata.routesae."""
    for name, tensors in sae.files().items():
        save_file({key: tensor.float().cpu().contiguous() for key, tensor in tensors.items()}, folder / name)
    write_json(folder / CONFIG, lens_config(sae, source))


def commit_folder(written: Path, folder: Path) -> None:
    """Rename the finished `written` to `folder`, safely on the disk; an SAE of that name stays until then."""
    fsync_tree(written)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    written.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def load_sae(folder: Path, device: torch.device) -> SAE:
    """The SAE in `folder`, ours or SAELens', on `device`.

    Raises WrongInput if something is missing, cut or not finite, or would change the numbers and is not understood.
    """
    recipe, lens = _describe(folder)
    try:
        # Allocate only what the weights really hold, not what a stranger's cfg.json says.
        with torch.device("meta"):
            sae = build(recipe)
        expected = sae.files()
        files = {name: _load(folder / name) for name in expected}
        sae.load_files(files if lens is None else {name: lens.tensors(tensors) for name, tensors in files.items()})
        for name, tensors in files.items():
            if unknown := sorted(tensors.keys() - expected[name].keys()):
                raise WrongInput(f"{name} holds {unknown[0]}, which is not understood here for a {recipe.sae}")
            if bad := [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
                raise WrongInput(f"{name}: {bad[0]} holds NaN or infinite values; the training that made it diverged")
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


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise WrongInput(f"{path} is missing; train the SAE again or copy it whole") from None
    except (SafetensorError, OSError) as error:
        raise WrongInput(f"{path} cannot be read ({error}); it was cut or altered, copy it again") from error


def read_recipe(folder: Path) -> Recipe:
    """What the SAE in `folder` is built from. Raises WrongInput if cfg.json does not say."""
    return _describe(folder)[0]


def _describe(folder: Path) -> tuple[Recipe, LensConfig | None]:
    """The recipe, and SAELens' configuration if the weights follow that.

    An SAE of ours that was changed and saved again is what it is now, not what its recipe says.
    """
    config = read_config(folder)
    metadata = config.get("metadata")
    try:
        if isinstance(metadata, dict) and "routesae" in metadata:
            fields = metadata["routesae"]["recipe"]
            fields |= {"layers": tuple(fields["layers"]), "prefixes": tuple(fields.get("prefixes", ()))}
            recipe = Recipe(**fields)
            with torch.device("meta"):
                changed = changed_fields(build(recipe), config)
            if not changed and _has_one_threshold(folder, recipe):
                return recipe, None
            shown = ", ".join(changed) or "its thresholds"
            log.warning("%s was changed after its training (%s): it is read as SAELens would read it", folder, shown)
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
    except (KeyError, TypeError) as error:
        raise WrongInput(f"{folder / CONFIG} does not describe a routesae SAE ({error})") from error


def _has_one_threshold(folder: Path, recipe: Recipe) -> bool:
    """Whether the latents of a batchtopk or matryoshka still share one threshold."""
    shared = recipe.routed if recipe.sae == "routesae" else recipe.sae
    if not issubclass(SAES[shared], BatchTopK):
        return True
    threshold = _load(folder / WEIGHTS).get("threshold")
    return threshold is None or bool((threshold == threshold.flatten()[:1]).all())


def read_config(folder: Path) -> dict[str, Any]:
    """cfg.json of the SAE in `folder`. Raises WrongInput if it is missing or not JSON."""
    if folder.is_file():
        raise WrongInput(f"{folder} is a file, but an SAE is a folder; routesae convert makes one of a checkpoint")
    if other_layout(folder):
        raise WrongInput(f"{folder} is in the layout of another tool; routesae convert {folder} makes an SAE of it")
    try:
        config = read_json(folder / CONFIG)
    except FileNotFoundError:
        raise WrongInput(f"{folder} is not an SAE folder: {CONFIG} is missing") from None
    except (OSError, BadFile) as error:
        raise WrongInput(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise WrongInput(f"{folder / CONFIG} is not a JSON object")
    return config


def find_saes(folder: Path) -> list[Path]:
    """Every SAE folder directly under `folder`, by name. Raises WrongInput if there is none."""
    saes = sorted(path.parent for path in folder.glob(f"[!.]*/{CONFIG}")) if folder.is_dir() else []
    if not saes:
        raise WrongInput(f"no SAE under {folder}; train one with routesae train, or name one with --sae")
    return saes
