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

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from routesae.analyze.inputs.saes import open_saes, rows_to_read
from routesae.analyze.latents.settings import CompareSettings
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.machine.settings import OUT
from routesae.reporting import Report, Table, WrongInput, silent
from routesae.train.evaluate import read_in_order
from routesae.train.saes import SAE, Crosscoder
from routesae.train.sparse.pairs import Pairs

LATENTS_AT_A_TIME = 1024
SHOWN = 10  # pairs
TINY = 1e-12


class Comparison(dict[str, Any]):
    """a, b: the SAEs' names. tokens: N, of the rows of the corpus that are named.

    counts: how many latents are shared, by each measure and both, of how many;
    mean_nearest: the mean over A's latents of their largest likeness to any of B's. pairs: the shared latents, with
    their likeness by each measure, None where they are not shared by it."""

    def __str__(self) -> str:
        return f"{self['counts']}\n\n{Table(self['pairs'][:SHOWN])}"

    def _repr_html_(self) -> str:
        return f"{self['counts']._repr_html_()}{Table(self['pairs'][:SHOWN])._repr_html_()}"


class Activations(NamedTuple):
    """Of an SAE's latents on N tokens: pairs and their f_M, and each latent's mean and standard deviation, [F]."""

    pairs: Pairs
    f_M: Tensor
    mean_F: Tensor
    std_F: Tensor


def compare(settings: CompareSettings, report: Report = silent) -> Comparison:
    """Raises WrongInput where the SAEs and the cache do not fit together."""
    cache = Cache(settings.cache)
    opened = open_saes((settings.a, settings.b), Path(OUT.default), cache, pick_device(settings.device))
    if len(opened) < 2:
        raise WrongInput(f"{settings.a} and {settings.b} are one SAE; name two")
    one, other = saes = [opened_sae.sae for opened_sae in opened.values()]
    rows, first, after = rows_to_read(None, cache, opened, settings.tokens)
    W_FC, W_GC = _decoders(one, other)
    f, g = _activations(cache, slice(first, after), saes, report)
    found = {"decoder": _nearest(lambda part: W_FC[part] @ W_GC.T, one.latents)}
    found["activations"] = _nearest(partial(_correlations, f, g), one.latents)
    shared = {name: mutual_F & (like_F >= settings.threshold) for name, (like_F, _, mutual_F) in found.items()}
    same_F = found["decoder"][1] == found["activations"][1]
    shared["both"] = shared["decoder"] & shared["activations"] & same_F
    counts = Table({"by": name, "shared": int(of_F.sum())} for name, of_F in shared.items())
    for row in counts:
        row |= {"of A": one.latents, "of B": other.latents}
        row["mean_nearest"] = float(found[row["by"]][0].mean()) if row["by"] in found else None
    pairs: dict[tuple[int, int], dict[str, Any]] = {}
    for name, (like_F, nearest_F, _) in found.items():
        for a in torch.nonzero(shared[name]).flatten().tolist():
            b = int(nearest_F[a])
            pairs.setdefault((a, b), {"A": a, "B": b, **dict.fromkeys(found)})[name] = float(like_F[a])
    strongest = sorted(pairs.values(), key=lambda pair: -sum(pair[name] or 0 for name in found))
    named = dict(zip("ab", opened, strict=True))
    read = {"tokens": f.pairs.tokens, "rows": rows, "corpus": cache.manifest.corpus}
    return Comparison(named, **read, counts=counts, pairs=Table(strongest))


def _decoders(one: SAE, other: SAE) -> list[Tensor]:
    """[F, C] and [G, C], unit rows."""
    alike = isinstance(one, Crosscoder) and isinstance(other, Crosscoder) and one.layers == other.layers
    rows = [sae.dictionary.W_dec_FD for sae in (one, other)]
    if not alike:
        rows = [W.view(len(W), -1, one.recipe.width).sum(1) for W in rows]
    return [torch.nn.functional.normalize(W, dim=1) for W in rows]


def _nearest(likeness: Callable[[slice], Tensor], latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of A's F latents its largest likeness to one of B's, which that is, and whether it is that one's too.

    likeness: of some of A's latents to all of B's, [n, G].
    """
    best, best_G = [], None
    for part in _blocks(latents):
        likeness_nG = likeness(part)
        best.append(likeness_nG.max(1))
        of_G, at_G = likeness_nG.max(0)
        if best_G is None:
            best_G, nearest_G = of_G, at_G
        nearest_G = torch.where(of_G > best_G, at_G + part.start, nearest_G)
        best_G = torch.maximum(best_G, of_G)
    like_F, nearest_F = (torch.cat(column) for column in zip(*best, strict=True))
    return like_F, nearest_F, nearest_G[nearest_F] == torch.arange(latents, device=like_F.device)


@torch.no_grad()
def _activations(cache: Cache, rows: slice, saes: Sequence[SAE], report: Report) -> Iterator[Activations]:
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in saes]
    done = 0
    for hidden, _ in read_in_order(cache, rows, saes, report, "compare"):
        for sae, into in zip(saes, parts, strict=True):
            row_M, latent_M, f_M = sae.encode(hidden).active()
            into.append((row_M % hidden.tokens + done, latent_M, f_M))  # an mlsae's rows come layer after layer
        done += hidden.tokens
    for sae, of_batches in zip(saes, parts, strict=True):
        token_M, latent_M, f_M = (torch.cat(column) for column in zip(*of_batches, strict=True))
        pairs = Pairs(done, sae.latents, token_M, latent_M)
        moments = [torch.std_mean(_dense(pairs, f_M, part), 0, correction=0) for part in _blocks(sae.latents)]
        std_F, mean_F = (torch.cat(column) for column in zip(*moments, strict=True))
        yield Activations(pairs, f_M, mean_F, std_F)


def _dense(pairs: Pairs, f_M: Tensor, part: slice) -> Tensor:
    """f_Nn of some latents; what a token has of several layers is added up."""
    at_M = torch.nonzero((pairs.latents_M >= part.start) & (pairs.latents_M < part.stop)).squeeze(1)
    f_Nn = f_M.new_zeros(pairs.tokens, part.stop - part.start)
    return f_Nn.index_put_((pairs.tokens_M[at_M], pairs.latents_M[at_M] - part.start), f_M[at_M], accumulate=True)


def _correlations(ours: Activations, theirs: Activations, part: slice) -> Tensor:
    """[n, G]; 0 for a latent that is never active."""
    f_Nn = _dense(ours.pairs, ours.f_M, part)
    products_nG = theirs.pairs.rows_by_latent(theirs.f_M, f_Nn).T
    covariance_nG = products_nG / len(f_Nn) - ours.mean_F[part, None] * theirs.mean_F
    return covariance_nG / (ours.std_F[part, None] * theirs.std_F).clamp(min=TINY)


def _blocks(latents: int) -> Iterator[slice]:
    return (slice(at, min(at + LATENTS_AT_A_TIME, latents)) for at in range(0, latents, LATENTS_AT_A_TIME))
