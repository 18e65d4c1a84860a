"""Routers: which layer each token is read from, and what the router learns by.

    g = agg_ℓ(x^ℓ), the sum or the mean;   r = W_r g;   w = softmax(r) ∈ R^L;   ℓ* = argmax w      (2503.08200)

    published  x = w_ℓ*·x^ℓ*. The router's only gradient runs through the scale w_ℓ*, which NormMSE nearly cancels:
               input and target are scaled alike, and only the SAE's biases see it
    top2       each token's loss is the mean of its two likeliest layers' losses, weighted by w over the two
    frozen     control: the router keeps its first weights
    random     control: a layer that depends on nothing that matters. Training draws one for each token; in use it is
               a hash of the token's id and position, so that batches, splicing and generation agree

Only `published` scales x by w; the others read x^ℓ* as it is. A load-balancing term, --balance b, adds
b·L·Σ_ℓ f_ℓ P_ℓ with f_ℓ the share of tokens at layer ℓ and P_ℓ the mean of w_ℓ (2101.03961, eq. 4).

Dimension letters: L layers, N tokens, D width, R rows: a token's reading of one layer; usually one a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from routesae.train.ranks.distributed import batch_mean

ROUTERS = ("published", "top2", "frozen", "random")
CONTROLS = ("frozen", "random")  # do not learn
SCALED = ("published", "frozen")  # read w·x rather than x
_MIX = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64)  # of splitmix64, as int64


class Rows(NamedTuple):
    """What the SAE reads: token_R and its layer at_R, an index into the recipe's layers.

    scale_R: what x is multiplied by; None: by nothing. weights_R: the rows' weights in the loss, summing to 1; None:
    all alike.
    """

    token_R: Tensor
    at_R: Tensor
    scale_R: Tensor | None = None
    weights_R: Tensor | None = None


def rows(router: str, w_NL: Tensor, *, training: bool) -> Rows:
    """Where each token is read under hard routing: its likeliest layer, unless `router` trains otherwise."""
    token_N = torch.arange(len(w_NL), device=w_NL.device)
    if training and router == "top2" and w_NL.shape[1] > 1:
        top = w_NL.topk(2, dim=1)
        share_N2 = top.values / top.values.sum(1, keepdim=True)
        token_R = token_N.repeat_interleave(2)
        return Rows(token_R, top.indices.flatten(), None, share_N2.flatten() / len(w_NL))
    at_N = w_NL.argmax(1)
    return Rows(token_N, at_N, w_NL.gather(1, at_N[:, None]).squeeze(1) if router in SCALED else None)


def places_of(token_ids: Tensor, positions: Tensor) -> Tensor:
    """int64, of their shape: one number for each token's id and its position in its row."""
    return positions.long() * 2**32 + token_ids


def hashed_layers(place_N: Tensor, layers: int) -> Tensor:
    """int64 [N]: an index of a layer for each of `places_of`, spread evenly; exact, as all is whole numbers."""
    for factor in _MIX:
        place_N = place_N * factor  # int64 wraps around
        place_N = place_N ^ (place_N >> 31 & 0x1FFFFFFFF)
    return (place_N & 0x7FFFFFFF) % layers


def balance_loss(w_NL: Tensor, at_R: Tensor) -> Tensor:
    """L·Σ_ℓ f_ℓ P_ℓ: 1 where tokens and probabilities are spread evenly, L where one layer has all."""
    layers = w_NL.shape[1]
    share_L = batch_mean(torch.bincount(at_R, minlength=layers) / len(at_R))
    return layers * (share_L * batch_mean(w_NL.mean(0))).sum()
