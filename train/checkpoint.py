"""An SAE on disk: a folder that SAELens v6 opens as it is, with what SAELens cannot hold beside it.

    sae_weights.safetensors   W_enc [D, F], W_dec [F, D], b_enc [F], b_dec [D], float32: the (shared) SAE
    cfg.json                  SAELens' configuration; ours is under metadata.routesae: the Recipe and its source
    router.safetensors        routesae only: router [L, D], one row a routed layer

Never pickle. Dimension letters: D width, F latents, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from routesae.reporting import WrongInput
from routesae.train.saes import SAE, SAES, SINGLE_LAYER, Recipe, RouteSAE, TopK

SAE_LENS_VERSION = "6.0.0"  # of the layout written; SAELens refuses folders that name none
WEIGHTS, CONFIG, ROUTER = "sae_weights.safetensors", "cfg.json", "router.safetensors"


def save_sae(folder: Path, sae: SAE, source: Mapping[str, Any]) -> None:
    """Write `sae` into the existing folder. source: what it was trained from, kept under metadata.routesae."""
    shared = sae.shared if isinstance(sae, RouteSAE) else sae
    assert isinstance(shared, TopK)
    weights = {
        "W_enc": shared.W_enc_FD.detach().T,
        "W_dec": shared.W_dec_FD.detach(),
        "b_enc": shared.b_enc_F.detach(),
        "b_dec": shared.b_dec_D.detach(),
    }
    _save(folder / WEIGHTS, weights)
    if isinstance(sae, RouteSAE):
        _save(folder / ROUTER, {"router": sae.router_LD.detach()})
    (folder / CONFIG).write_text(json.dumps(_sae_lens_config(sae.recipe, source), indent=2) + "\n")


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _sae_lens_config(recipe: Recipe, source: Mapping[str, Any]) -> dict[str, Any]:
    one_layer = recipe.layers[0] if len(recipe.layers) == 1 else None
    return {
        "architecture": "topk",
        "d_in": recipe.width,
        "d_sae": recipe.latents,
        "k": recipe.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm",  # SAELens' word for normalisation per token
        "rescale_acts_by_decoder_norm": False,
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION,
            "sae_lens_training_version": SAE_LENS_VERSION,
            "model_name": source.get("model"),
            "hook_name": None if one_layer is None else f"blocks.{one_layer - 1}.hook_resid_post",
            "context_size": source.get("context"),
            "dataset_path": source.get("corpus"),
            "routesae": {"recipe": asdict(recipe), "source": dict(source)},
        },
    }


def load_sae(folder: Path, device: torch.device) -> SAE:
    """The SAE in `folder`, on `device`. Raises WrongInput naming the file that is missing, cut or not one."""
    recipe = read_recipe(folder)
    state = _load(folder / WEIGHTS)
    names = {"W_enc": "W_enc_FD", "W_dec": "W_dec_FD", "b_enc": "b_enc_F", "b_dec": "b_dec_D"}
    if missing := sorted(set(names) - set(state)):
        raise WrongInput(f"{folder / WEIGHTS} holds no {', '.join(missing)}; train the SAE again or copy it whole")
    # Before anything is built: a stranger's cfg.json may make up any size, the weights are really there.
    if state["W_dec"].shape != (recipe.latents, recipe.width):
        raise WrongInput(
            f"{folder}: W_dec is {list(state['W_dec'].shape)} where cfg.json says "
            f"[{recipe.latents}, {recipe.width}]; the folder mixes two SAEs"
        )
    with torch.device("meta"):
        sae = SAES[recipe.sae](recipe)
    prefix = "shared." if isinstance(sae, RouteSAE) else ""
    state["W_enc"] = state["W_enc"].mT.contiguous() if state["W_enc"].ndim == 2 else state["W_enc"]
    ours = {prefix + name: state[key] for key, name in names.items()}
    if isinstance(sae, RouteSAE):
        router = _load(folder / ROUTER)
        if "router" not in router:
            raise WrongInput(f"{folder / ROUTER} holds no router; train the SAE again or copy it whole")
        ours["router_LD"] = router["router"]
    for name, parameter in sae.named_parameters():
        if ours[name].shape != parameter.shape:
            raise WrongInput(
                f"{folder}: {name} is {list(ours[name].shape)} where cfg.json says {list(parameter.shape)}; "
                "the folder mixes two SAEs"
            )
    sae.load_state_dict({name: tensor.float() for name, tensor in ours.items()}, assign=True)
    return sae.requires_grad_(False).eval().to(device)


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
        data = config["metadata"]["routesae"]["recipe"]
        names = {field.name for field in fields(Recipe)}
        if wrong := sorted(names ^ set(data)):
            raise WrongInput(f"{', '.join(wrong)} unknown or missing in its recipe")
        recipe = Recipe(**{**data, "layers": tuple(data["layers"])})
    except WrongInput as error:
        raise WrongInput(f"{folder / CONFIG}: {error}") from error
    except (KeyError, TypeError) as error:
        raise WrongInput(f"{folder / CONFIG} does not describe a routesae SAE ({error!r})") from error
    if recipe.sae not in SAES:
        raise WrongInput(f"{folder / CONFIG}: SAE {recipe.sae!r} is none of {', '.join(SAES)}")
    if recipe.sae in SINGLE_LAYER and len(recipe.layers) != 1:
        raise WrongInput(f"{folder / CONFIG}: layers {recipe.layers}, but a {recipe.sae} reads one")
    return recipe


def read_config(folder: Path) -> dict[str, Any]:
    """cfg.json of the SAE in `folder`. Raises WrongInput where it is missing or not JSON."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        raise WrongInput(f"{folder} is not an SAE folder: {CONFIG} is missing") from None
    except (OSError, ValueError) as error:
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
