"""The jump and the step of JumpReLU: their values and the estimates of 2407.14435 (eq. 11, 12), number by number."""

from __future__ import annotations

import pytest
import torch

from routesae.train.saes.jumprelu import jumprelu, step


def rectangle_kernel(u: float) -> float:
    """2407.14435, K of section 4: H(u + 1/2) − H(u − 1/2)."""
    return float(u > -0.5) - float(u > 0.5)


@pytest.mark.parametrize("bandwidth", [0.2, 1.0])
def test_jumprelu_and_step_have_the_values_and_estimates_of_2407_14435(bandwidth: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z_NF = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    threshold_F = torch.rand(6, generator=generator, dtype=torch.float64)
    g_NF = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    found = {}
    for function in (jumprelu, step):
        z, threshold = z_NF.clone().requires_grad_(), threshold_F.clone().requires_grad_()
        values_NF = function(z, threshold, bandwidth)
        gradients = torch.autograd.grad(values_NF, (z, threshold), g_NF, allow_unused=True, materialize_grads=True)
        found[function.__name__] = (values_NF.detach(), *gradients)
    jump, dz, dtheta_jump = (torch.zeros_like(t) for t in (z_NF, z_NF, threshold_F))
    heaviside, dtheta_step = torch.zeros_like(z_NF), torch.zeros_like(threshold_F)
    for n in range(50):
        for f in range(6):
            z, theta, g = float(z_NF[n, f]), float(threshold_F[f]), float(g_NF[n, f])
            near = rectangle_kernel((z - theta) / bandwidth)
            heaviside[n, f] = float(z > theta)
            jump[n, f] = z * heaviside[n, f]
            dz[n, f] = g * heaviside[n, f]
            dtheta_jump[f] += -theta / bandwidth * near * g  # eq. 11
            dtheta_step[f] += -1 / bandwidth * near * g  # eq. 12
    assert dtheta_step.count_nonzero() >= 5
    for name, expected in {
        "jumprelu": (jump, dz, dtheta_jump),
        "step": (heaviside, torch.zeros_like(z_NF), dtheta_step),
    }.items():
        for one, other in zip(found[name], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_estimate_of_the_thresholds_gradient_is_the_slope_of_the_expected_loss() -> None:
    # With z spread evenly, E[1[z > θ]] is linear in θ with slope −density, and E[z·1[z > θ]] has slope −θ·density.
    z_NF = torch.linspace(0, 4, 400_001, dtype=torch.float64)[:, None]
    for function, slope in ((step, -0.25), (jumprelu, -0.25 * 1.5)):
        threshold_F = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(function(z_NF, threshold_F, 0.5).mean(), threshold_F)
        assert float(found) == pytest.approx(slope, rel=1e-3)


def test_thresholds_given_pair_by_pair_have_the_gradients_of_thresholds_given_by_latent() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens_M, latents_M = torch.nonzero(torch.rand(30, 13, generator=generator) < 0.3, as_tuple=True)
    values_M = torch.randn(len(tokens_M), generator=generator, dtype=torch.float64)
    by_latent_F = torch.linspace(-0.5, 1, 13, dtype=torch.float64)
    for function in (jumprelu, step):
        whole_F, of_pairs_F = by_latent_F.clone().requires_grad_(), by_latent_F.clone().requires_grad_()
        z_NF = torch.full((30, 13), -99.0, dtype=torch.float64)
        z_NF[tokens_M, latents_M] = values_M
        dense_NF, sparse_M = function(z_NF, whole_F, 0.8), function(values_M, of_pairs_F[latents_M], 0.8)
        assert torch.equal(dense_NF[tokens_M, latents_M], sparse_M)
        weights_NF = torch.linspace(-1, 1, 390, dtype=torch.float64).view(30, 13)
        (expected_F,) = torch.autograd.grad((dense_NF * weights_NF).sum(), whole_F)
        weighed = (sparse_M * weights_NF[tokens_M, latents_M]).sum()
        torch.testing.assert_close(torch.autograd.grad(weighed, of_pairs_F)[0], expected_F)
        assert expected_F.count_nonzero() > 5
