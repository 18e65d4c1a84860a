"""SAEs in the layouts of other tools, read by the sae-lens package's own loaders (the extra `lens`).

    lens:RELEASE/ID                                  an SAE of SAELens' list, or of a hub repository user/repo
    params.npz                                       Gemma Scope
    hyperparams.json, checkpoints/final.safetensors  Llama Scope
    cfg.json, sae.safetensors                        sparsify
    config.json, ae.pt                               dictionary_learning
    cfg.json, sae_weights.safetensors                SAELens, before version 6 too

SAELens loads the SAE and saves it in its own layout, which load_sae obeys or refuses.
"""

import importlib
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from routesae.machine.device import require_packages
from routesae.machine.files import read_json
from routesae.reporting import FailedRun, WrongInput
from routesae.train.folder.checkpoint import load_sae, other_layout
from routesae.train.folder.hub import hub_errors
from routesae.train.folder.saelens import hook_of
from routesae.train.saes import SAE
from routesae.train.settings import ConvertSettings

LENS = "lens:"
LOADERS = "sae_lens.loading.pretrained_sae_loaders"


def read_strange(settings: ConvertSettings) -> tuple[SAE, dict[str, Any]]:
    """The SAE and where it comes from.

    Raises WrongInput for what SAELens or load_sae refuses, FailedRun if the hub cannot be reached.
    """
    for name in ("sae", "k", "layers", "routing", "aggregate", "normalize"):
        if (value := getattr(settings, name)) != settings.described[name].default:
            raise WrongInput(f"--{name} {value} is for a .pt; {settings.file} says that itself, so leave it out")
    require_packages(settings.file, "lens", "sae_lens")
    with tempfile.TemporaryDirectory() as saved:
        try:
            with hub_errors(f"SAELens does not give {settings.file}", "give --layer and --model if they are missing"):
                theirs = _from_lens(settings.file) if settings.file.startswith(LENS) else _from_folder(settings)
        except (LookupError, RuntimeError, TypeError, AttributeError, UnpicklingError) as error:
            if isinstance(error, FailedRun):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise WrongInput(f"SAELens cannot read {settings.file} ({reason})") from error
        if settings.layer is not None:
            theirs.cfg.metadata.hook_name = hook_of(settings.layer)
        vars(theirs.cfg.metadata).pop("routesae", None)  # an SAE of ours that was changed is what SAELens has now
        theirs.save_model(saved)
        try:
            sae = load_sae(Path(saved), torch.device("cpu"))
        except WrongInput as error:
            raise WrongInput(str(error).replace(saved, settings.file)) from error
    model = settings.model or theirs.cfg.metadata.model_name
    return sae, {"model": model, "converted": {"file": settings.file}}


def _from_lens(reference: str) -> Any:
    import sae_lens
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    first, *rest = reference.removeprefix(LENS).split("/")
    if first not in get_pretrained_saes_directory() and rest:  # then a repository, user/repo
        first, rest = f"{first}/{rest[0]}", rest[1:]
    if not rest:
        raise WrongInput(f"{reference} names no SAE; give {LENS}RELEASE/ID")
    return sae_lens.SAE.from_pretrained(first, "/".join(rest), device="cpu")


def _from_folder(settings: ConvertSettings) -> Any:
    folder = Path(settings.file).absolute()
    layout = other_layout(folder)
    import sae_lens
    from sae_lens.registry import get_sae_class

    if layout is None:
        return sae_lens.SAE.load_from_disk(folder, device="cpu", dtype="float32")
    loaders: Any = importlib.import_module(LOADERS)
    # Gemma Scope's loader reads the model, the place and the layer from these names.
    known = [part for part in folder.parts if "gemma-scope-" in part]
    name = "/".join(folder.parts[-3:]) if settings.layer is None else f"layer_{settings.layer - 1}/{folder.name}"

    def local(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(folder / Path(subfolder, filename).relative_to(name))

    download, loaders.hf_hub_download = loaders.hf_hub_download, local  # which reads `folder`, not a repository
    try:
        config, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[layout](
            known[-1] if known else "gemma-scope-2b-pt-res", name, "cpu", False, {"dtype": "float32"}
        )
    finally:
        loaders.hf_hub_download = download
    config["d_in"], config["d_sae"] = state["W_enc"].shape
    if state["W_dec"].shape == state["W_enc"].shape != state["W_dec"].T.shape:
        state["W_dec"] = state["W_dec"].T.contiguous()  # sparsify's own W_dec is [F, D], and SAELens transposes it
    if config.get("activation_fn_kwargs", {}).get("signed"):
        raise WrongInput(f"{folder}: its latents may be negative (signed), which is not understood here")
    if settings.model is None and layout == "gemma_2" and not known:
        config["model_name"] = None  # the name given to the loader says nothing
    config = loaders.handle_config_defaulting(config)
    kind, config_kind = get_sae_class(config["architecture"])
    theirs = kind(config_kind.from_dict(config))
    theirs.process_state_dict_for_loading(state)
    theirs.load_state_dict(state)
    if config["normalize_activations"] == "expected_average_only_in":
        norm = float(read_json(folder / "hyperparams.json")["dataset_average_activation_norm"]["in"])
        theirs.fold_activation_norm_scaling_factor(config["d_in"] ** 0.5 / norm)
    return theirs
