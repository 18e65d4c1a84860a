"""Score SAEs on held-out hidden states of the cache alone: NormMSE, FVU, L0, dead latents, routing.

Every score is over all tokens read, weighted by token; never a mean of batch means.

Dimension letters: L layers, N tokens, D width, F latents, S rows of tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from routesae.harvest.cache.reader import Cache
from routesae.reporting import Progress, Report, WrongInput, silent
from routesae.train.loading.batches import Selection, cut_plans, load
from routesae.train.losses import squared_error_shares
from routesae.train.saes import SAE, Forward, Recipe
from routesae.train.saes.normalise import Hidden, places_of

BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class CacheScores:
    """tokens: scored. norm_mse: mean of ‖x−x̂‖²/‖x‖². fvu: Σ‖x−x̂‖²/Σ‖x−mean‖². Both on the SAE's own input.

    l0: active latents a token. dead: share of latents active on none of the tokens. layer_shares: share of tokens
    routed to each layer, and routing_entropy the entropy of those shares in nats; both None without a router.
    by_row: the sums that the scores come from, for each row of tokens scored, float64 [S]. readings: inputs the SAE
    read of it, which are its kept tokens, times the layers for mlsae and random. Over them shares of ‖x−x̂‖²/‖x‖²,
    errors of ‖x−x̂‖², deviations of ‖x−mean‖², active of active latents. With a router also routed [S, L], tokens at
    each layer.
    """

    tokens: int
    norm_mse: float
    fvu: float
    l0: float
    dead: float
    layer_shares: dict[int, float] | None
    routing_entropy: float | None
    by_row: dict[str, torch.Tensor]

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON, without those of single rows of tokens."""
        return {name: value for name, value in vars(self).items() if name != "by_row"}


def score_on_cache(sae: SAE, cache: Cache, first_row: int, after_row: int, report: Report = silent) -> CacheScores:
    """`score_all_on_cache` of one SAE."""
    return score_all_on_cache({"": sae}, cache, first_row, after_row, report)[""]


@torch.no_grad()
def score_all_on_cache(
    saes: Mapping[str, SAE], cache: Cache, first_row: int, after_row: int, report: Report = silent
) -> dict[str, CacheScores]:
    """Score SAEs on the kept tokens of rows [first_row, after_row) of the cache's tokens, read once for all of them;
    they are in evaluation mode from here on. For mlsae and random a token counts once a layer. Raises as
    `read_in_order`.
    """
    for sae in saes.values():
        sae.eval()
    rows = slice(first_row, after_row)
    sums = {name: _Sums(sae.recipe, after_row - first_row, sae.device) for name, sae in saes.items()}
    for hidden, position_N in read_in_order(cache, rows, list(saes.values()), report, "score on cache"):
        for name, sae in saes.items():
            sums[name].add(sae(hidden), position_N // cache.manifest.context - first_row)
    return {name: of_sae.scores() for name, of_sae in sums.items()}


def read_in_order(
    cache: Cache, rows: slice, saes: Sequence[SAE], report: Report = silent, stage: str = ""
) -> Iterator[tuple[Hidden, torch.Tensor]]:
    """Every kept token of some rows once, in stored order, for these SAEs: hidden states, and position_N in the
    cache's tokens, on the SAEs' device.

    They are valid until the next ones are asked for, which reports how far the stage is. Raises WrongInput if there
    is no such token, a width differs or a layer was not harvested.
    """
    for sae in saes:
        require_fit(sae, cache)
    device, done = saes[0].device, 0
    selection = Selection(cache, rows.start, rows.stop, sorted({layer for sae in saes for layer in sae.layers}))
    if len(selection) == 0:
        raise WrongInput(f"{cache.path} has no kept token in rows {rows.start} to {rows.stop - 1}; harvest more text")
    position_N = np.concatenate([selection.positions(shard) for shard in range(len(selection.shards))])
    place_N, at_N = None, torch.from_numpy(position_N).to(device)
    if any(sae.recipe.router == "random" for sae in saes):
        token_ids_N = torch.from_numpy(cache.tokens().reshape(-1)[position_N]).to(device)
        place_N = places_of(token_ids_N, at_N % cache.manifest.context)
    plans = cut_plans(iter(selection.blocks()), BATCH_TOKENS)
    with closing(load(selection, plans, BATCH_TOKENS, device)) as batches:
        for batch in batches:
            part = slice(done, done + batch.hidden_LND.shape[1])
            hidden = Hidden(*batch, None if place_N is None else place_N[part], layers=selection.layers)
            yield hidden, at_N[part]
            done = part.stop
            report(Progress(stage, done, len(selection), "tokens", {}))


class _Sums:
    """The sums of CacheScores.by_row over the batches. ‖x−mean‖² is taken from the mean of the first batch and
    corrected at the end: the mean of all is known only then, and Σ‖x‖² − N‖mean‖² would cancel."""

    def __init__(self, recipe: Recipe, rows: int, device: torch.device):
        self.recipe, self.rows, self.layers = recipe, rows, len(recipe.layers)
        names = ("readings", "shares", "errors", "deviations", "active")
        self.by_row = {name: torch.zeros(rows, dtype=torch.float64, device=device) for name in names}
        self.active_F = torch.zeros(recipe.latents, dtype=torch.int64, device=device)
        self.tokens = 0  # the readings are more where each is read once a layer
        self.near_D: torch.Tensor | None = None  # the mean of the first batch
        self.sum_D: torch.Tensor | float = 0.0  # of x − near

    def add(self, out: Forward, row_N: torch.Tensor) -> None:
        """row_N: the row of tokens that each of the batch's tokens stands in, from 0."""
        x_ND, sums = out.x_ND, self.by_row
        self.tokens += len(row_N)
        row_R = row_N.repeat(len(x_ND) // len(row_N))  # a reading's; mlsae and random have one a layer
        if self.near_D is None:
            self.near_D = x_ND.mean(0)
        from_near_ND = x_ND - self.near_D
        self.sum_D = self.sum_D + from_near_ND.sum(0).double()
        sums["readings"] += torch.bincount(row_R, minlength=self.rows)
        sums["shares"].index_add_(0, row_R, squared_error_shares(x_ND, out.reconstruction_ND).double())
        sums["errors"].index_add_(0, row_R, (x_ND - out.reconstruction_ND).square().sum(1).double())
        sums["deviations"].index_add_(0, row_R, from_near_ND.square().sum(1).double())
        sums["active"] += torch.bincount(row_R[out.latents.active()[0]], minlength=self.rows)
        self.active_F += out.latents.active_counts
        if out.routing_NL is not None:
            at_N = row_N * self.layers + out.routing_NL.argmax(1)
            routed_SL = torch.bincount(at_N, minlength=self.rows * self.layers).view(self.rows, self.layers)
            sums["routed"] = routed_SL.double() + sums.get("routed", 0.0)

    def scores(self) -> CacheScores:
        sums = self.by_row
        shift_D = torch.as_tensor(self.sum_D) / sums["readings"].sum()
        sums["deviations"] -= sums["readings"] * shift_D.square().sum()
        sums = {name: of_rows.cpu() for name, of_rows in sums.items()}
        readings = int(sums["readings"].sum())
        shares_L = sums["routed"].sum(0) / self.tokens if "routed" in sums else None
        layers = self.recipe.layers
        return CacheScores(
            tokens=self.tokens,
            norm_mse=float(sums["shares"].sum()) / readings,
            fvu=float(sums["errors"].sum() / sums["deviations"].sum()),
            l0=float(sums["active"].sum()) / readings,
            dead=float((self.active_F == 0).double().mean()),
            layer_shares=None if shares_L is None else dict(zip(layers, shares_L.tolist(), strict=True)),
            routing_entropy=None if shares_L is None else entropy(shares_L),
            by_row=sums,
        )


def entropy(shares_L: torch.Tensor) -> float:
    """−Σ p ln p in nats: 0 where all tokens share one layer, ln L where they are spread evenly."""
    return float(torch.special.entr(shares_L.double()).sum())


def require_fit(sae: SAE, cache: Cache) -> None:
    """Raises WrongInput if the SAE's width or layers are not the cache's."""
    if sae.recipe.width != cache.manifest.width:
        raise WrongInput(
            f"the SAE's width {sae.recipe.width} is not the {cache.manifest.width} of {cache.path}; "
            "give the cache it was trained on"
        )
    cache.require_layers(sae.recipe.layers)
