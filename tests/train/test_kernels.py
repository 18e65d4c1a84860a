"""The kernels: equal to dense autograd, to finite differences and to plain loops, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from routesae.train import kernels
from routesae.train.kernels import (
    DenseLatents,
    Latents,
    Pairs,
    batchtopk_latents,
    decode,
    dense_autoencode,
    group_by_latent,
    jumprelu,
    pairs_of,
    row_products,
    sparse_autoencode,
    step,
    summed_by_latent,
    summed_by_token,
    threshold_latents,
    topk_latents,
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


Autoencode = Callable[..., tuple[Tensor, Latents]]


def topk_autoencode(*args: Any, ragged: bool = False) -> tuple[Tensor, Latents]:
    """The sparse counterpart of dense_autoencode: the same arguments."""
    *tensors, k = args
    x_ND, W_enc_FD, b_enc_F, _, b_dec_D = tensors
    return sparse_autoencode(*tensors, topk_latents(x_ND, W_enc_FD, b_enc_F, b_dec_D, k), ragged=ragged)


def batchtopk_autoencode(*args: Any) -> tuple[Tensor, Latents]:
    *tensors, k = args
    x_ND, W_enc_FD, b_enc_F, _, b_dec_D = tensors
    return sparse_autoencode(*tensors, batchtopk_latents(x_ND, W_enc_FD, b_enc_F, b_dec_D, k), ragged=True)


def batchtopk_densely(
    x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, k: int
) -> tuple[Tensor, Latents]:
    """2412.06410, eq. 3, by one sort of all N·F pre-activations and plain autograd."""
    z_NF = (x_ND - b_dec_D) @ W_enc_FD.T + b_enc_F
    kept = min(k * len(x_ND), z_NF.numel())
    least = z_NF.flatten().sort(descending=True).values[kept - 1]
    f_NF = torch.where((z_NF >= least) & (z_NF > 0), z_NF, 0)
    return f_NF @ W_dec_FD + b_dec_D, Latents(f_NF, torch.arange(len(W_enc_FD)).expand(len(x_ND), -1))


def outputs_and_gradients(given: Problem, k: int, autoencode: Autoencode) -> dict[str, Tensor]:
    """Of a loss that weighs the reconstruction, squares it, and looks at the values too (each by its latent)."""
    leaves = Problem(*(tensor.clone().requires_grad_() for tensor in given))
    reconstruction_ND, latents = autoencode(*leaves, k)
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


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_sparse_equals_dense(given: Problem, k: int) -> dict[str, Tensor]:
    """Ragged or not: leaving inactive pairs out must change nothing."""
    dense = outputs_and_gradients(given, k, dense_autoencode)
    assert_equal(outputs_and_gradients(given, k, partial(topk_autoencode, ragged=True)), dense)
    sparse = outputs_and_gradients(given, k, topk_autoencode)
    assert_equal(sparse, dense)
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
        reconstruction_ND, _ = (dense_autoencode if dense else topk_autoencode)(*leaves, 3)
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


@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_equal_finite_differences(ragged: bool) -> None:
    given = problem(4, 3, 6, bias=-0.5, seed=2)
    k = 3
    z_NF = (given.x_ND - given.b_dec_D) @ given.W_enc_FD.T + given.b_enc_F
    sorted_NF = z_NF.sort(dim=1, descending=True).values
    assert (sorted_NF[:, k - 1] - sorted_NF[:, k]).min() > 1e-3  # far from ties for the differences' step of 1e-6
    assert z_NF.abs().min() > 1e-3
    assert (sorted_NF[:, :k] < 0).any()  # the ReLU cuts somewhere
    leaves = tuple(tensor.clone().requires_grad_() for tensor in given)

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        reconstruction_ND, latents = topk_autoencode(*tensors, k, ragged=ragged)
        by_index_NK = latents.values_NK.gather(1, latents.indices_NK.argsort(dim=1))
        return reconstruction_ND, by_index_NK

    assert torch.autograd.gradcheck(both, leaves, eps=1e-6, atol=1e-7)


def test_the_values_alone_carry_a_gradient_to_the_encoder() -> None:
    given = problem(9, 4, 8)
    leaves = Problem(*(tensor.clone().requires_grad_() for tensor in given))
    _, latents = topk_autoencode(*leaves, 2)
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
        reconstruction_ND, _ = topk_autoencode(x_ND, *weights, 3)
        return torch.autograd.grad(reconstruction_ND.square().sum(), weights)

    with_x, without_x = gradients(given.x_ND.clone().requires_grad_()), gradients(given.x_ND)
    assert all(torch.equal(a, b) for a, b in zip(with_x, without_x, strict=True))


def test_a_gradient_that_is_not_contiguous_is_the_same_gradient() -> None:
    given = problem(6, 4, 8)

    def gradients(transposed: bool) -> tuple[Tensor, ...]:
        leaves = Problem(*(tensor.clone().requires_grad_() for tensor in given))
        reconstruction_ND, _ = topk_autoencode(*leaves, 3)
        g_ND = torch.arange(24, dtype=torch.float64).view(6, 4)
        g_ND = g_ND.T.contiguous().T if transposed else g_ND
        return torch.autograd.grad(reconstruction_ND, leaves, g_ND)

    for straight, transposed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(straight, transposed)


def test_float32_gradients_are_those_of_float64_to_rounding() -> None:
    given = problem(600, 16, 64)
    exact = outputs_and_gradients(given, 4, dense_autoencode)
    leaves = Problem(*(tensor.float().requires_grad_() for tensor in given))
    reconstruction_ND, _ = topk_autoencode(*leaves, 4)
    assert reconstruction_ND.dtype == torch.float32
    torch.testing.assert_close(reconstruction_ND.double(), exact["reconstruction_ND"], rtol=1e-4, atol=1e-4)
    reconstruction_ND.sum().backward()  # type: ignore[no-untyped-call]
    assert [leaf.grad is not None and leaf.grad.dtype for leaf in leaves] == [torch.float32] * 5


def test_two_backward_passes_agree_bit_for_bit() -> None:
    given = problem(700, 16, 32)
    first, second = (outputs_and_gradients(given, 8, topk_autoencode) for _ in range(2))
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


# ---------------------------------------------------------------------------------------------------- pairs


def pairs(n: int, k: int, latents: int, *, ragged: bool) -> tuple[Pairs, list[tuple[int, int, float]]]:
    """Pairs with distinct latents a token, the last of which occurs nowhere; and (token, latent, value) of each."""
    generator = torch.Generator().manual_seed(3)
    indices_NK = torch.stack([torch.randperm(latents - 1, generator=generator)[:k] for _ in range(n)])
    values_NK = torch.randn(n, k, generator=generator, dtype=torch.float64).relu()
    values_NK[n // 2] = 0  # a token without any
    listed = [
        (token, int(indices_NK[token, j]), float(values_NK[token, j]))
        for token in range(n)
        for j in range(k)
        if values_NK[token, j] > 0 or not ragged
    ]
    return pairs_of(Latents(values_NK, indices_NK), ragged=ragged), listed


RAGGED = pytest.mark.parametrize("ragged", [False, True])


@RAGGED
def test_pairs_are_every_token_with_every_latent_it_has_in_order(ragged: bool) -> None:
    found, listed = pairs(30, 4, 13, ragged=ragged)
    triples = zip(found.tokens_M.tolist(), found.latents_M.tolist(), found.values_M.tolist(), strict=True)
    assert list(triples) == listed
    firsts = [sum(token < n for token, _, _ in listed) for n in range(30)]
    assert found.offsets_N.tolist() == firsts
    assert (len(listed) < 120) == ragged
    if ragged:
        assert found.at_M is not None
        assert [int(at) // 4 for at in found.at_M] == [token for token, _, _ in listed]


@RAGGED
def test_group_by_latent_lists_every_pair_under_its_latent_in_order(ragged: bool) -> None:
    given, listed = pairs(30, 4, 13, ragged=ragged)
    grouped = group_by_latent(given, 13)
    ends = [*grouped.offsets_F.tolist()[1:], len(listed)]
    for latent in range(13):
        mine = slice(int(grouped.offsets_F[latent]), ends[latent])
        naive = [at for at, pair in enumerate(listed) if pair[1] == latent]
        assert grouped.order_M[mine].tolist() == naive
        assert grouped.tokens_M[mine].tolist() == [listed[at][0] for at in naive]


@RAGGED
def test_summed_by_latent_is_the_weighted_sum_of_each_latents_tokens(ragged: bool) -> None:
    given, listed = pairs(30, 4, 13, ragged=ragged)
    weights_M = torch.linspace(-1, 2, len(listed), dtype=torch.float64)
    rows_ND = problem(30, 5, 1).x_ND
    naive_FD = torch.zeros(13, 5, dtype=torch.float64)
    for (token, latent, _), weight in zip(listed, weights_M, strict=True):
        naive_FD[latent] += weight * rows_ND[token]
    summed_FD = summed_by_latent(group_by_latent(given, 13), weights_M, rows_ND)
    torch.testing.assert_close(summed_FD, naive_FD)
    assert summed_FD[12].count_nonzero() == 0


@RAGGED
def test_summed_by_token_and_decode_are_the_weighted_sum_of_each_tokens_rows(ragged: bool) -> None:
    pairs_M, listed = pairs(30, 4, 13, ragged=ragged)
    given = problem(30, 5, 13)
    naive_ND = torch.zeros(30, 5, dtype=torch.float64)
    f_NF = torch.zeros(30, 13, dtype=torch.float64)
    for token, latent, value in listed:
        naive_ND[token] += value * given.W_dec_FD[latent]
        f_NF[token, latent] = value
    torch.testing.assert_close(summed_by_token(pairs_M, pairs_M.values_M, given.W_dec_FD), naive_ND)
    sparse = Latents(*f_NF.topk(4, dim=1))
    assert torch.equal(sparse.dense(13), f_NF)
    for latents in (sparse, DenseLatents(f_NF)):
        decoded_ND = decode(latents, given.W_dec_FD, given.b_dec_D)
        torch.testing.assert_close(decoded_ND, naive_ND + given.b_dec_D)


@RAGGED
def test_row_products_are_the_dot_products_of_each_pair(ragged: bool) -> None:
    pairs_M, listed = pairs(30, 4, 13, ragged=ragged)
    given = problem(30, 5, 13)
    naive = [float(given.x_ND[token] @ given.W_dec_FD[latent]) for token, latent, _ in listed]
    products_M = row_products(pairs_M, given.W_dec_FD, given.x_ND)
    torch.testing.assert_close(products_M, torch.tensor(naive, dtype=torch.float64))


def test_active_counts_counts_values_above_zero_by_latent() -> None:
    values_NK = torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, 0.0]])
    latents = Latents(values_NK, torch.tensor([[2, 0], [2, 4], [1, 2]]))
    assert latents.active_counts(6).tolist() == [0, 0, 2, 0, 1, 0]
    assert DenseLatents(latents.dense(6)).active_counts(6).tolist() == [0, 0, 2, 0, 1, 0]


# ------------------------------------------------------------------------------------ batchtopk, thresholds


def skewed(n: int = 20, width: int = 6, latents: int = 40) -> Problem:
    """One token thirty times as long as the others: its latents are the batch's largest."""
    given = problem(n, width, latents, seed=5)
    return given._replace(x_ND=given.x_ND * torch.where(torch.arange(n) == 3, 30.0, 1.0)[:, None])


BATCHES = {
    "random": (problem(30, 6, 40), 3),
    "k=1": (problem(30, 6, 40, seed=1), 1),
    "skewed": (skewed(), 2),
    "one token": (problem(1, 6, 40), 5),
    "all there are": (problem(9, 5, 6, bias=1.0), 6),
    "more than there are candidates": (problem(9, 5, 6), 3),
    "few positives": (problem(30, 6, 40, bias=-6.0), 4),
    "none positive": (problem(10, 6, 12, bias=-100.0), 4),
    "two chunks": (problem(700, 4, 16), 3),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batchtopk_and_its_gradients_are_those_of_a_sort_of_the_whole_batch(name: str) -> None:
    given, k = BATCHES[name]
    expected = outputs_and_gradients(given, k, batchtopk_densely)
    found = outputs_and_gradients(given, k, batchtopk_autoencode)
    assert torch.equal(found["f_NF"] > 0, expected["f_NF"] > 0)
    assert_equal(found, expected)
    positive = int((expected["f_NF"] > 0).sum())
    assert positive == k * len(given.x_ND) if name in ("random", "skewed", "two chunks") else positive >= 0
    assert positive < k * len(given.x_ND) or name not in ("few positives", "none positive")


def test_batchtopk_looks_further_where_a_token_has_all_of_its_candidates_selected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rooms: list[int] = []

    def counted(*args: Any) -> Latents:
        rooms.append(args[-1])
        return topk_latents(*args)

    monkeypatch.setattr(kernels, "topk_latents", counted)
    given, k = BATCHES["skewed"]
    dense = batchtopk_densely(*given, k)[1].values_NK
    assert int((dense > 0).sum(1).max()) > 2 * 3 * k  # more than one doubling's worth
    latents = batchtopk_latents(given.x_ND, given.W_enc_FD, given.b_enc_F, given.b_dec_D, k)
    assert rooms == [6, 12, 24]
    torch.testing.assert_close(latents.dense(40), dense)


def test_ragged_gradients_of_batchtopk_equal_finite_differences() -> None:
    given, k = problem(5, 3, 7, seed=4), 2
    z = ((given.x_ND - given.b_dec_D) @ given.W_enc_FD.T + given.b_enc_F).flatten().sort(descending=True).values
    assert z[9] - z[10] > 1e-3  # far from a tie for the differences' step of 1e-6
    counts_N = (batchtopk_densely(*given, k)[1].values_NK > 0).sum(1)
    assert len(set(counts_N.tolist())) > 1  # ragged

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        reconstruction_ND, latents = batchtopk_autoencode(*tensors, k)
        return reconstruction_ND, latents.dense(7)

    leaves = tuple(tensor.clone().requires_grad_() for tensor in given)
    assert torch.autograd.gradcheck(both, leaves, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [7, 600])
def test_threshold_latents_are_what_is_above_both_its_threshold_and_zero(n: int) -> None:
    given = problem(n, 5, 12)
    threshold_F = torch.linspace(-1.5, 2, 12, dtype=torch.float64)
    found = threshold_latents(given.x_ND, given.W_enc_FD, given.b_enc_F, given.b_dec_D, threshold_F).values_NF
    z_NF = (given.x_ND - given.b_dec_D) @ given.W_enc_FD.T + given.b_enc_F
    for row in range(0, n, 7):
        for latent in range(12):
            z = float(z_NF[row, latent])
            expected = z if z > 0 and z > float(threshold_F[latent]) else 0.0
            assert float(found[row, latent]) == pytest.approx(expected, abs=1e-12)
    cut = (z_NF > 0) & (z_NF < threshold_F)
    assert cut.any()
    assert ((z_NF < 0) & (z_NF > threshold_F)).any()


def test_a_pre_activation_at_its_threshold_is_not_active() -> None:
    at = torch.zeros(1, 2), torch.eye(2), torch.tensor([0.5, 1.0]), torch.zeros(2)
    assert threshold_latents(*at, torch.tensor([0.5, 0.5])).values_NF.tolist() == [[0.0, 1.0]]
    assert jumprelu(at[2][None], torch.tensor([0.5, 0.5]), 0.1).tolist() == [[0.0, 1.0]]


# ------------------------------------------------------------------------------------------------- jumprelu


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


# ------------------------------------------------------------------------------------------------- autocast


def test_topk_latents_under_bfloat16_autocast_are_nearly_those_of_float32() -> None:
    given = Problem(*(tensor.float() for tensor in problem(600, 16, 64)))
    arguments = (given.x_ND, given.W_enc_FD, given.b_enc_F, given.b_dec_D)
    full = topk_latents(*arguments, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = topk_latents(*arguments, 5)
    assert rounded.values_NK.dtype == torch.float32
    one, other = (latents.values_NK.sort(dim=1).values for latents in (full, rounded))
    assert not torch.equal(one, other)  # it was indeed rounded
    torch.testing.assert_close(one, other, rtol=0.02, atol=0.1)
    z_NF = (given.x_ND - given.b_dec_D) @ given.W_enc_FD.T + given.b_enc_F
    torch.testing.assert_close(rounded.values_NK, z_NF.gather(1, rounded.indices_NK), rtol=0.02, atol=0.1)


def test_autocast_centres_before_it_rounds() -> None:
    # Far from the origin, x rounded to 8 bits would lose what x − b_dec holds.
    given = Problem(*(tensor.float() for tensor in problem(50, 16, 64)))
    far = (given.x_ND + 1000, given.W_enc_FD, given.b_enc_F, given.b_dec_D + 1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = topk_latents(*far, 5)
    near = topk_latents(given.x_ND, given.W_enc_FD, given.b_enc_F, given.b_dec_D, 5)
    torch.testing.assert_close(
        found.values_NK.sort(dim=1).values, near.values_NK.sort(dim=1).values, rtol=0.02, atol=0.1
    )
