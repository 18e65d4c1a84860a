"""Latents as people take them: shapes, the strongest, and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from routesae.reporting import WrongInput
from routesae.train.saes import SAE, SAES, Recipe, build

L, D, LATENTS, K = 3, 12, 40, 5


def make(name: str) -> SAE:
    """Random weights, biases and thresholds, in use; of a routesae the router sends tokens to every layer."""
    layers = (4,) if SAES[name].one_layer else (2, 4, 6)
    sae = build(Recipe(sae=name, layers=layers, width=D, latents=LATENTS, k=K), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        if name in ("batchtopk", "matryoshka"):
            sae.threshold.fill_(0.4)
    return sae.eval()


def hidden_of(sae: SAE, *lead: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    ending = (D,) if sae.one_layer else (L, D)
    return 3 * torch.randn(*lead, *ending, generator=generator) + 1


@pytest.mark.parametrize("name", SAES)
def test_latents_have_the_leading_shape_of_the_hidden_states(name: str) -> None:
    sae = make(name)
    hidden = hidden_of(sae, 2, 7)
    lead = (2, 7, L) if name in ("mlsae", "random") else (2, 7)
    latents = sae.encode(hidden)
    dense = latents.dense()
    assert dense.shape == (*lead, LATENTS)
    assert (dense > 0).any()
    assert latents.indices.shape == latents.values.shape == (*lead, int((dense > 0).sum(-1).max()))
    assert sae.latents == LATENTS
    assert len(sae.layers) == (1 if sae.one_layer else L)
    one = sae.encode(hidden[1, 3])  # no leading dimension at all
    torch.testing.assert_close(one.dense(), dense[1, 3])
    torch.testing.assert_close(sae.decode(one), sae.decode(latents)[1, 3])


@pytest.mark.parametrize("name", SAES)
def test_the_strongest_latents_are_those_of_topk_over_all(name: str) -> None:
    sae = make(name)
    latents = sae.encode(hidden_of(sae, 9))
    dense = latents.dense()
    for values, indices in (latents.top(3), (latents.values, latents.indices)):
        assert torch.equal(values, dense.topk(values.shape[-1]).values)
        assert torch.equal(dense.gather(-1, indices), values)
    scattered = torch.zeros_like(dense).scatter(-1, latents.indices, latents.values)
    assert torch.equal(scattered, dense)
    assert latents.top(LATENTS + 5).values.shape[-1] == LATENTS


@pytest.mark.parametrize("name", SAES)
def test_gradients_are_the_slopes_of_what_encode_and_decode_give(name: str) -> None:
    """Along a random direction in hidden states and in every weight, by central differences."""
    sae = make(name)
    hidden = hidden_of(sae, 6)
    # What decides, and does not add to the numbers, has no gradient.
    weights = {n: p for n, p in sae.named_parameters() if n.split(".")[-1] not in ("threshold_F", "b_gate_F")}
    if name == "routesae":
        weights.pop("router_LD")

    def loss(hidden: Tensor) -> Tensor:
        latents = sae.encode(hidden)
        return sae.decode(latents).square().mean() + latents.dense().square().sum()

    leaf = hidden.clone().requires_grad_()
    loss(leaf).backward()
    generator = torch.Generator().manual_seed(5)
    if name != "routesae":  # its router's scale is held fixed on the way back
        weights["hidden"] = hidden
    for what, moved in weights.items():
        grad = leaf.grad if what == "hidden" else moved.grad
        assert grad is not None, what
        for _ in range(100):  # until the same latents are active on both sides: f jumps where one becomes active
            step = 1e-3 * torch.randn(grad.shape, generator=generator)
            values, active = [], []
            with torch.no_grad():
                for sign in (1, -2, 1):
                    moved.add_(sign * step)
                    values.append(float(loss(hidden)))
                    active.append(sae.encode(hidden).dense() > 0)
            if torch.equal(active[0], active[1]):
                break
        slope = (values[0] - values[1]) / 2
        assert float((grad * step).sum()) == pytest.approx(slope, rel=0.03, abs=3e-5 * float(grad.norm())), what


def test_a_loaded_sae_records_nothing_unless_hidden_states_ask_for_it() -> None:
    sae = make("topk").requires_grad_(False)
    hidden = hidden_of(sae, 4)
    assert not sae.encode(hidden).dense().requires_grad
    assert sae.encode(hidden.requires_grad_()).dense().requires_grad
    with torch.no_grad():
        assert not sae.encode(hidden).dense().requires_grad


def test_hidden_states_of_another_shape_are_refused_with_the_shape_that_is_read() -> None:
    with pytest.raises(WrongInput, match=r"\[4, 7\], but this topk reads \[\.\.\., 12\]"):
        make("topk").encode(torch.zeros(4, 7))
    with pytest.raises(WrongInput, match=r"\[4, 12\], but this crosscoder reads \[\.\.\., 3, 12\]"):
        make("crosscoder").encode(torch.zeros(4, 12))
