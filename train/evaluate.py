"""Scores that need the cache alone: held-out hidden states and an SAE in; NormMSE, FVU, L0, dead, routing out.

Every score is over all tokens read, weighted by token; never a mean of batch means.

Dimension letters: L layers, N tokens, D width, F latents.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from routesae.harvest.cache import Cache
from routesae.reporting import Progress, Report, WrongInput, silent
from routesae.train.batches import Selection, cut_plans, load
from routesae.train.losses import squared_error_shares
from routesae.train.saes import SAE
from routesae.train.saes.normalise import normalise_layers

BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class CacheScores:
    """tokens: scored. norm_mse: mean of ‖x−x̂‖²/‖x‖². fvu: Σ‖x−x̂‖²/Σ‖x−mean‖². Both on the SAE's own input.

    l0: active latents a token. dead: share of latents active on none of the tokens. density_F: share of the
    tokens each latent is active on. layer_shares: share of tokens routed to each layer, and routing_entropy the
    entropy of those shares in nats; both None without a router.
    """

    tokens: int
    norm_mse: float
    fvu: float
    l0: float
    dead: float
    density_F: torch.Tensor
    layer_shares: dict[int, float] | None
    routing_entropy: float | None

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON takes them; the densities, one a latent, are left out."""
        scores = asdict(replace(self, density_F=torch.empty(0)))
        del scores["density_F"]
        return scores


@torch.no_grad()
def score_on_cache(sae: SAE, cache: Cache, first_row: int, after_row: int, report: Report = silent) -> CacheScores:
    """Score `sae` on the kept tokens of rows [first_row, after_row) of the cache's tokens; it is in evaluation
    mode from here on. For mlsae and random a token counts once a layer.

    Raises WrongInput where there is no such token, the width differs or a layer was not harvested.
    """
    require_fit(sae, cache)
    sae.eval()
    selection = Selection(cache, first_row, after_row, sae.recipe.layers)
    tokens = len(selection)
    if tokens == 0:
        raise WrongInput(f"{cache.path} has no kept token in rows {first_row} to {after_row - 1}; harvest more text")
    device, layers, rows = sae.device, len(sae.recipe.layers), 0
    sum_D: torch.Tensor | float = 0.0
    shares = errors = squares = torch.zeros((), dtype=torch.float64, device=device)
    active_F = torch.zeros(sae.recipe.latents, dtype=torch.int64, device=device)
    routed_L = torch.zeros(layers, dtype=torch.int64, device=device)
    done = 0
    plans = cut_plans(iter(selection.blocks()), BATCH_TOKENS)
    with closing(load(selection, plans, BATCH_TOKENS, device)) as batches:
        for hidden_LND in batches:
            out = sae(normalise_layers(hidden_LND, sae.recipe.normalize))
            shares = shares + squared_error_shares(out.x_ND, out.reconstruction_ND).double().sum()
            errors = errors + (out.x_ND - out.reconstruction_ND).square().sum().double()
            squares = squares + out.x_ND.square().sum().double()
            sum_D = sum_D + out.x_ND.sum(0).double()
            active_F += out.latents.active_counts(len(active_F))
            rows += len(out.x_ND)
            if out.routing_NL is not None:
                routed_L += torch.bincount(out.routing_NL.argmax(1), minlength=layers)
            done += hidden_LND.shape[1]
            report(Progress("score on cache", done, tokens, "tokens", {}))
    return CacheScores(
        tokens=tokens,
        norm_mse=float(shares) / rows,
        fvu=float(errors / (squares - torch.as_tensor(sum_D).square().sum() / rows)),
        l0=int(active_F.sum()) / rows,
        dead=float((active_F == 0).double().mean()),
        density_F=(active_F.double() / rows).cpu(),
        layer_shares=dict(zip(sae.recipe.layers, (routed_L / tokens).tolist(), strict=True))
        if routed_L.any()
        else None,
        routing_entropy=entropy(routed_L / tokens) if routed_L.any() else None,
    )


def entropy(shares_L: torch.Tensor) -> float:
    """−Σ p ln p in nats: 0 where all tokens share one layer, ln L where they are spread evenly."""
    return float(torch.special.entr(shares_L.double()).sum())


def require_fit(sae: SAE, cache: Cache) -> None:
    """Raises WrongInput where the SAE's width or layers are not the cache's."""
    if sae.recipe.width != cache.manifest.width:
        raise WrongInput(
            f"the SAE's width {sae.recipe.width} is not the {cache.manifest.width} of {cache.path}; "
            "give the cache it was trained on"
        )
    cache.require_layers(sae.recipe.layers)
