"""An SAE on disk: a folder that SAELens v6 opens as it is, with what SAELens cannot hold beside it.

    sae_weights.safetensors   W_enc [D, F], W_dec [F, D], b_dec [D] and [F]-shaped b_enc, threshold, b_gate …, float32
    cfg.json                  SAELens' configuration; ours is under metadata.routesae: the Recipe and its source
    router.safetensors        routesae only: router [L, D], one row a routed layer
    crosscoder.safetensors    a crosscoder's weights instead: W_enc [L, D, F], W_dec [F, L, D], b_enc, b_dec [L, D]

Never pickle. Dimension letters: D width, F latents, L layers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from routesae.harvest.cache.arrays import fsync, fsync_tree
from routesae.machine.files import BadFile, read_json
from routesae.reporting import WrongInput
from routesae.train.folder.saelens import lens_config, recipe_of, tensors_of
from routesae.train.saes import SAE, Recipe, build
from routesae.train.saes.single import WEIGHTS

CONFIG, METRICS_FILE = "cfg.json", "metrics.jsonl"


def save_sae(folder: Path, sae: SAE, source: Mapping[str, Any]) -> None:
    """Write `sae` into the existing folder. source: what it was trained from, kept under metadata.routesae."""
    for name, tensors in sae.files().items():
        save_file({key: tensor.float().cpu().contiguous() for key, tensor in tensors.items()}, folder / name)
    (folder / CONFIG).write_text(json.dumps(lens_config(sae, source), indent=2) + "\n")


def commit_folder(written: Path, folder: Path) -> None:
    """Give the finished `written` the name `folder`, on the disk for good; an SAE of that name stays until then."""
    fsync_tree(written)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    written.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def load_sae(folder: Path, device: torch.device) -> SAE:
    """The SAE in `folder`, ours or SAELens', on `device`. Raises WrongInput naming what is missing or cut."""
    config = read_config(folder)
    recipe = read_recipe(folder)
    try:
        # Nothing is allocated by what a stranger's cfg.json says: only what the weights really hold.
        with torch.device("meta"):
            sae = build(recipe)
        files = {name: _load(folder / name) for name in sae.files()}
        if not _is_ours(config):
            files[WEIGHTS] = tensors_of(config, files[WEIGHTS])
        sae.load_files(files)
        _fill_buffers(sae)
    except KeyError as missing:
        raise WrongInput(f"{folder / WEIGHTS} holds no {missing}; save the SAE again or copy it whole") from None
    except WrongInput as error:
        raise error if str(folder) in str(error) else WrongInput(f"{folder}: {error}") from error
    return sae.requires_grad_(False).eval().to(device)


def _fill_buffers(sae: SAE) -> None:
    """Zeros for what only training needs, and no file holds."""
    for module in sae.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise WrongInput(f"{path} is missing; train the SAE again or copy it whole") from None
    except (SafetensorError, OSError) as error:
        raise WrongInput(f"{path} cannot be read ({error}); it was cut or altered, copy it again") from error


def read_recipe(folder: Path) -> Recipe:
    """What the SAE in `folder` is built from. Raises WrongInput where cfg.json does not say."""
    config = read_config(folder)
    try:
        if not _is_ours(config):
            return recipe_of(config)
        data = config["metadata"]["routesae"]["recipe"]
        known = {field.name for field in fields(Recipe)}
        needed = {field.name for field in fields(Recipe) if field.default is MISSING}
        if wrong := sorted((set(data) - known) | (needed - set(data))):
            raise WrongInput(f"{', '.join(wrong)} unknown or missing in its recipe")
        recipe = Recipe(**{**data, "layers": tuple(data["layers"]), "prefixes": tuple(data.get("prefixes", ()))})
        with torch.device("meta"):
            build(recipe)
    except WrongInput as error:
        raise WrongInput(f"{folder / CONFIG}: {error}") from error
    except (KeyError, TypeError) as error:
        raise WrongInput(f"{folder / CONFIG} does not describe a routesae SAE ({error!r})") from error
    return recipe


def _is_ours(config: Mapping[str, Any]) -> bool:
    metadata = config.get("metadata")
    return isinstance(metadata, dict) and "routesae" in metadata


def read_config(folder: Path) -> dict[str, Any]:
    """cfg.json of the SAE in `folder`. Raises WrongInput where it is missing or not JSON."""
    if folder.is_file():
        raise WrongInput(
            f"{folder} is a file, and an SAE is a folder; a published .pt checkpoint becomes one by routesae convert"
        )
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
    """Every SAE folder directly under `folder`, by name. Raises WrongInput where there is none."""
    found = sorted(path.parent for path in folder.glob(f"[!.]*/{CONFIG}")) if folder.is_dir() else []
    if not found:
        raise WrongInput(f"no SAE under {folder}; train one with routesae train, or name one with --sae")
    return found
