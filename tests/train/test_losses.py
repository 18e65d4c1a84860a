"""NormMSE and AuxK against their equations written out token by token; and how NormMSE reaches the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from routesae.tests.hidden import Normalised
from routesae.train.folder.checkpoint import METRICS_FILE
from routesae.train.log import StepLog
from routesae.train.losses import AUXK_WEIGHT, Objective, auxk, norm_mse, squared_error_shares
from routesae.train.saes import Recipe, build
from routesae.train.sparse.search import Encoder

N, D, LATENTS = 9, 8, 20


class Problem(NamedTuple):
    """What auxk is made of beside dead_d."""

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


def auxk_of(given: Problem, dead_d: Tensor, weights_N: Tensor | None = None) -> Tensor:
    encoder = Encoder(given.W_enc_FD, given.b_enc_F, given.b_dec_D)
    return auxk(given.x_ND, given.reconstruction_ND, encoder, given.W_dec_FD, dead_d, weights_N)


def dead(count: int) -> Tensor:
    return torch.randperm(LATENTS, generator=torch.Generator().manual_seed(1))[:count]


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


def uneven() -> Tensor:
    weights_N = torch.linspace(0, 1, N, dtype=torch.float64).square()
    return weights_N / weights_N.sum()


def test_norm_mse_weighs_tokens_as_it_is_told_and_alike_where_it_is_not() -> None:
    given, weights_N = problem(), uneven()
    shares_N = squared_error_shares(given.x_ND, given.reconstruction_ND)
    weighted = float(norm_mse(given.x_ND, given.reconstruction_ND, weights_N))
    assert weighted == pytest.approx(
        sum(float(w) * float(share) for w, share in zip(weights_N, shares_N, strict=True))
    )
    assert weighted != pytest.approx(float(shares_N.mean()))
    even_N = torch.full((N,), 1 / N, dtype=torch.float64)
    assert torch.equal(norm_mse(*given[:2]), norm_mse(*given[:2], even_N))


def test_the_gradients_of_norm_mse_equal_finite_differences_and_autograds() -> None:
    given = (*problem()[:2], uneven())
    leaves = tuple(tensor.clone().requires_grad_() for tensor in given)
    assert torch.autograd.gradcheck(norm_mse, leaves, eps=1e-6, atol=1e-8)

    def plain(x_ND: Tensor, reconstruction_ND: Tensor, weights_N: Tensor) -> Tensor:
        return (weights_N * squared_error_shares(x_ND, reconstruction_ND)).sum()

    # The upstream gradient is not 1, and any of the three may be held fixed.
    for fixed in range(4):
        leaves = tuple(tensor.clone().requires_grad_(at != fixed) for at, tensor in enumerate(given))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(norm_mse(*leaves).exp() * 3, wanted)
        for one, other in zip(found, torch.autograd.grad(plain(*leaves).exp() * 3, wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_norm_mse_under_autocast_is_float32s() -> None:
    x_ND, reconstruction_ND = (tensor.float() for tensor in problem()[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = norm_mse(x_ND, reconstruction_ND)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, norm_mse(x_ND, reconstruction_ND))


def test_a_line_of_the_log_has_the_objectives_own_numbers_weighted_by_tokens(tmp_path: Path) -> None:
    recipe = Recipe(sae="topk", layers=(4,), width=D, latents=LATENTS, k=2)
    sae = build(recipe, torch.Generator().manual_seed(0))
    log = StepLog(sae, tmp_path, [], 1e-3)
    steps = [(5.0, 0.5, 30), (2.0, 0.25, 10)]
    with torch.no_grad():
        for total, error, tokens in steps:
            out = sae(Normalised(torch.randn(1, tokens, D, generator=torch.Generator().manual_seed(tokens))))
            objective = Objective(torch.tensor(total), torch.tensor(error))
            log.add(out, objective, out.latents.active_counts, tokens, 1e-3, 1)
    log.write(2, 0)
    log.close()
    (line,) = map(json.loads, (tmp_path / METRICS_FILE).read_text().splitlines())
    assert line["norm_mse"] == pytest.approx((0.5 * 30 + 0.25 * 10) / 40)
    assert line["loss"] == pytest.approx((5 * 30 + 2 * 10) / 40)


def auxk_by_hand(given: Problem, dead_d: Tensor) -> float:
    """2406.04093, A.2, a token at a time: e = x − x̂, ê = Σ over the top min(D/2, dead) dead latents."""
    candidates = [latent for latent in range(LATENTS) if latent in dead_d]
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
    given, dead_d = problem(), dead(count)
    assert float(auxk_of(given, dead_d)) == pytest.approx(auxk_by_hand(given, dead_d))


def test_auxk_weighs_tokens_as_norm_mse_does() -> None:
    given, dead_d = problem(), dead(7)
    first_N = torch.zeros(N, dtype=torch.float64)
    first_N[0] = 1
    alone = given._replace(x_ND=given.x_ND[:1], reconstruction_ND=given.reconstruction_ND[:1])
    weighted, by_itself = float(auxk_of(given, dead_d, first_N)), float(auxk_of(alone, dead_d))
    assert weighted == pytest.approx(by_itself)
    assert weighted != pytest.approx(float(auxk_of(given, dead_d)))


def test_auxk_is_zero_where_no_latent_is_dead() -> None:
    assert float(auxk_of(problem(), dead(0))) == 0


def test_auxk_weighs_1_32nd() -> None:
    assert AUXK_WEIGHT == 1 / 32


@pytest.mark.parametrize("count", [3, 13])
def test_auxk_sends_a_gradient_to_dead_latents_only(count: int) -> None:
    dead_d = dead(count)
    given = Problem(*(tensor.requires_grad_() for tensor in problem()))
    auxk_of(given, dead_d).backward()  # type: ignore[no-untyped-call]
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD"):
        grad = getattr(given, name).grad
        reached_F = grad.reshape(LATENTS, -1).abs().sum(1) > 0
        assert set(reached_F.nonzero().flatten().tolist()) <= set(dead_d.tolist()), name
        assert reached_F[dead_d].any(), name
    for name in ("x_ND", "reconstruction_ND", "b_dec_D"):  # e is a fixed target, and the bias is not to chase it
        assert getattr(given, name).grad is None, name


def test_the_gradient_of_auxk_equals_finite_differences() -> None:
    given, dead_d = problem(), dead(7)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in (given.W_enc_FD, given.b_enc_F, given.W_dec_FD))

    def loss(W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor) -> Tensor:
        return auxk_of(given._replace(W_enc_FD=W_enc_FD, b_enc_F=b_enc_F, W_dec_FD=W_dec_FD), dead_d)

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-6)
