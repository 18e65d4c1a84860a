"""Load a causal LM, find its decoder blocks, and tell it from others by its hashes.

Layer ℓ is the output of the ℓ-th decoder block, counted from 1, before any final norm: hidden_states[ℓ] of
transformers for ℓ < n, blocks.{ℓ-1}.hook_resid_post of TransformerLens.
"""

import atexit
import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from routesae.harvest.lm.gguf import source
from routesae.machine.device import LM_DTYPES
from routesae.machine.files import BadFile, parse_json, read_bytes, reading
from routesae.reporting import WrongInput, is_out_of_memory, shortened

# Keys of a config that say how a model was stored or run, not which model it is.
_INCIDENTAL_CONFIG = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"}
_INCIDENTAL_CONFIG |= {"quantization_config"}  # which loading changes; the hash of the weights tells
_HASHED_AT_ONCE = 1 << 24  # values of a parameter, for weights_hash


@dataclass(frozen=True)
class LanguageModel:
    """A loaded causal LM in eval mode, without gradients.

    model: transformers' model. blocks: its own decoder blocks. width: D. device: where ids go in and states come out.
    """

    model: Any
    blocks: nn.ModuleList
    width: int
    device: torch.device

    @cached_property
    def body(self) -> Any:
        """The model without its head: the outermost module around the blocks that the model's own forward calls.

        `get_decoder()` names another in some architectures, so this looks at what is called. Raises WrongInput if
        nothing is.
        """
        around = [module for module in self.model.modules() if any(part is self.blocks for part in module.modules())]

        def stop(module: nn.Module, inputs: Any) -> None:
            raise _Found(module)

        handles = [one.register_forward_pre_hook(stop) for one in around if one not in (self.model, self.blocks)]
        try:
            with torch.inference_mode():
                self.model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=self.device), use_cache=False)
        except _Found as found:
            return found.args[0]
        finally:
            for handle in handles:
                handle.remove()
        raise WrongInput(f"{type(self.model).__name__} has no module between its head and its decoder blocks")


class _Found(Exception):
    """Carries the module that is about to run."""


def load_config(model: str, revision: str | None = None) -> Any:
    """The transformers config of a hub id, folder, .gguf file or "demo"; downloads no weights.

    revision: a commit of the hub; None for the newest.
    """
    from transformers import AutoConfig

    with _explained(model):
        config = AutoConfig.from_pretrained(source(model), revision=revision or "main", trust_remote_code=False)
        sizes = [getattr(config.get_text_config(), name, None) for name in ("num_hidden_layers", "hidden_size")]
    if getattr(config, "is_encoder_decoder", False):
        raise WrongInput(f"{model} is an encoder–decoder; routesae needs a decoder-only causal LM")
    if not all(type(size) is int for size in sizes):
        raise WrongInput(
            f"the configuration of {model} has no num_hidden_layers and hidden_size: it is not a causal LM"
        )
    return config


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The tokenizer of a hub id, folder, .gguf file or "demo"."""
    from transformers import AutoTokenizer

    with _explained(model):
        return AutoTokenizer.from_pretrained(source(model), revision=revision or "main", trust_remote_code=False)


def load_lm(
    model: str, revision: str | None = None, *, device: torch.device, lm_dtype: str, device_map: str | None = None
) -> LanguageModel:
    """The whole causal LM, which takes token ids on `device` and is all there unless a device map says otherwise.

    lm_dtype: the precision it is loaded and computes in; of a quantised one, that of all that is not quantised.
    Raises WrongInput if it cannot be loaded or has no list of blocks.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    config, places, offload_folder = load_config(model, revision), None, None
    if device_map is not None:
        places = "auto" if device_map == "auto" else _read_device_map(device_map)
        offload_folder = tempfile.mkdtemp(prefix="routesae-")  # for what the model's own files do not hold as it is
        atexit.register(shutil.rmtree, offload_folder, ignore_errors=True)
    elif importlib.util.find_spec("accelerate") is not None:  # else by way of host memory
        places = {"": device}
    quantisation = getattr(config, "quantization_config", None)
    with _explained(model):
        if quantisation is not None and not AutoHfQuantizer.supports_quant_method(quantisation):
            raise ValueError(f"transformers does not know how to read quant_method {quantisation['quant_method']!r}")
        loaded, report = AutoModelForCausalLM.from_pretrained(
            source(model),
            config=config,
            dtype=LM_DTYPES[lm_dtype],
            device_map=places,
            offload_folder=offload_folder,
            revision=revision or "main",
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused here, by name
            output_loading_info=True,
        )
    missing, reshaped = sorted(report["missing_keys"]), sorted(map(str, report["mismatched_keys"]))
    if missing or reshaped:
        more = f" and {len(missing + reshaped) - 1} more" if len(missing + reshaped) > 1 else ""
        what = f"lack {missing[0]}" if missing else f"have another shape than its configuration: {reshaped[0]}"
        raise WrongInput(
            f"the weights of {model} {what}{more}; random numbers would stand there. Fetch or save the model again"
        )
    if getattr(loaded, "_supports_sdpa", False):  # transformers' own choice as well, but a setting can change that
        loaded.set_attn_implementation("sdpa")
    loaded.eval().requires_grad_(False)
    for module in loaded.modules() if quantisation is not None else ():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if all(type(one) in (nn.Parameter, Tensor) and one.dtype in LM_DTYPES.values() for one in own):
            # Not quantised; some loaders leave it as it was stored.
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(LM_DTYPES[lm_dtype])
    if places is None:
        loaded.to(device)
    if isinstance(places, dict) and (unknown := places.keys() - dict(loaded.named_modules()).keys()):
        raise WrongInput(f"--device-map: {type(loaded).__name__} has no module {min(unknown)!r}")
    blocks = find_blocks(loaded, model)
    return LanguageModel(loaded, blocks, loaded.config.get_text_config().hidden_size, device)


def _read_device_map(device_map: str) -> Any:
    """What transformers takes for --device-map. Raises WrongInput for anything but JSON or a file of it."""
    here = ["cpu", "disk", *(name for i in range(torch.cuda.device_count()) for name in (i, f"cuda:{i}"))]
    form = 'give auto, or JSON or a file of it that puts each module in one place, as {"model": 0, "lm_head": "cpu"}'
    with reading(f"--device-map {shortened(device_map)}", form, AttributeError):  # of JSON that is no object
        places = parse_json(device_map.encode() if device_map.lstrip().startswith("{") else read_bytes(device_map))
        for name, place in places.items():
            if place not in here or isinstance(place, bool):
                raise BadFile(f"{place!r} is none of {', '.join(map(str, here))}")
            if inner := [other for other in places if other != name and other.startswith(name and f"{name}.")]:
                raise BadFile(f"{inner[0]!r} is a part of {name!r}")
        return places


def cut_after(lm: LanguageModel, layer: int) -> LanguageModel:
    """The same LM with blocks 1 … `layer` only and no head; what is cut off is freed."""
    blocks = nn.ModuleList(lm.blocks[:layer])
    for module in list(lm.body.modules()):
        for name, child in module.named_children():
            if child is lm.blocks:
                setattr(module, name, blocks)
    return LanguageModel(lm.body, blocks, lm.width, lm.device)


def model_layers(config: Any) -> int:
    """n, the number of decoder blocks."""
    return int(config.get_text_config().num_hidden_layers)


def find_blocks(model: Any, name: str) -> nn.ModuleList:
    """The list of decoder blocks: the one shallowest ModuleList as long as the config says the model is deep.

    Raises WrongInput if there is none.
    """
    depth = model_layers(model.config)
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    level = min((path.count(".") for path in lists), default=0)
    shallowest = [module for path, module in lists.items() if path.count(".") == level]
    if len(shallowest) == 1:  # several side by side hold parts of blocks: all attentions, all norms …
        return shallowest[0]
    raise WrongInput(f"{name} ({type(model).__name__}) has no list of {depth} decoder blocks to take outputs from")


def config_hash(config: Any) -> str:
    """sha256 over what the config says of the model itself."""
    facts = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL_CONFIG}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(lm: LanguageModel, *, exact: bool = False) -> str:
    """xxh3-128 over every parameter and stored buffer of the whole LM: as bfloat16, or `exact`, as it was loaded.

    Tells a fine-tuned model from its base, which share a config. The first is the same for every precision loaded.
    """
    from transformers.integrations.accelerate import load_offloaded_parameter

    hasher, tied, stored = xxhash.xxh3_128(), getattr(lm.model, "all_tied_weights_keys", {}), dict[Any, Any]()
    for name, whole in lm.model.state_dict().items():
        for part in _parts(whole):  # tied ones once
            stored.setdefault(tied.get(name, name) if part.is_meta else part.data_ptr(), (name, part))
    for name, tensor in stored.values():
        tensor = load_offloaded_parameter(lm.model, name) if tensor.is_meta else tensor  # one at a time
        hasher.update(str(tuple(tensor.shape)).encode())
        for piece in torch.split(tensor.detach().flatten(), _HASHED_AT_ONCE):
            if piece.is_floating_point() and not exact:
                piece = piece.to(torch.bfloat16)
            hasher.update(piece.view(torch.uint8).cpu().numpy().data)
    return hasher.hexdigest()


def _parts(tensor: Any) -> list[Tensor]:
    """The tensors that one of a quantising package's own class is made of."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return [part for name in names for part in _parts(getattr(tensor, name))] or [tensor]


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn what transformers raises for a model it cannot load into one line with the remedy."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # "Loading weights" flickers by; downloads keep their bars
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it warns of, weights that are missing, is refused here
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of what a device map asks for
    try:
        yield
    except Exception as error:  # from strangers' code, on a stranger's files: whatever it is, it is the answer
        if isinstance(error, WrongInput) or is_out_of_memory(error):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise WrongInput(
            f"model {model!r} cannot be loaded: {shortened(reason, 300).rstrip('.')}. For a gated model accept its "
            "licence on the hub and log in with `hf auth login`; for a quantised one install what reads it; or give "
            "--model a local folder, a .gguf file, or demo"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
