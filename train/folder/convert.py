"""SAE folders made of what others wrote: a checkpoint of the published RouteSAE code, or a layout that SAELens reads.

The published code (swei2001/RouteSAEs) saves the state dict of

    encoder.weight [F, D], decoder.weight [D, F], pre_bias [D], latent_bias [F]   Vanilla, TopK, MLSAE, Random
    … with threshold [F]                                                          JumpReLU
    … with gate_bias, mag_bias, r_mag [F] in latent_bias' place                   Gated
    router.weight [L, D] and sae.… as a TopK                                      RouteSAE
    encoder.i.weight [F, D], decoder.i.weight [D, F] a layer, latent_bias [F]     Crosscoder

What the tensors do not tell comes from the options, or from a file name that the published code gave (TITLES).
The file is read with torch.load(weights_only=True): tensors come out of it, and no code in it runs.

Dimension letters: L layers, D width, F latents.
"""

import hashlib
import logging
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from routesae import __version__
from routesae.harvest.settings import layer_list, parse_layers
from routesae.machine.files import disk_faults, open_regular
from routesae.machine.lock import hold
from routesae.reporting import Report, WrongInput, silent
from routesae.train.folder.checkpoint import CONFIG, commit_folder, other_layout, save_sae
from routesae.train.folder.strangers import LENS, read_strange
from routesae.train.saes import PENALISED, SAE, SINGLE_LAYER, Recipe, build
from routesae.train.saes.crosscoder import CROSSCODER
from routesae.train.saes.routesae import ROUTER
from routesae.train.saes.single import WEIGHTS
from routesae.train.settings import ConvertSettings

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
# The published code's name of each tensor [F] or [D] → SAELens' name.
VECTORS = {"pre_bias": "b_dec", "latent_bias": "b_enc", "threshold": "threshold"}
VECTORS |= {"gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"}
# How the published code names its files.
TITLES = {
    r"L(?P<layer>\d+)_VL[\d.e+-]+": "vanilla",
    r"L(?P<layer>\d+)_GL[\d.e+-]+": "gated",
    r"L(?P<layer>\d+)_JL[\d.e+-]+": "jumprelu",
    r"L(?P<layer>\d+)_K(?P<k>\d+)": "topk",
    r"(?P<aggregate>sum|mean)_(?P<routing>hard|soft)_K(?P<k>\d+)": "routesae",
    r"ML_K(?P<k>\d+)": "mlsae",
    r"RDM_K(?P<k>\d+)": "random",
    r"Cross_CL[\d.e+-]*": "crosscoder",
}
DEFAULTS = {"routing": "hard", "aggregate": "sum"}
DEEPEST = 10_000  # blocks of an LM; a list of layers beyond is a slip of the finger


def convert(settings: ConvertSettings, report: Report = silent) -> SAE:
    """Write the SAE in `settings.file` as a folder of ours, whole or not at all; return it, with its `folder`.

    Raises WrongInput if the file is not such an SAE or does not say enough.
    """
    folder = Path(settings.out) / settings.folder_name
    if folder.exists() and not (folder / CONFIG).is_file():
        raise WrongInput(f"{folder} exists and is not an SAE, so it is not overwritten; give another --name")
    if folder.exists() and not settings.overwrite:
        raise WrongInput(f"{folder} exists; give another --name, or --overwrite")
    file = Path(settings.file)  # something that SAELens reads, or a checkpoint of the published code
    is_lens = settings.file.startswith(LENS) or other_layout(file) is not None or (file / CONFIG).is_file()
    sae, origin = read_strange(settings) if is_lens else _read_published(settings)
    versions = {"routesae": __version__, "torch": torch.__version__}
    writing = folder.with_name(f".{folder.name}.converting")  # not train's, which may hold a run to resume
    with disk_faults(folder.parent, lambda: "nothing was written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with hold(folder.with_name(f".{folder.name}.lock"), f"the SAE {folder}"):
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir()
            try:
                save_sae(writing, sae, {**origin, "versions": versions})
                commit_folder(writing, folder)
            finally:
                shutil.rmtree(writing, ignore_errors=True)
    sae.folder = folder
    return sae


def _read_published(settings: ConvertSettings) -> tuple[SAE, dict[str, Any]]:
    """A checkpoint of the published code, and where it comes from."""
    file = Path(settings.file)
    (state, digest), title = read_state(file), read_title(file.stem)
    variant = _variant(state, settings, title)
    options = {name: getattr(settings, name) for name in ("k", "layer", *DEFAULTS)}
    said = {**title, **{name: value for name, value in options.items() if value is not None}}
    bare = {key.removeprefix("sae."): tensor for key, tensor in state.items()}
    with torch.device("meta"):
        sae = build(_recipe(settings, said, variant, bare))
    sae.load_files(_files(variant, bare))
    return sae, {"model": settings.model, "converted": {"file": file.name, "sha256": digest}}


def read_state(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a state dict, float32, and the file's SHA-256. Raises WrongInput for any other file; nothing in
    it is run."""
    try:
        with warnings.catch_warnings(), open_regular(file) as opened:
            warnings.simplefilter("ignore")  # torch's, on how the pickle was written
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            opened.seek(0)
            state = torch.load(opened, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WrongInput(f"{file} does not exist") from None
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, UnpicklingError) as error:
        raise WrongInput(
            f"{file} is not a state dict of tensors, or was cut ({type(error).__name__}); "
            "give what torch.save(model.state_dict()) wrote"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WrongInput(f"{file} holds other things than tensors by name; give what model.state_dict() was saved to")
    for key, tensor in state.items():
        is_plain = tensor.layout == torch.strided and tensor.is_floating_point()
        # A tensor of stride 0 can claim any size at no cost, until it is copied.
        if not is_plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise WrongInput(f"{file}: {key} is not an ordinary tensor of floats")
        if not bool(tensor.isfinite().all()):
            raise WrongInput(f"{file}: {key} holds NaN or infinite values; the training that made it diverged")
    return {str(key): tensor.float() for key, tensor in state.items()}, digest


def read_title(stem: str) -> dict[str, Any]:
    """What a file name of the published code says: sae, and layer, k, routing or aggregate. {} for other names."""
    for pattern, sae in TITLES.items():
        if found := re.match(rf"{pattern}(?:_|$)", stem):
            return {"sae": sae, **{name: int(x) if x.isdecimal() else x for name, x in found.groupdict().items()}}
    return {}


def _variant(state: Mapping[str, Tensor], settings: ConvertSettings, title: Mapping[str, Any]) -> str:
    """The variant that has these keys; if several have, the one that --sae or the file name says."""
    layers = sum(key.startswith("encoder.") for key in state)
    parts = {f"{part}.{at}.weight" for part in ("encoder", "decoder") for at in range(layers)}
    crosscoder = ("crosscoder",) if layers and set(state) == {"latent_bias", *parts} else ()
    possible = KEYS.get(frozenset(state), crosscoder)
    if not possible:
        shown = ", ".join(sorted(state)[:8]) or "none"
        raise WrongInput(f"{settings.file}: no SAE of the published RouteSAE code has these keys ({shown})")
    if settings.sae is not None and settings.sae not in possible:
        raise WrongInput(f"--sae {settings.sae}: the keys of {settings.file} are those of {' or '.join(possible)}")
    named = settings.sae or title.get("sae")
    if named in possible:
        return str(named)
    if len(possible) > 1:
        raise WrongInput(f"{settings.file} may be {' or '.join(possible)}, which have the same keys; give --sae")
    return possible[0]


def _recipe(settings: ConvertSettings, said: Mapping[str, Any], variant: str, bare: Mapping[str, Tensor]) -> Recipe:
    """said: what options and file name say. F and D are those of the encoder.

    Raises WrongInput if another tensor's shape does not fit, if k or the layers are not known, or for an option that
    is not for this variant.
    """
    first = bare["encoder.weight" if "encoder.weight" in bare else "encoder.0.weight"]
    f, d = first.shape if first.ndim == 2 else (0, 0)
    for key, tensor in sorted(bare.items(), key=lambda item: "coder." not in item[0]):  # encoder and decoder first
        shape: tuple[int, ...] = (d,) if key == "pre_bias" else (f,)
        if key == "router.weight":
            shape = (len(tensor) if tensor.ndim else 0, d)
        elif "coder." in key:
            shape = (f, d) if key.startswith("encoder") else (d, f)
        if tuple(tensor.shape) != shape or 0 in shape:
            of = f"a {variant} with {f} latents"
            raise WrongInput(f"{Path(settings.file)}: {key} is {list(tensor.shape)}, not the shape of {of}")
    if "k" not in said and variant not in PENALISED:
        raise WrongInput(f"{settings.file} does not say how many latents are active a token; give --k")
    for option, default in DEFAULTS.items():
        if variant != "routesae" and (value := getattr(settings, option)) is not None:
            raise WrongInput(f"--{option} {value}: only routesae has a router, not {variant}")
        if variant == "routesae" and option not in said:
            log.warning("%s does not say its %s: taken to be %s", settings.file, option, default)
    return Recipe(
        sae=variant,
        layers=_layers(settings, said, variant, bare),
        width=d,
        latents=f,
        k=said.get("k", 1),  # a penalised variant's is only what training aimed at, which nothing tells
        sparsity=0.0 if variant in PENALISED else None,
        normalize=settings.normalize,
        published=True,
        **{option: said.get(option, default) for option, default in DEFAULTS.items()},
    )


def _layers(
    settings: ConvertSettings, said: Mapping[str, Any], variant: str, bare: Mapping[str, Tensor]
) -> tuple[int, ...]:
    if variant in SINGLE_LAYER:
        if settings.layers is not None:
            raise WrongInput(f"--layers {settings.layers}: a {variant} reads one layer; give --layer")
        if "layer" not in said:
            raise WrongInput(f"{settings.file} does not say which layer it reads; give --layer")
        return (int(said["layer"]),)
    if settings.layer is not None:
        raise WrongInput(f"--layer {settings.layer}: a {variant} reads several layers; give --layers")
    layers = parse_layers(settings.layers, DEEPEST) if settings.layers is not None else None
    if variant in ("mlsae", "random"):
        if layers is None:
            raise WrongInput(f"{settings.file} does not say which layers it reads; give --layers, such as 3-11")
        return layers
    count = len(bare["router.weight"]) if variant == "routesae" else sum(key.startswith("encoder.") for key in bare)
    if layers is None:
        depth = 2 * (count - 1)
        layers = parse_layers(None, depth)
        if len(layers) == count:
            shown = layer_list(layers)
            log.warning(
                "%s: taken to read layers %s, n//4 to 3n//4 of an LM of %d blocks", settings.file, shown, depth
            )
    if len(layers) != count:
        given = f"--layers {settings.layers} are {len(layers)}, but it" if settings.layers is not None else "it"
        raise WrongInput(f"{settings.file}: {given} reads {count} layers; give as many with --layers")
    return layers


def _files(variant: str, bare: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The files that our SAE of this variant loads its weights from."""
    if variant == "crosscoder":
        layers = range(sum(key.startswith("encoder.") for key in bare))
        W_dec_LDF = torch.stack([bare[f"decoder.{at}.weight"] for at in layers])
        tensors = {
            "W_enc": torch.stack([bare[f"encoder.{at}.weight"].T for at in layers]),
            "W_dec": W_dec_LDF.permute(2, 0, 1),
            "b_enc": bare["latent_bias"],
            "b_dec": torch.zeros(W_dec_LDF.shape[:2]),
        }
        return {CROSSCODER: tensors}
    weights = {ours: bare[theirs] for theirs, ours in VECTORS.items() if theirs in bare}
    weights |= {"W_enc": bare["encoder.weight"].T, "W_dec": bare["decoder.weight"].T}
    if variant == "jumprelu" and (negative := int((bare["threshold"] < 0).sum())):
        # The published code then lets negative pre-activations through; here a latent is never below 0.
        log.warning("%d of %d thresholds are below 0 and act as 0", negative, len(bare["threshold"]))
    return {WEIGHTS: weights} | ({ROUTER: {"router": bare["router.weight"]}} if variant == "routesae" else {})
