"""A checkpoint of the published RouteSAE code (swei2001/RouteSAEs) in; an SAE folder of ours out.

    encoder.weight [F, D], decoder.weight [D, F], pre_bias [D], latent_bias [F]   Vanilla, TopK, MLSAE, Random
    … with threshold [F]                                                          JumpReLU
    … with gate_bias, mag_bias, r_mag [F] in latent_bias' place                   Gated
    router.weight [L, D] and sae.… as a TopK                                      RouteSAE
    encoder.i.weight [F, D], decoder.i.weight [D, F] a layer, latent_bias [F]     Crosscoder

What the tensors do not tell comes from the options, or from a file's name that is still the one the published code
gave it: L12_VL0.01_…, L12_GL…, L12_JL…, L12_K64_…, sum_hard_K64_…, Cross_CL…, ML_K64_…, RDM_K64_….
The file is read with torch.load(weights_only=True): tensors come out of it, and no code in it runs.

Dimension letters: L layers, D width, F latents.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from routesae import __version__
from routesae.harvest.settings import parse_layers
from routesae.reporting import WrongInput
from routesae.train.folder.checkpoint import CONFIG, commit_folder, save_sae
from routesae.train.folder.settings import ConvertSettings
from routesae.train.saes import PENALISED, SINGLE_LAYER, Recipe, build
from routesae.train.saes.crosscoder import CROSSCODER
from routesae.train.saes.routesae import ROUTER
from routesae.train.saes.single import WEIGHTS

log = logging.getLogger(__name__)

DICTIONARY = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")
GATES = ("gate_bias", "mag_bias", "r_mag")
# Keys of a state dict → the variants that have just these; a crosscoder's depend on how many layers it has.
KEYS: dict[frozenset[str], tuple[str, ...]] = {
    frozenset(DICTIONARY): ("vanilla", "topk", "mlsae", "random"),
    frozenset((*DICTIONARY, "threshold")): ("jumprelu",),
    frozenset((*DICTIONARY, *GATES)) - {"latent_bias"}: ("gated",),
    frozenset(("router.weight", *(f"sae.{key}" for key in DICTIONARY))): ("routesae",),
}
# Ours, in SAELens' words, of each tensor [F] or [D] of theirs.
VECTORS = {
    "pre_bias": "b_dec",
    "latent_bias": "b_enc",
    "threshold": "threshold",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
    "r_mag": "r_mag",
}
LAYERED = {"VL": "vanilla", "GL": "gated", "JL": "jumprelu", "K": "topk"}
EVERY_LAYER = {"ML": "mlsae", "RDM": "random"}
DEEPEST = 10_000  # blocks of an LM; a list of layers beyond is a slip of the finger


@dataclass(frozen=True)
class Converted:
    """folder: where the SAE is. recipe: what it is."""

    folder: Path
    recipe: Recipe


def convert(settings: ConvertSettings) -> Converted:
    """Write the SAE in `settings.file` as a folder of ours, whole or not at all.

    Raises WrongInput where the file is no such state dict or does not say enough.
    """
    folder = Path(settings.out) / settings.folder_name
    if folder.exists() and not (folder / CONFIG).is_file():
        raise WrongInput(f"{folder} exists and is not an SAE, so it is not overwritten; give another --name")
    if folder.exists() and not settings.overwrite:
        raise WrongInput(f"{folder} exists; give another --name, or --overwrite")
    file = Path(settings.file)
    state = read_state(file)
    title = read_title(file.stem)
    sae_name = _variant(state, settings, title)
    bare = {key.removeprefix("sae."): tensor for key, tensor in state.items()}
    _require_shapes(file, sae_name, bare)
    recipe = _recipe(settings, title, sae_name, bare)
    with torch.device("meta"):
        sae = build(recipe)
    sae.load_files(_files(sae_name, bare))
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    source = {
        "model": settings.model,
        "converted": {"file": file.name, "sha256": digest},
        "versions": {"routesae": __version__, "torch": torch.__version__},
    }
    writing = folder.with_name(f".{folder.name}.converting")  # not train's: that may hold a run to go on with
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        save_sae(writing, sae, source)
        commit_folder(writing, folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return Converted(folder, recipe)


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, float32. Raises WrongInput for any other file; nothing in it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on how the pickle was written
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WrongInput(f"{file} does not exist") from None
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise WrongInput(
            f"{file} is not a state dict of tensors, or was cut ({type(error).__name__}); "
            "only what torch.save(model.state_dict()) wrote is read"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WrongInput(f"{file} holds other things than tensors by name; give what model.state_dict() was saved to")
    for key, tensor in state.items():
        whole = tensor.layout == torch.strided and tensor.is_floating_point()
        # A tensor of stride 0 can claim any size at no cost, until it is copied.
        if not whole or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise WrongInput(f"{file}: {key} is no ordinary tensor of floats")
        if not bool(tensor.isfinite().all()):
            raise WrongInput(f"{file}: {key} holds NaN or infinite values; the training that wrote it diverged")
    return {str(key): tensor.float() for key, tensor in state.items()}


def read_title(stem: str) -> dict[str, Any]:
    """What a file name says that the published code gave: sae, and layer, k, routing or aggregate. {} for others."""
    if found := re.match(r"L(\d+)_(VL|GL|JL|K)([\d.e+-]+)(?:_|$)", stem):
        named: dict[str, Any] = {"sae": LAYERED[found[2]], "layer": int(found[1])}
        return named | ({"k": int(found[3])} if found[2] == "K" and found[3].isdecimal() else {})
    if found := re.match(r"(sum|mean)_(hard|soft)_K(\d+)(?:_|$)", stem):
        return {"sae": "routesae", "aggregate": found[1], "routing": found[2], "k": int(found[3])}
    if found := re.match(r"(ML|RDM)_K(\d+)(?:_|$)", stem):
        return {"sae": EVERY_LAYER[found[1]], "k": int(found[2])}
    return {"sae": "crosscoder"} if stem.startswith("Cross_CL") else {}


def _variant(state: Mapping[str, Tensor], settings: ConvertSettings, title: Mapping[str, Any]) -> str:
    """The variant that has these keys; where several have, the one that option or file name say."""
    possible = KEYS.get(frozenset(state), ())
    layers = sum(key.startswith("encoder.") for key in state)
    if not possible and set(state) == _crosscoder_keys(layers) and layers:
        possible = ("crosscoder",)
    if not possible:
        shown = ", ".join(sorted(state)[:8]) or "none"
        raise WrongInput(f"{settings.file}: its keys ({shown}) are those of no SAE of the published RouteSAE code")
    if settings.sae is not None and settings.sae not in possible:
        raise WrongInput(f"--sae {settings.sae}: the keys of {settings.file} are those of {' or '.join(possible)}")
    wanted = settings.sae or title.get("sae")
    if wanted in possible:
        return str(wanted)
    if len(possible) > 1:
        raise WrongInput(f"{settings.file} may be {' or '.join(possible)}, which have the same keys; say with --sae")
    return possible[0]


def _crosscoder_keys(layers: int) -> set[str]:
    return {"latent_bias"} | {f"{part}.{at}.weight" for part in ("encoder", "decoder") for at in range(layers)}


def _sizes(bare: Mapping[str, Tensor]) -> tuple[int, int]:
    """(F, D)."""
    first = bare["encoder.weight" if "encoder.weight" in bare else "encoder.0.weight"]
    return (first.shape[0], first.shape[1]) if first.ndim == 2 else (0, 0)


def _require_shapes(file: Path, sae_name: str, bare: Mapping[str, Tensor]) -> None:
    f, d = _sizes(bare)
    for key, tensor in sorted(bare.items(), key=lambda item: "coder." not in item[0]):  # what f and d are read from
        shape: tuple[int, ...] = (f,)
        if key == "router.weight":
            shape = (len(tensor) if tensor.ndim else 0, d)
        elif key.startswith(("encoder", "decoder")):
            shape = (f, d) if key.startswith("encoder") else (d, f)
        elif key == "pre_bias":
            shape = (d,)
        if tuple(tensor.shape) != shape or 0 in shape:
            raise WrongInput(f"{file}: {key} is {list(tensor.shape)}, no shape of a {sae_name} with {f} latents")


def _recipe(settings: ConvertSettings, title: Mapping[str, Any], sae_name: str, bare: Mapping[str, Tensor]) -> Recipe:
    """Raises WrongInput where k or the layers are not known, or an option is not for this variant."""
    for option in ("routing", "aggregate"):
        if getattr(settings, option) is not None and sae_name != "routesae":
            raise WrongInput(f"--{option} {getattr(settings, option)}: only routesae has a router, not {sae_name}")
    k = settings.k if settings.k is not None else title.get("k")
    if k is None and sae_name not in PENALISED:
        raise WrongInput(f"{settings.file} does not say how many latents are active a token; give --k")
    routed: dict[str, Any] = {}
    for option, default in (("routing", "hard"), ("aggregate", "sum")) if sae_name == "routesae" else ():
        routed[option] = getattr(settings, option) or title.get(option)
        if routed[option] is None:
            log.warning("%s does not say its %s: taken to be %s", settings.file, option, default)
            routed[option] = default
    f, d = _sizes(bare)
    return Recipe(
        sae=sae_name,
        layers=_layers(settings, title, sae_name, bare),
        width=d,
        latents=f,
        k=1 if k is None else k,  # of a penalised variant only what training aimed at, which nothing tells
        sparsity=0.0 if sae_name in PENALISED else None,
        published=True,
        **routed,
    )


def _layers(
    settings: ConvertSettings, title: Mapping[str, Any], sae_name: str, bare: Mapping[str, Tensor]
) -> tuple[int, ...]:
    if sae_name in SINGLE_LAYER:
        if settings.layers is not None:
            raise WrongInput(f"--layers {settings.layers}: a {sae_name} reads one layer; give --layer")
        layer = settings.layer if settings.layer is not None else title.get("layer")
        if layer is None:
            raise WrongInput(f"{settings.file} does not say which layer it reads; give --layer")
        return (int(layer),)
    if settings.layer is not None:
        raise WrongInput(f"--layer {settings.layer}: a {sae_name} reads several layers; give --layers")
    given = parse_layers(settings.layers, DEEPEST) if settings.layers is not None else None
    if sae_name in EVERY_LAYER.values():
        if given is None:
            raise WrongInput(f"{settings.file} does not say which layers it reads; give --layers, such as 3-11")
        return given
    count = len(bare["router.weight"]) if sae_name == "routesae" else sum(key.startswith("encoder.") for key in bare)
    depth = 2 * (count - 1)
    layers = given if given is not None else parse_layers(None, depth)
    if len(layers) != count:
        asked = f"--layers {settings.layers} are {len(layers)}, but it" if given is not None else "it"
        raise WrongInput(f"{settings.file}: {asked} reads {count} layers; give as many with --layers")
    if given is None:
        shown = f"{layers[0]}-{layers[-1]}"
        log.warning("%s: taken to read layers %s, n//4 to 3n//4 of an LM of %d blocks", settings.file, shown, depth)
    return layers


def _files(sae_name: str, bare: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What routesae.train.saes load their weights from."""
    if sae_name == "crosscoder":
        layers = sum(key.startswith("encoder.") for key in bare)
        W_dec_LDF = torch.stack([bare[f"decoder.{at}.weight"] for at in range(layers)])
        tensors = {
            "W_enc": torch.stack([bare[f"encoder.{at}.weight"].T for at in range(layers)]),
            "W_dec": W_dec_LDF.permute(2, 0, 1),
            "b_enc": bare["latent_bias"],
            "b_dec": torch.zeros(W_dec_LDF.shape[:2]),
        }
        return {CROSSCODER: tensors}
    weights = {ours: bare[theirs] for theirs, ours in VECTORS.items() if theirs in bare}
    weights |= {"W_enc": bare["encoder.weight"].T, "W_dec": bare["decoder.weight"].T}
    if sae_name == "jumprelu" and (negative := int((bare["threshold"] < 0).sum())):
        # The published code then lets negative pre-activations through; here a latent is never below 0.
        log.warning("%d of %d thresholds are below 0 and act as 0", negative, len(bare["threshold"]))
    files = {WEIGHTS: weights}
    return {**files, ROUTER: {"router": bare["router.weight"]}} if sae_name == "routesae" else files
