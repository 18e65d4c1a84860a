"""NormMSE and AuxK against their equations written out token by token."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from routesae.train.losses import AUXK_WEIGHT, auxk, norm_mse, squared_error_shares

N, D, LATENTS = 9, 8, 20


class Problem(NamedTuple):
    """What auxk takes before dead_F."""

    x_ND: Tensor
    reconstruction_ND: Tensor
    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor


def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, D), (N, D), (LATENTS, D), (LATENTS,), (LATENTS, D), (D,)]
    return Problem(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def dead(count: int) -> Tensor:
    dead_F = torch.zeros(LATENTS, dtype=torch.bool)
    dead_F[torch.randperm(LATENTS, generator=torch.Generator().manual_seed(1))[:count]] = True
    return dead_F


def test_norm_mse_is_the_mean_over_tokens_of_the_relative_squared_error() -> None:
    given = problem()
    shares = []
    for n in range(N):
        error = sum((float(given.x_ND[n, d]) - float(given.reconstruction_ND[n, d])) ** 2 for d in range(D))
        shares.append(error / sum(float(given.x_ND[n, d]) ** 2 for d in range(D)))
    assert squared_error_shares(given.x_ND, given.reconstruction_ND).tolist() == pytest.approx(shares)
    assert float(norm_mse(given.x_ND, given.reconstruction_ND)) == pytest.approx(sum(shares) / N)


def test_norm_mse_is_0_for_a_perfect_reconstruction_and_1_for_none() -> None:
    x_ND = problem().x_ND
    assert float(norm_mse(x_ND, x_ND)) == 0
    assert float(norm_mse(x_ND, torch.zeros_like(x_ND))) == pytest.approx(1)


def test_norm_mse_of_a_zero_token_is_finite_and_so_is_its_gradient() -> None:
    x_ND = torch.zeros(2, D)
    reconstruction_ND = torch.zeros(2, D, requires_grad=True)
    loss = norm_mse(x_ND, reconstruction_ND)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert reconstruction_ND.grad is not None
    assert reconstruction_ND.grad.isfinite().all()


def auxk_by_hand(given: Problem, dead_F: Tensor) -> float:
    """2406.04093, A.2, a token at a time: e = x − x̂, ê = Σ over the top min(D/2, dead) dead latents."""
    candidates = [latent for latent in range(LATENTS) if dead_F[latent]]
    k = min(D // 2, len(candidates))
    shares = []
    for n in range(N):
        residual_D = given.x_ND[n] - given.reconstruction_ND[n]
        z = {
            latent: float(given.W_enc_FD[latent] @ (given.x_ND[n] - given.b_dec_D) + given.b_enc_F[latent])
            for latent in candidates
        }
        modelled_D = torch.zeros(D, dtype=torch.float64)
        for latent in sorted(z, key=lambda latent, z=z: -z[latent])[:k]:  # type: ignore[misc]
            modelled_D += max(0.0, z[latent]) * given.W_dec_FD[latent]
        shares.append(float((residual_D - modelled_D) @ (residual_D - modelled_D) / (residual_D @ residual_D)))
    return sum(shares) / N


@pytest.mark.parametrize("count", [1, 3, D // 2, D // 2 + 1, 13, LATENTS])
def test_auxk_is_the_equation_with_fewer_and_with_more_dead_latents_than_half_the_width(count: int) -> None:
    given, dead_F = problem(), dead(count)
    assert float(auxk(*given, dead_F)) == pytest.approx(auxk_by_hand(given, dead_F))


def test_auxk_is_zero_where_no_latent_is_dead() -> None:
    assert float(auxk(*problem(), dead(0))) == 0


def test_auxk_weighs_1_32nd() -> None:
    assert AUXK_WEIGHT == 1 / 32


@pytest.mark.parametrize("count", [3, 13])
def test_auxk_sends_a_gradient_to_dead_latents_only(count: int) -> None:
    dead_F = dead(count)
    given = Problem(*(tensor.requires_grad_() for tensor in problem()))
    auxk(*given, dead_F).backward()  # type: ignore[no-untyped-call]
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD"):
        grad = getattr(given, name).grad
        reached_F = grad.reshape(LATENTS, -1).abs().sum(1) > 0
        assert not reached_F[~dead_F].any(), name
        assert reached_F[dead_F].any(), name
    for name in ("x_ND", "reconstruction_ND", "b_dec_D"):  # e is a fixed target, and the bias is not to chase it
        assert getattr(given, name).grad is None, name


def test_the_gradient_of_auxk_equals_finite_differences() -> None:
    given, dead_F = problem(), dead(7)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in (given.W_enc_FD, given.b_enc_F, given.W_dec_FD))

    def loss(W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor) -> Tensor:
        return auxk(given.x_ND, given.reconstruction_ND, W_enc_FD, b_enc_F, W_dec_FD, given.b_dec_D, dead_F)

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-6)
