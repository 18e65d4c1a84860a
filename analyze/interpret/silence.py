"""Where in the last rows of a cache latents are active, so that texts are found on which one of them is silent.

Dimension letters: N tokens, F latents, W latents asked about, P positions of the cache's last rows, M active pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from routesae.analyze.contexts.file import ContextsFile
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.reporting import WrongInput
from routesae.train.evaluate import read_in_order, require_fit
from routesae.train.folder.checkpoint import CONFIG, load_sae
from routesae.train.loading.batches import Selection
from routesae.train.saes import SAE

POOL_TOKENS = 16_384  # enough for ten texts of any latent that is not active nearly everywhere


class Silence:
    """What the SAE says of `latents` in the last rows of the cache that `contexts` are of.

    Raises WrongInput if cache or SAE is another one.
    """

    def __init__(self, contexts: ContextsFile, latents: Collection[int], path: str | None, device: str):
        facts = contexts.facts
        cache = Cache(path or facts["cache"]["path"])
        if cache.manifest.tokens_hash != facts["cache"]["tokens_hash"]:
            raise WrongInput(f"--cache {path} is not the one the contexts in {contexts.folder} are of; give that one")
        # The contexts of an SAE from the hub are in a folder of their own.
        folder = contexts.folder if (contexts.folder / CONFIG).exists() else Path(facts["sae"]["folder"])
        sae = load_sae(folder, pick_device(device))
        if sae.hashes != facts["sae"]["weights"]:
            raise WrongInput(f"{folder} has other weights than its contexts; run routesae contexts again")
        self.context = cache.manifest.context
        self.first_row = max(0, cache.manifest.rows - POOL_TOKENS // self.context)
        self.active = dict(zip(latents, active_positions(sae, cache, self.first_row, list(latents)), strict=True))

    def holds(self, latent: int, place: tuple[int, int, int]) -> bool:
        """Whether the latent is silent on a window (row, first position, length), which is in the last rows."""
        row, first, length = place
        at = (row - self.first_row) * self.context + first
        return row >= self.first_row and not self.active[latent][at : at + length].any()


@torch.no_grad()
def active_positions(sae: SAE, cache: Cache, first_row: int, latents: Sequence[int]) -> npt.NDArray[np.bool_]:
    """bool [W, P]: on which positions of the cache's rows from `first_row` on each of `latents` is active."""
    require_fit(sae, cache)
    first, after = first_row * cache.manifest.context, cache.manifest.rows * cache.manifest.context
    active_WP = torch.zeros(len(latents), after - first, dtype=torch.bool, device=sae.device)
    asked_F = torch.full((sae.recipe.latents,), -1, device=sae.device)
    asked_F[list(latents)] = torch.arange(len(latents), device=sae.device)
    selection = Selection(cache, first_row, cache.manifest.rows, sae.recipe.layers)
    for hidden, position_N in read_in_order(selection, [sae], sae.device):
        row_M, latent_M, _ = sae.encode(hidden).active()
        position_M, asked_M = position_N[row_M % hidden.tokens] - first, asked_F[latent_M]  # mlsae: layer after layer
        active_WP[asked_M[asked_M >= 0], position_M[asked_M >= 0]] = True
    return active_WP.cpu().numpy()
