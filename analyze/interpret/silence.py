"""The last rows of a cache and some latents in; texts there on which each of the latents is silent, out.

Whether it is silent is not guessed: the SAE runs over those rows.

Dimension letters: N tokens, F latents, W latents asked about, R rows: a token's reading of a layer,
P positions of the cache's last rows.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from routesae.analyze.contexts.file import ContextsFile
from routesae.analyze.interpret.examples import place_of, text_of
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.reporting import WrongInput
from routesae.train.evaluate import require_fit
from routesae.train.folder.checkpoint import CONFIG, load_sae
from routesae.train.loading.batches import Selection, cut_plans, load
from routesae.train.saes.normalise import Hidden
from routesae.train.saes.routers import places_of

POOL_TOKENS, POOL_TEXTS = 16_384, 2_000  # enough for ten texts of any latent that is not active nearly everywhere
BATCH_TOKENS = 512  # all F latents of so many exist at once


class Pool:
    """Texts in the cache's last rows, of any latent's contexts, and where each of `latents` is active there.

    Raises WrongInput where the cache is another than the contexts are of.
    """

    def __init__(
        self, folder: Path, contexts: ContextsFile, latents: Collection[int], *, cache: str | None, device: str
    ):
        facts = contexts.facts
        path = cache or facts["cache"]["path"]
        opened = Cache(path)
        if opened.manifest.tokens_hash != facts["cache"]["tokens_hash"]:
            raise WrongInput(f"--cache {path} is not the one the contexts in {folder} are of; give that one")
        self.context = opened.manifest.context
        self.first_row = max(0, opened.manifest.rows - POOL_TOKENS // self.context)
        self.index = {latent: w for w, latent in enumerate(latents)}
        # An SAE from the hub has its contexts in a folder of their own.
        weights = folder if (folder / CONFIG).exists() else Path(facts["sae"]["folder"])
        self.active_WP = active_positions(weights, opened, self.first_row, list(latents), device)
        self.texts: dict[tuple[int, int, int], str] = {}  # by row, first position, length
        for latent in contexts.latents():
            for context in chain(latent.chosen, *latent.samples.values()):
                if context.row >= self.first_row:
                    self.texts.setdefault(place_of(context), text_of(context))
            if len(self.texts) >= POOL_TEXTS:
                break

    def silent(self, latent: int, count: int, rng: random.Random) -> list[tuple[tuple[int, int, int], str]]:
        """Up to `count` texts with their places on no token of which `latent` is active."""
        active_P = self.active_WP[self.index[latent]]
        places = list(self.texts)
        rng.shuffle(places)
        found: list[tuple[tuple[int, int, int], str]] = []
        for row, first, length in places:
            base = (row - self.first_row) * self.context + first
            if len(found) < count and not active_P[base : base + length].any():
                found.append(((row, first, length), self.texts[row, first, length]))
        return found


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
