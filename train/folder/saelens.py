"""SAELens' configuration of an SAE, both ways: ours in, cfg.json out; and SAEs that SAELens saved, as ours.

SAELens v6 holds one dictionary over one input, of the architectures standard, gated, topk and jumprelu. That is all
of a vanilla, gated, topk, jumprelu, batchtopk or matryoshka (the last two as jumprelu), and of a routesae its shared
SAE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from routesae.reporting import WrongInput
from routesae.train.saes import SAE, Recipe, RouteSAE, SingleLayerSAE

SAE_LENS_VERSION = "6.0.0"  # of the layout written; SAELens refuses folders that name none
VARIANTS = {"standard": "vanilla", "gated": "gated", "topk": "topk", "jumprelu": "jumprelu"}
NORMALIZATIONS = {"token": "layer_norm", "none": "none"}
# Where an SAE may sit: TransformerLens' names count blocks from 0, and so do those of transformers' modules.
HOOKS = (
    (re.compile(r"blocks\.(\d+)\.hook_resid_post"), 1),
    (re.compile(r"blocks\.(\d+)\.hook_resid_pre"), 0),
    (re.compile(r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h)\.(\d+)"), 1),
)


def lens_config(sae: SAE, source: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json. source: what the SAE was trained from, kept under metadata.routesae with its recipe."""
    recipe = sae.recipe
    dictionary = sae.shared if isinstance(sae, RouteSAE) else sae
    one_layer = recipe.layers[0] if len(recipe.layers) == 1 else None
    own: dict[str, Any] = {"architecture": recipe.sae}  # what SAELens has no word for, it refuses to open
    if isinstance(dictionary, SingleLayerSAE):
        own = {"architecture": dictionary.architecture, **dictionary.lens_config()}
    return {
        **own,
        "d_in": recipe.width,
        "d_sae": recipe.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": NORMALIZATIONS[recipe.normalize],
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


def recipe_of(config: Mapping[str, Any]) -> Recipe:
    """What an SAE that SAELens saved is. Raises WrongInput for what has no counterpart here, naming it."""
    architecture = config.get("architecture")
    if architecture not in VARIANTS:
        raise WrongInput(f"architecture {architecture!r} is none of {', '.join(VARIANTS)}")
    theirs = config.get("normalize_activations", "none")
    normalize = {name: ours for ours, name in NORMALIZATIONS.items()}.get(theirs)
    if normalize is None:
        raise WrongInput(f"normalize_activations {theirs!r} is none of {', '.join(NORMALIZATIONS.values())}")
    if config.get("reshape_activations", "none") != "none":
        raise WrongInput(f"reshape_activations {config['reshape_activations']!r}: SAEs here read residual streams")
    metadata = config.get("metadata")
    hook = metadata.get("hook_name") if isinstance(metadata, Mapping) else None
    return Recipe(
        sae=VARIANTS[architecture],
        layers=(_layer_of(hook),),
        width=config.get("d_in", 0),
        latents=config.get("d_sae", 0),
        k=config.get("k", 1),
        sparsity=None if architecture == "topk" else 0.0,
        normalize=normalize,
    )


def _layer_of(hook: object) -> int:
    for pattern, offset in HOOKS:
        if isinstance(hook, str) and (found := pattern.fullmatch(hook)):
            return int(found[1]) + offset
    raise WrongInput(f"hook_name {hook!r} is no decoder block's output, such as blocks.11.hook_resid_post")


def tensors_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SAELens' weights as ours: always b_dec taken from the input, latents not rescaled by decoder norms."""
    ours = {name: tensor.float() for name, tensor in tensors.items()}
    if config.get("rescale_acts_by_decoder_norm", False):
        norms_F = ours["W_dec"].norm(dim=1)
        ours["W_enc"], ours["b_enc"] = ours["W_enc"] * norms_F, ours["b_enc"] * norms_F
        ours["W_dec"] = ours["W_dec"] / norms_F[:, None]
    if not config.get("apply_b_dec_to_input", True):
        shift_F = ours["b_dec"] @ ours["W_enc"]
        for name in ("b_enc", "b_gate"):
            if name in ours:
                ours[name] = ours[name] + shift_F
        if "b_mag" in ours:
            ours["b_mag"] = ours["b_mag"] + shift_F * ours["r_mag"].exp()
    return ours
