"""Pairs of a token and a latent, and the three kinds of latents, against loops over the pairs, in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from routesae.train.sparse.kernels import encode_pairs
from routesae.train.sparse.pairs import AllPairs, Latents, Pairs
from routesae.train.sparse.search import Encoder


class Rows(NamedTuple):
    """What pairs point at: a row a token, and a latent's rows and numbers."""

    x_ND: Tensor
    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor
    v_F: Tensor


def rows(n: int = 30, width: int = 5, latents: int = 13) -> Rows:
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, width), (latents, width), (latents,), (latents, width), (width,), (latents,)]
    return Rows(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


Listed = list[tuple[int, int, float]]


def listed_pairs(n: int = 30, latents: int = 13) -> tuple[Pairs, Tensor, Listed]:
    """Pairs, numbers of theirs, and (token, latent, number) of each: some tokens have none, the last latent none."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 5, (n,), generator=generator)
    counts[[0, n // 2, n - 1]] = 0
    listed = [
        (token, latent, float(torch.randn((), generator=generator)))
        for token in range(n)
        for latent in torch.randperm(latents - 1, generator=generator)[: counts[token]].tolist()
    ]
    tokens_M, latents_M = (torch.tensor([pair[at] for pair in listed]) for at in (0, 1))
    values_M = torch.tensor([value for _, _, value in listed], dtype=torch.float64)
    return Pairs(n, latents, tokens_M, latents_M), values_M, listed


def test_offsets_are_where_each_tokens_pairs_begin() -> None:
    pairs, _, listed = listed_pairs()
    assert pairs.offsets_N.tolist() == [sum(token < n for token, _, _ in listed) for n in range(30)]


def test_pairs_of_k_latents_a_token_list_each_token_with_its_own() -> None:
    indices_NK = torch.tensor([[2, 0], [1, 3], [3, 2]])
    pairs = Pairs.of(indices_NK, 5)
    assert pairs.tokens_M.tolist() == [0, 0, 1, 1, 2, 2]
    assert pairs.latents_M.tolist() == [2, 0, 1, 3, 3, 2]
    assert pairs.offsets_N.tolist() == [0, 2, 4]
    assert (pairs.tokens, pairs.latents) == (3, 5)


def test_sums_over_pairs_are_those_of_a_loop() -> None:
    pairs, values_M, listed = listed_pairs()
    given = rows()
    of_tokens_ND, of_latents_FD = torch.zeros(30, 5, dtype=torch.float64), torch.zeros(13, 5, dtype=torch.float64)
    sums_N = torch.zeros(30, dtype=torch.float64)
    for token, latent, value in listed:
        of_tokens_ND[token] += value * given.W_dec_FD[latent]
        of_latents_FD[latent] += value * given.x_ND[token]
        sums_N[token] += value
    torch.testing.assert_close(pairs.rows_by_token(values_M, given.W_dec_FD), of_tokens_ND)
    torch.testing.assert_close(pairs.rows_by_latent(values_M, given.x_ND), of_latents_FD)
    torch.testing.assert_close(pairs.by_token(values_M), sums_N)
    torch.testing.assert_close(pairs.by_token(values_M, torch.full((13,), 3.0)), 3 * sums_N)
    torch.testing.assert_close(pairs.decode(values_M, given.W_dec_FD, given.b_dec_D), of_tokens_ND + given.b_dec_D)
    assert pairs.at(given.v_F).tolist() == [float(given.v_F[latent]) for _, latent, _ in listed]
    assert of_latents_FD[12].count_nonzero() == 0  # no pair has it


@pytest.mark.parametrize("kind", [Pairs, AllPairs])
def test_parts_decode_the_latents_between_their_ends_each_alone(kind: type) -> None:
    given_pairs, values_M, listed = listed_pairs()
    given, ends = rows(), (3, 4, 8)
    pairs = given_pairs if kind is Pairs else AllPairs()
    values_P = values_M if kind is Pairs else given_pairs.dense(values_M)
    W_dec_FD = given.W_dec_FD.clone().requires_grad_()
    parts = pairs.decode_parts(values_P, W_dec_FD, ends)
    assert len(parts) == 3
    torch.stack([(at + 1) * part_ND.sum() for at, part_ND in enumerate(parts)]).sum().backward()
    expected_FD = torch.zeros_like(given.W_dec_FD)
    for at, (first, end) in enumerate(pairwise((0, *ends))):
        expected_ND = torch.zeros(30, 5, dtype=torch.float64)
        for token, latent, value in listed:
            if first <= latent < end:
                expected_ND[token] += value * given.W_dec_FD[latent]
                expected_FD[latent] += value * (at + 1)
        torch.testing.assert_close(parts[at].detach(), expected_ND)
    torch.testing.assert_close(W_dec_FD.grad, expected_FD)
    assert len(pairs.decode_parts(values_P, W_dec_FD, ())) == 0


def test_no_pairs_at_all_decode_to_the_bias_and_send_gradients_of_zero() -> None:
    given = rows(4, 3, 7)
    none_M = torch.zeros(0, dtype=torch.int64)
    pairs = Pairs(4, 7, none_M, none_M)
    leaves = Rows(*(tensor.clone().requires_grad_() for tensor in given))
    encoder = Encoder(leaves.W_enc_FD, leaves.b_enc_F, leaves.b_dec_D)
    z_M = encode_pairs(leaves.x_ND, encoder, pairs, given.x_ND.new_zeros(0))
    reconstruction_ND = pairs.decode(z_M * pairs.at(leaves.v_F), leaves.W_dec_FD, torch.ones(3))
    assert torch.equal(reconstruction_ND, torch.ones(4, 3, dtype=torch.float64))
    (reconstruction_ND.square().sum() + pairs.by_token(z_M).sum()).backward()  # type: ignore[no-untyped-call]
    for name, leaf in leaves._asdict().items():
        assert leaf.grad is not None, name
        assert leaf.grad.count_nonzero() == 0, name


@pytest.mark.parametrize("kind", ["k a token", "ragged", "dense"])
def test_latents_of_every_kind_count_decode_and_list_what_is_active_alike(kind: str) -> None:
    given = rows()
    pairs, values_M, _ = listed_pairs()
    f_NF = torch.zeros(30, 13, dtype=torch.float64)
    f_NF[pairs.tokens_M, pairs.latents_M] = values_M.relu()
    top = f_NF.topk(4, dim=1)
    of_kind = {
        "k a token": Latents(top.values.flatten(), Pairs.of(top.indices, 13)),
        "ragged": Latents(values_M.relu(), pairs),  # half of the pairs are not active
        "dense": Latents(f_NF, AllPairs()),
    }
    latents = of_kind[kind]
    assert 0 < int((f_NF > 0).sum()) < len(values_M)
    assert torch.equal(latents.dense(), f_NF)
    assert latents.active_counts.tolist() == [int((f_NF[:, latent] > 0).sum()) for latent in range(13)]
    decoded_ND = latents.pairs.decode(latents.values_P, given.W_dec_FD, given.b_dec_D)
    torch.testing.assert_close(decoded_ND, f_NF @ given.W_dec_FD + given.b_dec_D)
    active = latents.active()
    assert torch.equal(active[0], active[0].sort().values)
    triples = set(zip(*(part.tolist() for part in active), strict=True))
    assert len(triples) == len(active[2])
    assert triples == {(n, f, float(f_NF[n, f])) for n, f in f_NF.nonzero().tolist()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_active_counts_are_exact_in_every_precision_and_under_autocast(dtype: torch.dtype) -> None:
    f_NF = torch.zeros(5000, 4, dtype=dtype)
    counts = [0, 257, 3001, 4999]
    for latent, count in enumerate(counts):
        f_NF[:count, latent] = 0.5
    assert AllPairs().active_counts(f_NF).tolist() == counts
    with torch.autocast("cpu", torch.bfloat16):
        assert AllPairs().active_counts(f_NF).tolist() == counts
