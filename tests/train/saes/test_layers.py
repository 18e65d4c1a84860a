"""Crosscoder, mlsae and random, which read several layers: their equations token by token in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from routesae.tests.hidden import Normalised, normalise_layers
from routesae.train.losses import squared_error_shares
from routesae.train.saes import SAE, Recipe, build
from routesae.train.saes.crosscoder import Crosscoder
from routesae.train.saes.single import geometric_median
from routesae.train.saes.topk import TopK

L, N, D, LATENTS, K = 3, 20, 8, 32, 4
DEAD = torch.arange(7)
NONE_DEAD = DEAD[:0]


def normalised(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalise_layers(torch.randn(L, N, D, generator=generator) * 5 + 3, "token")


def make(name: str, **changes: Any) -> SAE:
    """With weights that are special in nothing."""
    recipe = Recipe(**{"sae": name, "layers": (4, 6, 9), "width": D, "latents": LATENTS, "k": K, **changes})
    sae = build(recipe, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


def leaves(sae: SAE) -> dict[str, Tensor]:
    return {
        name: parameter.detach().double().requires_grad_(parameter.requires_grad)
        for name, parameter in sae.named_parameters()
    }


def assert_gradients_are(sae: SAE, W: dict[str, Tensor]) -> None:
    """To 1e-5 of each gradient's norm."""
    for name, parameter in sae.named_parameters():
        expected = W[name].grad
        if expected is None:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert expected.norm() > 0, name
        error = float((parameter.grad.double() - expected).norm() / expected.norm())
        assert error < 1e-5, f"{name}: {error}"


# ----------------------------------------------------------------------------------------------- crosscoder


def crosscoded_by_hand(
    sae: SAE, W: dict[str, Tensor], x_LND: Tensor
) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
    """The loss; f of each token; and x̂ of each layer of each token."""
    blocks = [slice(layer * D, (layer + 1) * D) for layer in range(L)]  # a layer's own columns
    latents, reconstructions = [], []
    loss = torch.zeros((), dtype=torch.float64)
    assert sae.recipe.sparsity is not None
    for n in range(N):
        z_F = W["b_enc_F"]
        for layer, own in enumerate(blocks):
            z_F = z_F + W["W_enc_FD"][:, own] @ x_LND[layer, n]
        f_F = z_F.clamp(min=0)
        rows = [f_F @ W["W_dec_FD"][:, own] + W["b_dec_D"][own] for own in blocks]
        errors = sum(((x_LND[layer, n] - rows[layer]) ** 2).sum() for layer in range(L))
        loss = loss + errors / sum((x_LND[layer, n] ** 2).sum() for layer in range(L)) / N
        norms_F = sum((W["W_dec_FD"][:, own] ** 2).sum(1).sqrt() for own in blocks)
        penalty = f_F.mean() if sae.recipe.published else (f_F * norms_F).sum()
        loss = loss + sae.recipe.sparsity * penalty / N
        latents.append(f_F.detach())
        reconstructions.append([row.detach() for row in rows])
    return loss, latents, reconstructions


@pytest.mark.usefixtures("float32_path")
@pytest.mark.parametrize("published", [False, True])
def test_the_crosscoder_its_loss_and_all_its_gradients_are_the_equations_token_by_token(published: bool) -> None:
    sae = make("crosscoder", sparsity=0.03, published=published)
    x_LND = normalised()
    W = leaves(sae)
    expected, latents, reconstructions = crosscoded_by_hand(sae, W, x_LND.double())
    expected.backward()
    out = sae(Normalised(x_LND))
    objective = sae.loss(out, NONE_DEAD)
    objective.total.backward()
    assert objective.total.item() == pytest.approx(expected.item(), rel=1e-5)
    shares_N = squared_error_shares(out.x_ND.double(), out.reconstruction_ND.detach().double())
    assert objective.norm_mse.item() == pytest.approx(shares_N.mean().item(), rel=1e-5)
    f_NF = out.latents.dense().detach()
    for n in range(N):
        torch.testing.assert_close(f_NF[n].double(), latents[n], rtol=1e-5, atol=1e-5)
        for layer in range(L):
            own = slice(layer * D, (layer + 1) * D)
            assert torch.equal(out.x_ND[n, own], x_LND[layer, n])
            found_D = out.reconstruction_ND[n, own].detach().double()
            torch.testing.assert_close(found_D, reconstructions[n][layer], rtol=1e-5, atol=1e-5)
    assert_gradients_are(sae, W)


def test_on_normalised_layers_the_published_crosscoders_loss_is_its_codes_mean_over_layers_and_tokens() -> None:
    sae, x_LND = make("crosscoder", sparsity=0.5, published=True), normalised()
    out = sae(Normalised(x_LND))
    x_NLD, found_NLD = (t.view(N, L, D) for t in (out.x_ND, out.reconstruction_ND))
    per_layer = ((found_NLD - x_NLD) ** 2).mean(2) / (x_NLD**2).mean(2)
    expected = per_layer.mean() + 0.5 * out.latents.dense().abs().mean()
    assert sae.loss(out, NONE_DEAD).total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_crosscoder_starts_with_unit_rows_and_its_transpose_and_from_the_layers_medians() -> None:
    recipe = Recipe(sae="crosscoder", layers=(4, 6, 9), width=D, latents=LATENTS, k=K)
    sae, x_LND = build(recipe, torch.Generator().manual_seed(0)), normalised()
    assert isinstance(sae, Crosscoder)
    torch.testing.assert_close(sae.W_enc_FD.norm(dim=1), torch.ones(LATENTS))
    assert torch.equal(sae.W_enc_FD, sae.W_dec_FD)
    sae.initialise(Normalised(x_LND))
    for layer in range(L):
        own = slice(layer * D, (layer + 1) * D)
        torch.testing.assert_close(sae.b_dec_D[own].detach(), geometric_median(x_LND[layer]))
    # f starts as that of x − b_d, lowered alike for all latents until k are active a token
    z_NF = (x_LND.transpose(0, 1).flatten(1) - sae.b_dec_D) @ sae.W_enc_FD.T
    f_NF = sae(Normalised(x_LND)).latents.dense()
    assert K * N <= f_NF.count_nonzero() <= K * N + 1  # the next lies at zero, or above it by rounding
    least = torch.topk(z_NF.flatten(), K * N + 1).values[-1]
    torch.testing.assert_close(f_NF, (z_NF - least).relu(), rtol=1e-4, atol=1e-5)


def test_the_published_crosscoder_has_no_decoder_bias_and_unit_rows_a_layer_after_steps_1_11_and_the_last() -> None:
    sae, free = make("crosscoder", sparsity=0.1, published=True), make("crosscoder", sparsity=0.1)
    assert isinstance(sae, Crosscoder)
    assert isinstance(free, Crosscoder)
    sae.initialise(Normalised(normalised()))
    assert sae.b_dec_D.count_nonzero() == 0
    assert not sae.b_dec_D.requires_grad
    assert free.b_dec_D.requires_grad
    before_FC = free.W_dec_FD.detach().clone()
    done = []
    for step in range(1, 15):
        with torch.no_grad():
            sae.W_dec_FD.mul_(1.5)
        sae.normalise_decoder(step, last=step == 14)
        free.normalise_decoder(step, last=step == 14)
        norms_FL = sae.W_dec_FD.view(LATENTS, L, D).norm(dim=2)
        if torch.allclose(norms_FL, torch.ones(LATENTS, L), atol=1e-5):
            done.append(step)
    assert done == [1, 11, 14]
    assert torch.equal(free.W_dec_FD, before_FC)


def test_training_steers_the_crosscoders_lambda_towards_k_active_latents() -> None:
    sae = make("crosscoder")
    assert isinstance(sae, Crosscoder)
    before = float(sae.steered)
    mean = float((sae(Normalised(normalised())).latents.dense() > 0).sum(1).double().mean())
    assert mean > K  # a half of them are active: λ has to rise
    step = min(1.0, torch.tensor(mean / K).log().item()) / 20
    assert float(sae.steered) == pytest.approx(before * torch.tensor(step).exp().item(), rel=1e-5)
    sae.eval()
    sae(Normalised(normalised()))
    assert float(sae.steered) == pytest.approx(before * torch.tensor(step).exp().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------- mlsae and random


def topk_by_hand(W: dict[str, Tensor], rows: list[Tensor], dead: list[int]) -> tuple[Tensor, list[Tensor]]:
    """NormMSE + 1/32 AuxK over these rows, and f of each."""
    loss, latents = torch.zeros((), dtype=torch.float64), []
    for x_D in rows:
        z_F = W["W_enc_FD"] @ (x_D - W["b_dec_D"]) + W["b_enc_F"]
        order = sorted(range(LATENTS), key=lambda i, z=z_F: -z[i].item())
        kept_F = torch.tensor([i in order[:K] and z_F[i].item() > 0 for i in range(LATENTS)])
        f_F = torch.where(kept_F, z_F, 0)
        error_D = x_D - f_F @ W["W_dec_FD"] - W["b_dec_D"]
        loss = loss + (error_D**2).sum() / (x_D**2).sum() / len(rows)
        latents.append(f_F.detach())
        if dead:
            z_F = W["W_enc_FD"] @ (x_D - W["b_dec_D"].detach()) + W["b_enc_F"]
            best = sorted(dead, key=lambda i, z=z_F: -z[i].item())[: D // 2]
            left_D = error_D.detach() - sum(z_F[i].clamp(min=0) * W["W_dec_FD"][i] for i in best)
            loss = loss + (left_D**2).sum() / (error_D.detach() ** 2).sum() / len(rows) / 32
    return loss, latents


def assert_is_topk_of(sae: SAE, x_LND: Tensor, rows: list[Tensor], dead_d: Tensor) -> None:
    W = leaves(sae)
    expected, latents = topk_by_hand(W, [row.double() for row in rows], dead_d.tolist())
    expected.backward()
    out = sae(Normalised(x_LND))
    objective = sae.loss(out, dead_d)
    objective.total.backward()
    assert torch.equal(out.x_ND, torch.stack(rows))
    f_NF = out.latents.dense().detach().double()
    torch.testing.assert_close(f_NF, torch.stack(latents), rtol=1e-5, atol=1e-5)
    assert objective.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_are(sae, W)


@pytest.mark.usefixtures("float32_path")
@pytest.mark.parametrize("dead_d", [NONE_DEAD, DEAD], ids=["none dead", "some dead"])
def test_mlsae_its_loss_and_gradients_are_topks_over_every_token_of_every_layer(dead_d: Tensor) -> None:
    x_LND = normalised()
    rows = [x_LND[layer, n] for layer in range(L) for n in range(N)]
    assert_is_topk_of(make("mlsae"), x_LND, rows, dead_d)


@pytest.mark.usefixtures("float32_path")
@pytest.mark.parametrize("dead_d", [NONE_DEAD, DEAD], ids=["none dead", "some dead"])
def test_random_its_loss_and_gradients_are_topks_over_every_token_of_one_layer(dead_d: Tensor) -> None:
    x_LND, sae = normalised(), make("random")
    torch.manual_seed(11)
    with torch.no_grad():
        chosen_ND = sae(Normalised(x_LND)).x_ND
    at = [torch.equal(chosen_ND, x_ND) for x_ND in x_LND].index(True)
    torch.manual_seed(11)  # the trainer seeds every step, so a run can be repeated
    assert_is_topk_of(sae, x_LND, list(x_LND[at]), dead_d)


def test_random_visits_every_layer_about_as_often_and_in_use_reads_them_all() -> None:
    x_LND, sae = normalised(), make("random")
    torch.manual_seed(0)
    with torch.no_grad():
        read = [sae(Normalised(x_LND)).x_ND for _ in range(300)]
        seen = [[torch.equal(x_ND, one_ND) for one_ND in x_LND].index(True) for x_ND in read]
        sae.eval()
        used = sae(Normalised(x_LND))
    assert all(70 < seen.count(at) < 130 for at in range(L))  # within four standard deviations of 100
    assert torch.equal(used.x_ND, x_LND.flatten(0, 1))


@pytest.mark.parametrize("name", ["mlsae", "random"])
def test_mlsae_and_random_start_from_the_median_over_all_layers(name: str) -> None:
    recipe = Recipe(sae=name, layers=(4, 6, 9), width=D, latents=LATENTS, k=K)
    sae, x_LND = build(recipe, torch.Generator().manual_seed(0)), normalised()
    sae.initialise(Normalised(x_LND))
    assert isinstance(sae, TopK)
    torch.testing.assert_close(sae.b_dec_D.detach(), geometric_median(x_LND.flatten(0, 1)))


def test_published_mlsae_is_renormalised_after_every_step_and_random_after_every_tenth() -> None:
    done: dict[str, list[int]] = {}
    for name in ("mlsae", "random"):
        recipe = Recipe(sae=name, layers=(4, 6, 9), width=D, latents=LATENTS, k=K, published=True)
        sae = build(recipe, torch.Generator().manual_seed(0))
        for step in range(1, 13):
            with torch.no_grad():
                sae.W_dec_FD.mul_(1.5)
            sae.normalise_decoder(step)
            if torch.allclose(sae.W_dec_FD.norm(dim=1), torch.ones(LATENTS), atol=1e-5):
                done.setdefault(name, []).append(step)
    assert done == {"mlsae": list(range(1, 13)), "random": [1, 11]}


def test_the_published_crosscoder_starts_with_unit_decoder_rows_a_layer_along_linear_encoders() -> None:
    recipe = Recipe(sae="crosscoder", layers=(4, 6, 9), width=D, latents=LATENTS, k=K, published=True, sparsity=0.1)
    sae = build(recipe, torch.Generator().manual_seed(0))
    W_enc_FLD, W_dec_FLD = (W_FC.detach().view(LATENTS, L, D) for W_FC in (sae.W_enc_FD, sae.W_dec_FD))
    torch.testing.assert_close(W_dec_FLD.norm(dim=2), torch.ones(LATENTS, L))
    torch.testing.assert_close(W_dec_FLD * W_enc_FLD.norm(dim=2, keepdim=True), W_enc_FLD)
    assert W_enc_FLD.abs().max() <= D**-0.5
    assert W_enc_FLD.abs().mean() == pytest.approx(D**-0.5 / 2, rel=0.1)
