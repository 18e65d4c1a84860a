"""SAELens' configuration of an SAE: written for ours, and obeyed or refused in the SAEs of strangers.

SAELens v6 holds one dictionary over one input, of the architectures standard, gated, topk and jumprelu. That covers
vanilla, gated, topk and hierarchical, jumprelu, batchtopk and matryoshka (these two as jumprelu), and the shared SAE
of a routesae.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from routesae.reporting import WrongInput
from routesae.train.saes import SAE, Recipe, RouteSAE, SingleLayerSAE

SAE_LENS_VERSION = "6.0.0"  # of the layout written; SAELens refuses folders that name none
NORMALIZATIONS = {"token": "layer_norm", "none": "none"}
# Where an SAE may sit. TransformerLens counts blocks from 0, and so do transformers' module names.
HOOKS = (
    (re.compile(r"blocks\.(\d+)\.hook_resid_post"), 1),
    (re.compile(r"blocks\.(\d+)\.hook_resid_pre"), 0),
    (re.compile(r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h)\.(\d+)"), 1),
)
OFF: tuple[Any, ...] = (None, False, "", "none", "relu", [], {})  # values that say: nothing special
TINY = 1e-8  # SAELens' least decoder norm


class Metadata(BaseModel):
    """Where an SAE comes from. Fields not named here change no number."""

    model_config = ConfigDict(extra="allow")
    model_name: str | None = None
    hook_name: str | None = None
    hook_head_index: None = None
    hook_name_out: None = None
    dataset_path: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None


class LensConfig(BaseModel):
    """cfg.json of SAELens v6. Fields not named here might change the numbers, so they are refused unless off."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    architecture: Literal["standard", "gated", "topk", "jumprelu"]
    d_in: int
    d_sae: int
    k: int = 100  # SAELens' default, for topk alone
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    normalize_activations: Literal["none", "layer_norm"] = "none"
    dtype: str = "float32"
    device: str = "cpu"
    metadata: Metadata = Field(default_factory=Metadata)

    @model_validator(mode="after")
    def _refuse_unknown_fields(self) -> Self:
        unknown = {name: value for name, value in (self.model_extra or {}).items() if value not in OFF}
        if self.rescale_acts_by_decoder_norm and self.architecture != "topk":
            unknown["rescale_acts_by_decoder_norm"] = True  # SAELens ignores it there
        for name, value in unknown.items():
            raise ValueError(f"{name} {value!r} is not understood here, and might change the numbers")
        return self

    def recipe(self) -> Recipe:
        """What the SAE is here. Raises WrongInput if it does not read a residual stream."""
        return Recipe(
            sae="vanilla" if self.architecture == "standard" else self.architecture,
            layers=(_layer_of(self.metadata.hook_name),),
            width=self.d_in,
            latents=self.d_sae,
            k=self.k if self.architecture == "topk" else 1,
            sparsity=None if self.architecture == "topk" else 0.0,
            normalize="token" if self.normalize_activations == "layer_norm" else "none",
        )

    def tensors(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their weights as ours: b_dec always taken from the input, latents not rescaled by decoder norms."""
        ours = {name: tensor.float() for name, tensor in theirs.items()}
        if self.rescale_acts_by_decoder_norm:
            norms_F = ours["W_dec"].norm(dim=1).clamp(min=TINY)
            ours["W_enc"], ours["b_enc"] = ours["W_enc"] * norms_F, ours["b_enc"] * norms_F
            ours["W_dec"] = ours["W_dec"] / norms_F[:, None]
        if not self.apply_b_dec_to_input:
            shift_F = ours["b_dec"] @ ours["W_enc"]
            for name in ("b_enc", "b_gate"):
                if name in ours:
                    ours[name] = ours[name] + shift_F
            if "b_mag" in ours:
                ours["b_mag"] = ours["b_mag"] + shift_F * ours["r_mag"].exp()
        return ours


def hook_of(layer: int) -> str:
    """TransformerLens' name of a layer; 0 is the embedding."""
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"


def _layer_of(hook: str | None) -> int:
    for pattern, offset in HOOKS:
        if hook is not None and (found := pattern.fullmatch(hook)):
            return int(found[1]) + offset
    raise WrongInput(f"hook_name {hook!r} is not the output of a decoder block, such as blocks.11.hook_resid_post")


def lens_config(sae: SAE, ours: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json of ours. ours: what is kept under metadata.routesae. source: what the SAE was trained from."""
    layers = sae.recipe.layers
    metadata = {
        "sae_lens_version": SAE_LENS_VERSION,
        "sae_lens_training_version": SAE_LENS_VERSION,
        "model_name": source.get("model"),
        "hook_name": hook_of(layers[0]) if len(layers) == 1 else None,
        "context_size": source.get("context"),
        "dataset_path": source.get("corpus"),
        "routesae": dict(ours),
    }
    dictionary = sae.shared if isinstance(sae, RouteSAE) else sae
    kind: dict[str, Any] = {"architecture": sae.recipe.sae}  # what SAELens cannot hold, it refuses to open
    if isinstance(dictionary, SingleLayerSAE):
        kind = {"architecture": dictionary.architecture, **dictionary.lens_config()}
    return {
        **kind,
        "d_in": sae.recipe.width,
        "d_sae": sae.recipe.latents,
        "apply_b_dec_to_input": True,
        "normalize_activations": NORMALIZATIONS[sae.recipe.normalize],
        "reshape_activations": "none",
        "dtype": "float32",
        "device": "cpu",
        "metadata": metadata,
    }
