"""Which latents of two SAEs are the same: matched by their decoder rows, and by when they are active.

    decoder        cosine of two decoder rows; a crosscoder's are those of all its layers added up, unless the other
                   SAE is a crosscoder of the same layers
    activations    Pearson's correlation of two latents' activations over the same held-out tokens, zeros included; an
                   mlsae's or random's are added up over the layers

Two latents are shared where each is the other's nearest and they are at least `threshold` alike, which is 0.7 as in
Paulo & Belrose 2025 (2501.16615). The SAEs may read different layers, be of different variants and sizes.

Dimension letters: N tokens, D width, F and G latents of the two SAEs, n of F at a time, M pairs of a token and a
latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from routesae.analyze.inputs.saes import open_saes
from routesae.analyze.latents.settings import CompareSettings
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.reporting import Progress, Report, Table, WrongInput, silent
from routesae.train.evaluate import read_in_order
from routesae.train.loading.batches import Selection
from routesae.train.saes import SAE, Crosscoder
from routesae.train.sparse.pairs import Pairs

LATENTS_AT_A_TIME = 1024
TINY = 1e-12


class Comparison(dict[str, Any]):
    """a, b: the SAEs' names. tokens: N. counts: how many latents are shared, by each measure and both, of how many;
    mean_nearest: the mean over A's latents of their largest likeness to any of B's. pairs: the shared latents, with
    their likeness by each measure, None where they are not shared by it."""

    def __str__(self) -> str:
        return f"{self['counts']}\n\n{Table(self['pairs'][:20])}"

    def _repr_html_(self) -> str:
        return f"{self['counts']._repr_html_()}{Table(self['pairs'][:20])._repr_html_()}"


class Matches(NamedTuple):
    """likeness_F: of each latent of A to the nearest of B, nearest_F. mutual_F: bool, whether it is that one's
    nearest too."""

    likeness_F: Tensor
    nearest_F: Tensor
    mutual_F: Tensor


def compare(settings: CompareSettings, report: Report = silent) -> Comparison:
    """Raises WrongInput where the SAEs and the cache do not fit together."""
    cache, device = Cache(settings.cache), pick_device(settings.device)
    opened = open_saes((settings.a, settings.b), Path(), cache, device)
    if len(opened) < 2:
        raise WrongInput(f"{settings.a} and {settings.b} are one SAE; name two")
    one, other = (opened_sae.sae for opened_sae in opened.values())
    first, after = cache.manifest.train_rows, cache.manifest.rows
    after = min(after, first + max(1, settings.tokens // cache.manifest.context))
    selection = Selection(cache, first, after, sorted({*one.layers, *other.layers}))
    if len(selection) == 0:
        raise WrongInput(f"{cache.path} has no held-out token to compare on; harvest more text")
    W_FC, W_GC = _decoders(one, other)
    matches = {"decoder": _matches(lambda part: W_FC[part] @ W_GC.T, len(W_FC), len(W_GC), device)}
    f, g = _activations(selection, (one, other), device, report)
    matches["activations"] = _matches(partial(_correlations, f, g), one.latents, other.latents, device)
    shared = {name: found.mutual_F & (found.likeness_F >= settings.threshold) for name, found in matches.items()}
    same_F = matches["decoder"].nearest_F == matches["activations"].nearest_F
    shared["both"] = shared["decoder"] & shared["activations"] & same_F
    counts = Table(
        {
            "by": name,
            "shared": int(shared_F.sum()),
            "of A": one.latents,
            "of B": other.latents,
            "mean_nearest": float(matches[name].likeness_F.mean()) if name in matches else None,
        }
        for name, shared_F in shared.items()
    )
    alike: dict[tuple[int, int], dict[str, Any]] = {}
    for name, found in matches.items():
        for latent in torch.nonzero(shared[name]).flatten().tolist():
            pair = latent, int(found.nearest_F[latent])
            row = alike.setdefault(pair, {"A": pair[0], "B": pair[1], **dict.fromkeys(matches)})
            row[name] = float(found.likeness_F[latent])
    pairs = sorted(alike.values(), key=lambda pair: -sum(pair[name] or 0 for name in matches))
    names = list(opened)
    return Comparison(
        a=names[0],
        b=names[1],
        tokens=len(selection),
        threshold=settings.threshold,
        counts=counts,
        pairs=Table(pairs),
    )


def _decoders(one: SAE, other: SAE) -> tuple[Tensor, Tensor]:
    """[F, C] and [G, C], unit rows."""
    alike = isinstance(one, Crosscoder) and isinstance(other, Crosscoder) and one.layers == other.layers
    rows = [sae.dictionary.W_dec_FD for sae in (one, other)]
    if not alike:
        rows = [W.view(len(W), -1, sae.recipe.width).sum(1) for W, sae in zip(rows, (one, other), strict=True)]
    W_FC, W_GC = (W / torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp(min=TINY) for W in rows)
    return W_FC, W_GC


def _matches(likeness_of: Callable[[slice], Tensor], ours: int, theirs: int, device: torch.device) -> Matches:
    """likeness_of: of some of A's latents to all of B's, [n, G]."""
    best_F, nearest_F = list[Tensor](), list[Tensor]()
    best_G, nearest_G = (
        torch.full((theirs,), -2.0, device=device),
        torch.zeros(theirs, dtype=torch.int64, device=device),
    )
    for part in _blocks(ours):
        likeness_nG = likeness_of(part)
        for into, of_n in zip((best_F, nearest_F), likeness_nG.max(1), strict=True):
            into.append(of_n)
        of_G, at_G = likeness_nG.max(0)
        nearest_G = torch.where(of_G > best_G, at_G + part.start, nearest_G)
        best_G = torch.maximum(best_G, of_G)
    likeness_F, nearest = torch.cat(best_F), torch.cat(nearest_F)
    mutual_F = nearest_G[nearest] == torch.arange(ours, device=device)
    return Matches(likeness_F.cpu(), nearest.cpu(), mutual_F.cpu())


class Activations(NamedTuple):
    """Of an SAE's latents on N tokens: pairs and their f_M, and each latent's mean and standard deviation, [F]."""

    pairs: Pairs
    f_M: Tensor
    mean_F: Tensor
    std_F: Tensor


def _dense(pairs: Pairs, f_M: Tensor, part: slice) -> Tensor:
    """f_Nn of some latents; what a token has of several layers is added up."""
    at_M = torch.nonzero((pairs.latents_M >= part.start) & (pairs.latents_M < part.stop)).squeeze(1)
    f_Nn = f_M.new_zeros(pairs.tokens, min(part.stop, pairs.latents) - part.start)
    places = (pairs.tokens_M[at_M], pairs.latents_M[at_M] - part.start)
    return f_Nn.index_put_(places, f_M[at_M], accumulate=True)


@torch.no_grad()
def _activations(
    selection: Selection, saes: Sequence[SAE], device: torch.device, report: Report
) -> Iterator[Activations]:
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in saes]
    done = 0
    for hidden, _ in read_in_order(selection, saes, device):
        for sae, into in zip(saes, parts, strict=True):
            row_M, latent_M, f_M = sae.encode(hidden).active()
            into.append(
                (row_M % hidden.tokens + done, latent_M, f_M)
            )  # an mlsae's rows are those of layer after layer
        done += hidden.tokens
        report(Progress("compare", done, len(selection), "tokens", {}))
    for sae, of_batches in zip(saes, parts, strict=True):
        token_M, latent_M, f_M = (torch.cat(column) for column in zip(*of_batches, strict=True))
        pairs = Pairs(done, sae.latents, token_M, latent_M)
        moments = [torch.std_mean(_dense(pairs, f_M, part), 0, correction=0) for part in _blocks(sae.latents)]
        std_F, mean_F = (torch.cat(column) for column in zip(*moments, strict=True))
        yield Activations(pairs, f_M, mean_F, std_F)


def _correlations(ours: Activations, theirs: Activations, part: slice) -> Tensor:
    """[n, G]; 0 for a latent that is never active."""
    f_Nn = _dense(ours.pairs, ours.f_M, part)
    products_nG = theirs.pairs.rows_by_latent(theirs.f_M, f_Nn).T
    covariance_nG = products_nG / len(f_Nn) - ours.mean_F[part, None] * theirs.mean_F
    return covariance_nG / (ours.std_F[part, None] * theirs.std_F).clamp(min=TINY)


def _blocks(latents: int) -> Iterator[slice]:
    return (slice(start, start + LATENTS_AT_A_TIME) for start in range(0, latents, LATENTS_AT_A_TIME))
