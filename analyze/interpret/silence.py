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
from routesae.train.saes.normalise import Hidden, places_of

POOL_TOKENS = 16_384  # enough for ten texts of any latent that is not active nearly everywhere
BATCH_TOKENS = 512  # all F latents of so many exist at once


class Silence:
    """What the SAE says of `latents` in the last rows of the cache that `contexts` are of.

    Raises WrongInput if the cache is another one.
    """

    def __init__(self, contexts: ContextsFile, latents: Collection[int], path: str | None, device: str):
        facts = contexts.facts
        cache = Cache(path or facts["cache"]["path"])
        if cache.manifest.tokens_hash != facts["cache"]["tokens_hash"]:
            raise WrongInput(f"--cache {path} is not the one the contexts in {contexts.folder} are of; give that one")
        self.context = cache.manifest.context
        self.first_row = max(0, cache.manifest.rows - POOL_TOKENS // self.context)
        # The contexts of an SAE from the hub are in a folder of their own.
        weights = contexts.folder if (contexts.folder / CONFIG).exists() else Path(facts["sae"]["folder"])
        active_WP = active_positions(weights, cache, self.first_row, list(latents), device)
        self.active = dict(zip(latents, active_WP, strict=True))

    def holds(self, latent: int, place: tuple[int, int, int]) -> bool:
        """Whether the latent is silent on a window (row, first position, length), which is in the last rows."""
        row, first, length = place
        at = (row - self.first_row) * self.context + first
        return row >= self.first_row and not self.active[latent][at : at + length].any()


def active_positions(
    folder: Path, cache: Cache, first_row: int, latents: Sequence[int], device: str
) -> npt.NDArray[np.bool_]:
    """bool [W, P]: on which positions of the cache's rows from `first_row` on each of `latents` is active."""
    sae = load_sae(folder, pick_device(device))
    require_fit(sae, cache)
    manifest = cache.manifest
    first = first_row * manifest.context
    active_WP = np.zeros((len(latents), manifest.rows * manifest.context - first), np.bool_)
    selection = Selection(cache, first_row, manifest.rows, sae.recipe.layers)
    positions = [selection.positions(shard) for shard in range(len(selection.shards))]
    tokens = cache.tokens().reshape(-1)
    plans = list(cut_plans(iter(selection.blocks()), BATCH_TOKENS))
    with torch.no_grad(), closing(load(selection, iter(plans), BATCH_TOKENS, sae.device)) as batches:
        for plan, batch in zip(plans, batches, strict=True):
            position_N = np.concatenate([positions[block.shard][block.first : block.after] for block in plan])
            place_N = places_of(*map(torch.from_numpy, (tokens[position_N], position_N % manifest.context)))
            found = sae(Hidden(*batch, place_N.to(sae.device))).latents
            active_RW = (found.dense()[:, list(latents)] > 0).cpu().numpy()
            for active_NW in np.split(active_RW, len(active_RW) // len(position_N)):  # mlsae, random: once a layer
                active_WP[:, position_N - first] |= active_NW.T
    return active_WP
