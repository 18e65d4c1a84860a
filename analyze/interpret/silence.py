"""Where in the last rows of a cache latents are active, so that texts are found on which one of them is silent.

Dimension letters: N tokens, F latents, W latents asked about, R rows: a token's reading of a layer,
P positions of the cache's last rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from routesae.analyze.contexts.file import ContextsFile
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.reporting import WrongInput
from routesae.train.evaluate import require_fit
from routesae.train.folder.checkpoint import CONFIG, load_sae
from routesae.train.loading.batches import Selection, cut_plans, load
from routesae.train.saes import SAE
from routesae.train.saes.normalise import Hidden, places_of

POOL_TOKENS = 16_384  # enough for ten texts of any latent that is not active nearly everywhere
BATCH_TOKENS = 512  # all F latents of so many exist at once


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
    manifest, done = cache.manifest, 0
    active_WP = np.zeros((len(latents), (manifest.rows - first_row) * manifest.context), np.bool_)
    selection = Selection(cache, first_row, manifest.rows, sae.recipe.layers)
    position_N = np.concatenate([selection.positions(shard) for shard in range(len(selection.shards))])
    token_ids_N = cache.tokens().reshape(-1)[position_N]
    place_N = places_of(*map(torch.from_numpy, (token_ids_N, position_N % manifest.context))).to(sae.device)
    plans = cut_plans(iter(selection.blocks()), BATCH_TOKENS)
    with closing(load(selection, plans, BATCH_TOKENS, sae.device)) as batches:
        for batch in batches:
            at = slice(done, done + batch.hidden_LND.shape[1])
            done = at.stop
            dense_RF = sae(Hidden(*batch, place_N[at])).latents.dense()
            active_RW = (dense_RF[:, list(latents)] > 0).cpu().numpy()
            for active_NW in np.split(
                active_RW, len(active_RW) // (at.stop - at.start)
            ):  # mlsae, random: a layer each
                active_WP[:, position_N[at] - first_row * manifest.context] |= active_NW.T
    return active_WP
