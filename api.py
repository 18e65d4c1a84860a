"""The Python API: what a notebook needs, by the same code as the commands. `import routesae` has all of it.

    cache = routesae.Cache("shards/")                  hidden states of an LM, by document and in batches
    sae = routesae.load_sae("saes/topk_layer15")       sae.encode(hidden).top(10)
    lm = routesae.load_lm("demo")                      lm.generate("My favourite place is")
    routesae.latents(lm, sae, "A text of one's own")   which latents are active on it
    with routesae.steer(lm, sae, {1924: 9.0}): …       what the LM says with a latent changed
    routesae.harvest(…), train(…), analyze(…), contexts(…), report(…), compare(…)   the commands, settings by name

Whatever is wrong with what is given raises WrongInput, a ValueError, in one line with the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from routesae.analyze.clamp.changes import CHANGES, Change, Clamp
from routesae.analyze.clamp.steps import require_cached_attention, steering
from routesae.analyze.inputs.lm import LM, load_lm, require_lm_of
from routesae.analyze.latents.text import TextLatents, latents
from routesae.machine.device import pick_device
from routesae.machine.settings import not_one_of
from routesae.reporting import WrongInput
from routesae.train.folder import checkpoint
from routesae.train.folder.hub import fetch_sae
from routesae.train.saes import SAE

__all__ = ["LM", "SAE", "TextLatents", "WrongInput", "latents", "load_lm", "load_sae", "steer"]


def load_sae(sae: str | Path, *, device: str = "auto") -> SAE:
    """An SAE of a folder, ours or SAELens', or of the hub: user/repo[/folder][@revision].

    It takes hidden states in the LM's own units, [..., D], or [..., L, D] where it reads several layers. Its weights
    have no gradients until `sae.requires_grad_()`. Raises WrongInput where it cannot be read, or holds what would
    change its numbers and is not understood.
    """
    return checkpoint.load_sae(fetch_sae(str(sae)), pick_device(device))


def steer(
    lm: LM, sae: SAE, changes: Mapping[int, float], *, mode: str = "set", error_term: bool = True
) -> AbstractContextManager[None]:
    """While the context is open, the LM runs with some of the SAE's latents changed, `lm.generate` included.

    changes: {latent: value}, in the units of the SAE's normalised input. mode: "set" makes each latent its value,
    "add" adds it, "multiply" multiplies by it, at every position that training used and as `routesae clamp` does.
    error_term: keep what the SAE fails to reconstruct. Raises WrongInput where SAE and LM do not belong together, for
    a latent or mode that there is not, and for soft routing, which has no inverse.
    """
    if mode not in CHANGES:
        raise WrongInput(f"mode {not_one_of(mode, CHANGES)}")
    made = [Change(latent=latent, how=mode, value=float(value)) for latent, value in changes.items()]
    clamp = Clamp(sae, made, error_term=error_term)
    kept = require_lm_of(sae, lm)
    if clamp.layers_read:
        require_cached_attention(lm.lm)
    return steering(lm.lm, clamp, kept)
