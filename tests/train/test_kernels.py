"""The sparse kernels: equal to dense autograd, to finite differences and to plain loops, in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from routesae.train.kernels import (
    Latents,
    decode,
    dense_autoencode,
    group_by_latent,
    row_products,
    sparse_autoencode,
    summed_by_latent,
    topk_latents,
    weighted_rows,
)

NAMES = ("x_ND", "W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")


class Problem(NamedTuple):
    """The five tensors that sparse_autoencode is differentiable in."""

    x_ND: Tensor
    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor


def problem(n: int, width: int, latents: int, *, bias: float = 0.0, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    b_enc_F = bias + 0.3 * normal(latents)
    return Problem(normal(n, width), normal(latents, width), b_enc_F, normal(latents, width), normal(width))


def outputs_and_gradients(given: Problem, k: int, *, dense: bool) -> dict[str, Tensor]:
    """Of a loss that weighs the reconstruction, squares it, and looks at the values too (each by its latent)."""
    leaves = Problem(*(tensor.clone().requires_grad_() for tensor in given))
    reconstruction_ND, latents = (dense_autoencode if dense else sparse_autoencode)(*leaves, k)
    weights_F = torch.linspace(-1, 2, len(leaves.W_enc_FD), dtype=torch.float64)
    loss = (reconstruction_ND * torch.linspace(0, 1, reconstruction_ND.numel()).view_as(reconstruction_ND)).sum()
    loss = loss + reconstruction_ND.square().sum() + (latents.values_NK * weights_F[latents.indices_NK]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    f_NF = torch.zeros(len(leaves.x_ND), len(leaves.W_enc_FD), dtype=torch.float64)
    f_NF.scatter_(1, latents.indices_NK, latents.values_NK.detach())
    found = {"reconstruction_ND": reconstruction_ND.detach(), "f_NF": f_NF}
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert leaf.grad is not None
        found[name] = leaf.grad
    return found


def assert_sparse_equals_dense(given: Problem, k: int) -> dict[str, Tensor]:
    sparse = outputs_and_gradients(given, k, dense=False)
    dense = outputs_and_gradients(given, k, dense=True)
    for name, expected in dense.items():
        torch.testing.assert_close(
            sparse[name], expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
    return sparse


@pytest.mark.parametrize(
    ("n", "width", "latents", "k"),
    [(7, 5, 11, 3), (1, 4, 6, 2), (16, 8, 9, 1), (5, 3, 6, 6), (3, 6, 1, 1), (512, 4, 16, 4), (1100, 6, 40, 5)],
    ids=["small", "one token", "k=1", "k=F", "one latent", "one chunk", "2.1 chunks"],
)
def test_sparse_equals_dense_in_outputs_and_all_gradients(n: int, width: int, latents: int, k: int) -> None:
    assert_sparse_equals_dense(problem(n, width, latents), k)


def test_sparse_equals_dense_where_the_relu_cuts_some_of_the_top_k() -> None:
    given = problem(40, 6, 12, bias=-3.0)
    active_N = (assert_sparse_equals_dense(given, 6)["f_NF"] > 0).sum(1)
    assert 0 < active_N.double().mean() < 3  # it does cut
    assert active_N.min() == 0  # and some tokens have no active latent at all


def test_sparse_equals_dense_where_no_latent_is_active() -> None:
    found = assert_sparse_equals_dense(problem(10, 6, 12, bias=-100.0), 4)
    assert found["f_NF"].count_nonzero() == 0
    assert found["W_enc_FD"].count_nonzero() == 0


def test_sparse_equals_dense_on_repeated_tokens() -> None:
    given = problem(6, 5, 9)
    assert_sparse_equals_dense(given._replace(x_ND=given.x_ND.repeat(4, 1)), 3)


def test_tied_latents_reconstruct_as_any_choice_of_them_would() -> None:
    # Rows 0..3 and 4..7 of the dictionary are the same, so which of a pair is among the top k is open; the
    # reconstruction and the gradient of the pair together are not.
    given = problem(20, 5, 4)
    doubled = Problem(
        given.x_ND, given.W_enc_FD.repeat(2, 1), given.b_enc_F.repeat(2), given.W_dec_FD.repeat(2, 1), given.b_dec_D
    )

    def gradients(dense: bool) -> list[Tensor]:
        leaves = Problem(*(tensor.clone().requires_grad_() for tensor in doubled))
        reconstruction_ND, _ = (dense_autoencode if dense else sparse_autoencode)(*leaves, 3)
        loss = reconstruction_ND.square().sum()
        x, W_enc, b_enc, W_dec, b_dec = torch.autograd.grad(loss, leaves)
        pairs = [whole.unflatten(0, (2, 4)).sum(0) for whole in (W_enc, b_enc, W_dec)]
        return [reconstruction_ND.detach(), x, *pairs, b_dec]

    for sparse, dense in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)


def test_latents_that_are_never_active_get_no_gradient() -> None:
    given = problem(50, 6, 10)
    given.b_enc_F[[2, 9]] = -1000.0
    found = assert_sparse_equals_dense(given, 4)
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD"):
        nonzero_F = found[name].reshape(10, -1).abs().sum(1) > 0
        assert nonzero_F.tolist() == [at not in (2, 9) for at in range(10)]


def test_gradients_equal_finite_differences() -> None:
    given = problem(4, 3, 6, bias=-0.5, seed=2)
    k = 3
    z_NF = (given.x_ND - given.b_dec_D) @ given.W_enc_FD.T + given.b_enc_F
    sorted_NF = z_NF.sort(dim=1, descending=True).values
    assert (sorted_NF[:, k - 1] - sorted_NF[:, k]).min() > 1e-3  # far from ties for the differences' step of 1e-6
    assert z_NF.abs().min() > 1e-3
    assert (sorted_NF[:, :k] < 0).any()  # the ReLU cuts somewhere
    leaves = tuple(tensor.clone().requires_grad_() for tensor in given)

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        reconstruction_ND, latents = sparse_autoencode(*tensors, k)
        by_index_NK = latents.values_NK.gather(1, latents.indices_NK.argsort(dim=1))
        return reconstruction_ND, by_index_NK

    assert torch.autograd.gradcheck(both, leaves, eps=1e-6, atol=1e-7)


def test_the_values_alone_carry_a_gradient_to_the_encoder() -> None:
    given = problem(9, 4, 8)
    leaves = Problem(*(tensor.clone().requires_grad_() for tensor in given))
    _, latents = sparse_autoencode(*leaves, 2)
    latents.values_NK.sum().backward()  # type: ignore[no-untyped-call]
    W_enc_FD, x_ND = torch.zeros(8, 4, dtype=torch.float64), torch.zeros(9, 4, dtype=torch.float64)
    for n in range(9):
        z_F = given.W_enc_FD @ (given.x_ND[n] - given.b_dec_D) + given.b_enc_F
        for latent in z_F.topk(2).indices.tolist():
            if z_F[latent] > 0:
                W_enc_FD[latent] += given.x_ND[n] - given.b_dec_D
                x_ND[n] += given.W_enc_FD[latent]
    assert leaves.W_enc_FD.grad is not None
    assert leaves.x_ND.grad is not None
    torch.testing.assert_close(leaves.W_enc_FD.grad, W_enc_FD)
    torch.testing.assert_close(leaves.x_ND.grad, x_ND)
    assert leaves.W_dec_FD.grad is not None
    assert leaves.W_dec_FD.grad.count_nonzero() == 0


def test_the_weights_gradients_do_not_depend_on_whether_the_input_wants_one() -> None:
    given = problem(9, 4, 8)

    def gradients(x_ND: Tensor) -> tuple[Tensor, ...]:
        weights = tuple(tensor.clone().requires_grad_() for tensor in given[1:])
        reconstruction_ND, _ = sparse_autoencode(x_ND, *weights, 3)
        return torch.autograd.grad(reconstruction_ND.square().sum(), weights)

    with_x, without_x = gradients(given.x_ND.clone().requires_grad_()), gradients(given.x_ND)
    assert all(torch.equal(a, b) for a, b in zip(with_x, without_x, strict=True))


def test_a_gradient_that_is_not_contiguous_is_the_same_gradient() -> None:
    given = problem(6, 4, 8)

    def gradients(transposed: bool) -> tuple[Tensor, ...]:
        leaves = Problem(*(tensor.clone().requires_grad_() for tensor in given))
        reconstruction_ND, _ = sparse_autoencode(*leaves, 3)
        g_ND = torch.arange(24, dtype=torch.float64).view(6, 4)
        g_ND = g_ND.T.contiguous().T if transposed else g_ND
        return torch.autograd.grad(reconstruction_ND, leaves, g_ND)

    for straight, transposed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(straight, transposed)


def test_float32_gradients_are_those_of_float64_to_rounding() -> None:
    given = problem(600, 16, 64)
    exact = outputs_and_gradients(given, 4, dense=True)
    leaves = Problem(*(tensor.float().requires_grad_() for tensor in given))
    reconstruction_ND, _ = sparse_autoencode(*leaves, 4)
    assert reconstruction_ND.dtype == torch.float32
    torch.testing.assert_close(reconstruction_ND.double(), exact["reconstruction_ND"], rtol=1e-4, atol=1e-4)
    reconstruction_ND.sum().backward()  # type: ignore[no-untyped-call]
    assert [leaf.grad is not None and leaf.grad.dtype for leaf in leaves] == [torch.float32] * 5


def test_two_backward_passes_agree_bit_for_bit() -> None:
    given = problem(700, 16, 32)
    first, second = (outputs_and_gradients(given, 8, dense=False) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("n", "k"), [(5, 3), (513, 1), (1025, 12)])
def test_topk_latents_are_the_largest_pre_activations_cut_at_zero(n: int, k: int) -> None:
    given = problem(n, 5, 12, bias=-2.0)
    latents = topk_latents(given.x_ND, given.W_enc_FD, given.b_enc_F, given.b_dec_D, k)
    assert latents.indices_NK.dtype == torch.int64
    for row in range(n):
        z = [
            float((given.x_ND[row] - given.b_dec_D) @ given.W_enc_FD[latent] + given.b_enc_F[latent])
            for latent in range(12)
        ]
        best = sorted(range(12), key=lambda latent, z=z: -z[latent])[:k]  # type: ignore[misc]
        found = dict(zip(latents.indices_NK[row].tolist(), latents.values_NK[row].tolist(), strict=True))
        assert found == pytest.approx({latent: max(0.0, z[latent]) for latent in best})


def pairs(n: int, k: int, latents: int) -> tuple[Tensor, Tensor]:
    """Indices with distinct latents a token, the last of which occurs nowhere; and weights."""
    generator = torch.Generator().manual_seed(3)
    indices_NK = torch.stack([torch.randperm(latents - 1, generator=generator)[:k] for _ in range(n)])
    return indices_NK, torch.randn(n, k, generator=generator, dtype=torch.float64)


def test_group_by_latent_lists_every_pair_under_its_latent_in_order() -> None:
    indices_NK, _ = pairs(30, 4, 13)
    grouped = group_by_latent(indices_NK, 13)
    ends = [*grouped.offsets_F.tolist()[1:], 120]
    for latent in range(13):
        mine = slice(int(grouped.offsets_F[latent]), ends[latent])
        naive = [n * 4 + j for n in range(30) for j in range(4) if indices_NK[n, j] == latent]
        assert grouped.pairs_M[mine].tolist() == naive
        assert grouped.tokens_M[mine].tolist() == [pair // 4 for pair in naive]


def test_summed_by_latent_is_the_weighted_sum_of_each_latents_tokens() -> None:
    indices_NK, weights_NK = pairs(30, 4, 13)
    rows_ND = problem(30, 5, 1).x_ND
    naive_FD = torch.zeros(13, 5, dtype=torch.float64)
    for n in range(30):
        for j in range(4):
            naive_FD[indices_NK[n, j]] += weights_NK[n, j] * rows_ND[n]
    summed_FD = summed_by_latent(group_by_latent(indices_NK, 13), weights_NK, rows_ND)
    torch.testing.assert_close(summed_FD, naive_FD)
    assert summed_FD[12].count_nonzero() == 0


def test_weighted_rows_and_decode_are_the_weighted_sum_of_each_tokens_rows() -> None:
    indices_NK, weights_NK = pairs(30, 4, 13)
    given = problem(30, 5, 13)
    naive_ND = torch.zeros(30, 5, dtype=torch.float64)
    for n in range(30):
        for j in range(4):
            naive_ND[n] += weights_NK[n, j] * given.W_dec_FD[indices_NK[n, j]]
    torch.testing.assert_close(weighted_rows(indices_NK, weights_NK, given.W_dec_FD), naive_ND)
    decoded_ND = decode(Latents(weights_NK, indices_NK), given.W_dec_FD, given.b_dec_D)
    torch.testing.assert_close(decoded_ND, naive_ND + given.b_dec_D)


def test_row_products_are_the_dot_products_of_each_pair() -> None:
    indices_NK, _ = pairs(30, 4, 13)
    given = problem(30, 5, 13)
    naive_NK = [[float(given.x_ND[n] @ given.W_dec_FD[indices_NK[n, j]]) for j in range(4)] for n in range(30)]
    products_NK = row_products(indices_NK, given.W_dec_FD, given.x_ND)
    torch.testing.assert_close(products_NK, torch.tensor(naive_NK, dtype=torch.float64))
