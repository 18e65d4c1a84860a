"""The search for active latents: what it finds is what a whole [N, F] of exact pre-activations has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from routesae.train.sparse import policy, search
from routesae.train.sparse.policy import Arithmetic
from routesae.train.sparse.search import (
    Encoder,
    all_above,
    largest,
    pre_activations,
    row_products,
    topk_of,
)

# ------------------------------------------------------------------------------------------------ largest of a row


def values(kind: str, n: int, f: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(f)
    normal_NF = torch.randn(n, f, generator=generator, dtype=torch.float64)
    kinds = {
        "normal": normal_NF,
        "few above zero": normal_NF - 2.5,
        "duplicates": (normal_NF * 2).round() / 2,
        "all alike": torch.full((n, f), 0.75),
        "none above zero": -normal_NF.abs(),
        "tiny and huge": normal_NF.sign() * torch.exp(8 * normal_NF),
    }
    return kinds[kind].to(dtype)


WIDTHS_AND_K = [
    *((f, k) for f in (1, 2, 7, 8, 16, 24, 31) for k in (1, 2, f // 2, f - 1, f) if 1 <= k <= f),
    *((f, k) for f in (1000, 1003, 1024, 4096, 5000) for k in (1, 3, 32, 100, f // 16, f // 9, f)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kind", ["normal", "few above zero", "duplicates", "all alike", "none above zero", "tiny and huge"]
)
def test_largest_has_torch_topks_values_above_zero_and_names_no_place_twice(kind: str, dtype: torch.dtype) -> None:
    for f, k in dict.fromkeys(WIDTHS_AND_K):
        z_NF = values(kind, 5, f, dtype)
        before_NF = z_NF.clone()
        at_NK = largest(z_NF, k)
        assert torch.equal(z_NF, before_NF)
        assert (at_NK.dtype, at_NK.shape) == (torch.int64, (5, k))
        expected = torch.topk(z_NF, k, dim=1)
        found_NK = z_NF.gather(1, at_NK).relu().sort(dim=1, descending=True).values
        assert torch.equal(found_NK, expected.values.relu()), (f, k)
        for row in range(5):
            chosen = at_NK[row].tolist()
            assert len(set(chosen)) == k, (f, k)
            if len(z_NF[row].unique()) == f:  # no ties: the places are one set, too
                above = [at for at in chosen if z_NF[row, at] > 0]
                named = expected.indices[row][expected.values[row] > 0].tolist()
                assert set(above) == set(named), (f, k)


# ---------------------------------------------------------------------------------- rows, encoders, the exact product


class Problem(NamedTuple):
    x_ND: Tensor
    encoder: Encoder

    def exact(self) -> tuple[Tensor, float]:
        """z_NF in float64, with nothing of the package in it; and how far from it float32 may be: several times its
        own error in a pre-activation, and 1e-5 of their spread."""
        x_ND, (W_enc_FD, b_enc_F, b_dec_D) = self.x_ND, self.encoder[:3]
        z_NF = (x_ND.double() if b_dec_D is None else x_ND.double() - b_dec_D.double()) @ W_enc_FD.double().T
        sizes = x_ND.norm(dim=1).max() + (0 if b_dec_D is None else b_dec_D.norm())
        rounding = float(1e-6 * sizes * W_enc_FD.norm(dim=1).max() + 1e-5 * z_NF.std())
        return z_NF if b_enc_F is None else z_NF + b_enc_F.double(), rounding


KINDS = [
    "normal",
    "no bias",
    "a few dimensions 20 to 100 times larger",
    "a few dimensions far off, which b_dec holds",
    "a few dimensions far off, which nothing holds",
    "rows of all lengths",
    "biases of three standard deviations",
    "biases far larger than the products",
    "few above zero",
    "none above zero",
]


def problem(kind: str, n: int = 300, width: int = 48, latents: int = 500) -> Problem:
    """Normalised hidden states and a dictionary of unit rows, changed as `kind` says; float32."""
    generator = torch.Generator().manual_seed(width * latents)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x_ND, W_enc_FD = normal(n, width), torch.nn.functional.normalize(normal(latents, width), dim=1)
    b_enc_F, b_dec_D = 0.1 * normal(latents), 0.1 * normal(width)
    outliers_D = torch.where(torch.arange(width) % 16 == 3, torch.linspace(20, 100, width), 0)
    match kind:
        case "no bias":
            return Problem(x_ND, Encoder(W_enc_FD))
        case "a few dimensions 20 to 100 times larger":
            x_ND = x_ND * outliers_D.clamp(min=1)
        case "a few dimensions far off, which b_dec holds":
            x_ND, b_dec_D = 0.5 * x_ND + outliers_D, b_dec_D + outliers_D
        case "a few dimensions far off, which nothing holds":
            x_ND = 0.5 * x_ND + outliers_D
        case "rows of all lengths":
            W_enc_FD = W_enc_FD * torch.logspace(-2, 1, latents)[:, None]
        case "biases of three standard deviations":
            b_enc_F = 3 * normal(latents)
        case "biases far larger than the products":
            b_enc_F = 50 * normal(latents)
        case "few above zero":
            b_enc_F = b_enc_F - 2.7
        case "none above zero":
            b_enc_F = b_enc_F - 100
    return Problem(x_ND, Encoder(W_enc_FD, b_enc_F, b_dec_D))


PRECISIONS = ["float64", "float32", "proposed in bfloat16"]


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In which precision the product runs; a few chunks of rows in each."""
    monkeypatch.setattr(policy, "CPU_CHUNK_ROWS", {torch.float32: 128, torch.float64: 128, torch.bfloat16: 128})
    seen: list[torch.dtype] = []
    inner = pre_activations

    def counted(x_ND: Tensor, encoder: Encoder, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        seen.append(dtype)
        return inner(x_ND, encoder, dtype)

    monkeypatch.setattr(search, "pre_activations", counted)
    yield request.param
    product = {"float64": torch.float64, "float32": torch.float32}.get(request.param, torch.bfloat16)
    assert set(seen) == {product}  # the precision named is the one that ran


def given_in(precision: str, given: Problem) -> Problem:
    if precision != "float64":
        proposal = "bfloat16" if precision == "proposed in bfloat16" else "float32"
        how = Arithmetic(proposal=proposal, sparse_below=1.0)
        return given._replace(encoder=given.encoder._replace(chosen=how))
    parts = (None if part is None else part.double() for part in given.encoder[:3])
    return Problem(given.x_ND.double(), Encoder(*parts))


# --------------------------------------------------------------------------------------------------------- topk_of

SIZES = [(200, 48, 504), (1, 31, 40), (130, 33, 1003)]


@pytest.mark.parametrize("kind", KINDS)
def test_topk_of_is_the_exact_top_k_also_where_bfloat16_proposes(kind: str, precision: str) -> None:
    for n, width, latents in SIZES:
        given = given_in(precision, problem(kind, n, width, latents))
        z_NF, rounding = given.exact()
        # Where fewer than k are above 0, a proposal's error decides about those that hardly are.
        unsure = 0.02 * float(z_NF.std()) if precision == "proposed in bfloat16" else 0.0
        for k in (1, 8, latents // 10, latents):
            z_NK, indices_NK = topk_of(given.x_ND, given.encoder, k)
            assert (z_NK.dtype, z_NK.shape, indices_NK.dtype) == (given.x_ND.dtype, (n, k), torch.int64)
            assert all(len(set(row)) == k for row in indices_NK.tolist())
            # What is handed out is exact, whatever proposed it.
            torch.testing.assert_close(z_NK.double(), z_NF.gather(1, indices_NK), rtol=1e-5, atol=rounding)
            # Nothing above 0 that is larger than the k-th is missing, nothing else is there; as float32 can tell.
            chosen_NF = torch.zeros_like(z_NF, dtype=torch.bool).scatter_(1, indices_NK, value=True)
            kth_N1 = torch.topk(z_NF, k, dim=1).values[:, -1:]
            least_N1 = kth_N1.clamp(min=unsure)
            missing_NF = ~chosen_NF & (z_NF > least_N1 + rounding)
            wrong_NF = chosen_NF & (z_NF > rounding) & (z_NF < kth_N1 - rounding)
            assert not missing_NF.any(), (n, width, latents, k, int(missing_NF.sum()))
            assert not wrong_NF.any(), (n, width, latents, k, int(wrong_NF.sum()))


def test_the_top_k_is_the_same_whichever_precision_proposes() -> None:
    """Values to 1e-5, and the very same latents where the k-th stands clear of the next."""
    for kind in KINDS[:-2]:
        given = problem(kind)
        z_NF, rounding = given.exact()
        found = {}
        for proposal in ("float32", "bfloat16"):
            encoder = given.encoder._replace(chosen=Arithmetic(proposal=proposal, sparse_below=1.0))
            z_NK, indices_NK = topk_of(given.x_ND, encoder, 8)
            found[proposal] = z_NK.sort(dim=1).values, indices_NK.sort(dim=1).values
        plain, proposed = found["float32"], found["bfloat16"]
        torch.testing.assert_close(proposed[0], plain[0], rtol=1e-5, atol=rounding)
        best_N9 = torch.topk(z_NF, 9, dim=1).values
        clear_N = best_N9[:, 7] - best_N9[:, 8] > 2 * rounding
        assert clear_N.double().mean() > 0.9, kind
        assert torch.equal(proposed[1][clear_N], plain[1][clear_N]), kind


# ------------------------------------------------------------------------------------------------------- all_above


def floors_of(which: str, z_NF: Tensor) -> Tensor:
    """[F], of which about a fiftieth of all pairs lies above."""
    at = max(1, round(0.02 * z_NF.numel()))
    one = torch.topk(z_NF.flatten(), at + 1).values[-2:].mean()  # between two, so that no rounding moves it
    by_latent_F = torch.quantile(z_NF, 0.98, dim=0)
    return {
        "one for all": one.expand(z_NF.shape[1]),
        "each its own": by_latent_F,
        "below zero": -by_latent_F.abs() - 1,
        "above all": z_NF.amax(0) + 1,
    }[which]


@pytest.mark.parametrize("which", ["one for all", "each its own", "below zero", "above all"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_above_finds_every_pair_above_its_floor_and_no_other(kind: str, which: str, precision: str) -> None:
    for n, width, latents in SIZES:
        given = given_in(precision, problem(kind, n, width, latents))
        z_NF, rounding = given.exact()
        floor_F = floors_of(which, z_NF).to(given.x_ND.dtype)
        # Subtracting a floor and adding it again rounds by as much as it is large.
        rounding += 1e-6 * float(floor_F.abs().max())
        tokens_M, latents_M, z_M = all_above(given.x_ND, given.encoder, floor_F)
        assert (tokens_M.dtype, latents_M.dtype, z_M.dtype) == (torch.int64, torch.int64, given.x_ND.dtype)
        assert torch.equal(tokens_M, tokens_M.sort().values)
        found_NF = torch.zeros_like(z_NF, dtype=torch.bool)
        found_NF[tokens_M, latents_M] = True
        assert int(found_NF.sum()) == len(z_M) == len(tokens_M) == len(latents_M)  # no pair twice
        torch.testing.assert_close(z_M.double(), z_NF[tokens_M, latents_M], rtol=1e-5, atol=rounding)
        missing_NF = ~found_NF & (z_NF > floor_F + rounding)
        wrong_NF = found_NF & (z_NF < floor_F - rounding)
        assert not missing_NF.any(), (n, width, latents, int(missing_NF.sum()))
        assert not wrong_NF.any(), (n, width, latents, int(wrong_NF.sum()))
        assert which != "above all" or len(z_M) == 0
        assert which != "one for all" or len(z_M) > 0


def test_all_above_in_float64_is_z_above_the_floor_to_the_last_pair() -> None:
    given = given_in("float64", problem("normal", n=1100, width=16, latents=77))
    z_NF, _ = given.exact()
    floor_F = torch.linspace(-1, 3, 77, dtype=torch.float64)
    assert (z_NF - floor_F).abs().min() > 1e-9  # none that rounding could move
    tokens_M, latents_M, z_M = all_above(given.x_ND, given.encoder, floor_F)
    expected = {(n, f) for n, f in torch.nonzero(z_NF > floor_F).tolist()}
    assert len(tokens_M) == len(expected) > 10_000
    assert set(zip(tokens_M.tolist(), latents_M.tolist(), strict=True)) == expected
    torch.testing.assert_close(z_M, z_NF[tokens_M, latents_M], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------- products and precisions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "no bias", "a few dimensions far off, which b_dec holds"])
def test_pre_activations_come_in_order_and_once_and_within_their_precision(kind: str, dtype: torch.dtype) -> None:
    chunk, n = policy.CPU_CHUNK_ROWS.get(dtype, 512), 2100
    given = problem(kind, n=n, width=31, latents=40)
    given = given_in("float64" if dtype == torch.float64 else "float32", given)
    z_NF, rounding = given.exact()
    # Centred before it is rounded, or bfloat16's error would be that of the offsets.
    error = rounding if dtype != torch.bfloat16 else 0.02 * float(z_NF.std())
    begin = 0
    for rows, z_nF in pre_activations(given.x_ND, given.encoder, dtype):
        assert (rows.start, rows.stop) == (begin, min(begin + chunk, n))
        assert z_nF.dtype == dtype
        assert float((z_nF.double() - z_NF[rows]).abs().mean()) < error
        begin = rows.stop
    assert begin == n


def test_only_float32_rows_are_proposed_for_in_what_autocast_or_the_arithmetic_says() -> None:
    x_ND = torch.zeros(2, 3)
    for proposal in (torch.float32, torch.bfloat16):
        proposes = Arithmetic(proposal=str(proposal).removeprefix("torch."), sparse_below=1.0).proposes
        assert proposes(x_ND) == proposal
        assert proposes(x_ND.double()) == torch.float64
        assert proposes(x_ND.bfloat16()) == torch.bfloat16
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                assert proposes(x_ND) == dtype
                assert proposes(x_ND.double()) == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert proposes(x_ND) == proposal


def test_under_autocast_what_is_handed_out_is_as_exact_as_without_it() -> None:
    for kind in KINDS[:-2]:
        given = problem(kind)
        z_NF, rounding = given.exact()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z_NK, indices_NK = topk_of(given.x_ND, given.encoder, 8)
            floor_F = torch.topk(z_NF.flatten(), 2000).values[-1].expand(500).float()
            tokens_M, latents_M, z_M = all_above(given.x_ND, given.encoder, floor_F)
        assert z_NK.dtype == z_M.dtype == torch.float32
        torch.testing.assert_close(z_NK.double(), z_NF.gather(1, indices_NK), rtol=1e-5, atol=rounding)
        torch.testing.assert_close(z_M.double(), z_NF[tokens_M, latents_M], rtol=1e-5, atol=rounding)
        torch.testing.assert_close(
            z_NK.double().sort(dim=1, descending=True).values,
            torch.topk(z_NF, 8, dim=1).values,
            rtol=1e-5,
            atol=rounding,
        )
        # At the floor itself float32 and float64 may differ by the pair that it was taken from.
        assert abs(len(z_M) - int((z_NF > floor_F).sum())) <= 1, kind


@pytest.mark.parametrize("m", [0, 1, 90])
def test_row_products_are_the_dot_products_of_each_pair(m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    rows_ND = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    rows_FD = torch.randn(13, 5, generator=generator, dtype=torch.float64)
    tokens_M = torch.randint(0, 30, (m,), generator=generator).sort().values
    latents_M = torch.randint(0, 13, (m,), generator=generator)
    products_M = row_products(tokens_M, latents_M, rows_FD, rows_ND)
    expected = [float(rows_ND[n] @ rows_FD[f]) for n, f in zip(tokens_M.tolist(), latents_M.tolist(), strict=True)]
    assert products_M.tolist() == pytest.approx(expected)
