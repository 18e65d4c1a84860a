"""The kernels: equal to plain, dense autograd over all N·F pairs, to finite differences and to loops, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from routesae.train.saes.jumprelu import jumprelu
from routesae.train.sparse import kernels
from routesae.train.sparse import pairs as pairs_module
from routesae.train.sparse.kernels import (
    encode_above,
    encode_all,
    encode_batchtopk,
    encode_topk,
    threshold_latents,
    topk_latents,
)
from routesae.train.sparse.pairs import AllPairs, Latents, Pairs
from routesae.train.sparse.policy import Arithmetic
from routesae.train.sparse.search import Encoder


class Problem(NamedTuple):
    """What an autoencoder is differentiable in; v_F stands for any number a latent has (a norm, a threshold)."""

    x_ND: Tensor
    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor
    v_F: Tensor


def problem(n: int, width: int, latents: int, *, bias: float = 0.0, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, width), (latents, width), (latents,), (latents, width), (width,), (latents,)]
    given = Problem(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))
    return given._replace(b_enc_F=bias + 0.3 * given.b_enc_F)


# ------------------------------------------------------------------------- two autoencoders of the same equations


class Selection(NamedTuple):
    """Which pairs matter: as the kernels find them, and as a mask over all z_NF. activation: makes f of their z."""

    encode: Callable[[Tensor, Encoder, int], tuple[Pairs | AllPairs, Tensor]]
    mask: Callable[[Tensor, int], Tensor]
    activation: Callable[[Tensor], Tensor]


def topk_mask(z_NF: Tensor, k: int) -> Tensor:
    """2406.04093, eq. 1."""
    return torch.zeros_like(z_NF, dtype=torch.bool).scatter_(1, torch.topk(z_NF, k, dim=1).indices, value=True)


def batchtopk_mask(z_NF: Tensor, k: int) -> Tensor:
    """2412.06410, eq. 3, by one sort of all N·F pre-activations; of those that tie at the end, all."""
    kept = min(k * len(z_NF), z_NF.numel())
    return (z_NF >= z_NF.flatten().sort(descending=True).values[kept - 1]) & (z_NF > 0)


def floors(latents: int) -> Tensor:
    """Of another height for each latent, below zero for some."""
    return torch.linspace(-0.7, 2.5, latents, dtype=torch.float64)


def above_sparsely(x_ND: Tensor, encoder: Encoder, k: int) -> tuple[Pairs | AllPairs, Tensor]:
    found = encode_above(x_ND, encoder, floors(len(encoder.W_enc_FD)), k)
    assert isinstance(found[0], Pairs)
    return found


SELECTIONS = {
    "topk": Selection(encode_topk, topk_mask, torch.relu),
    "batchtopk": Selection(encode_batchtopk, batchtopk_mask, lambda z: z),
    # f = z² − z: below zero for some pairs, and not linear.
    "above": Selection(above_sparsely, lambda z_NF, _: z_NF > floors(z_NF.shape[1]), lambda z: z * z - z),
}


SPARSELY = Arithmetic(sparse_below=1.1)  # at any density


class Out(NamedTuple):
    reconstruction_ND: Tensor
    f_NF: Tensor
    weighed_N: Tensor


BIASES = {"both biases": (True, True), "b_enc": (True, False), "b_dec": (False, True), "no bias": (False, False)}


def sparse_autoencode(
    select: Selection, given: Problem, k: int, biases: str = "both biases", how: Arithmetic = SPARSELY
) -> Out:
    x_ND, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, v_F = given
    has_b_enc, has_b_dec = BIASES[biases]
    encoder = Encoder(W_enc_FD, b_enc_F if has_b_enc else None, b_dec_D if has_b_dec else None, how)
    pairs, z_P = select.encode(x_ND, encoder, k)
    f_P = select.activation(z_P)
    f_NF = Latents(f_P, pairs).dense()
    weighed_N = pairs.by_token(f_P * pairs.at(v_F)) + pairs.by_token(f_P, v_F.square())
    return Out(pairs.decode(f_P, W_dec_FD, b_dec_D), f_NF, weighed_N)


def dense_autoencode(select: Selection, given: Problem, k: int, biases: str = "both biases") -> Out:
    """The oracle: nothing of routesae.train.sparse.kernels in it."""
    x_ND, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, v_F = given
    has_b_enc, has_b_dec = BIASES[biases]
    z_NF = (x_ND - b_dec_D if has_b_dec else x_ND) @ W_enc_FD.T + (b_enc_F if has_b_enc else 0)
    f_NF = torch.where(select.mask(z_NF, k), select.activation(z_NF), 0)
    return Out(f_NF @ W_dec_FD + b_dec_D, f_NF, (f_NF * (v_F + v_F.square())).sum(1))


def scalar(out: Out) -> Tensor:
    """A loss that weighs and squares the reconstruction and looks at what is per token and per pair too."""
    rec_ND, f_NF, weighed_N = out
    ramp_ND = torch.linspace(0, 1, rec_ND.numel(), dtype=rec_ND.dtype).view_as(rec_ND)
    ramp_NF = torch.linspace(-1, 2, f_NF.numel(), dtype=rec_ND.dtype).view_as(f_NF)
    of_tokens = (weighed_N * torch.linspace(2, -1, len(weighed_N), dtype=rec_ND.dtype)).sum()
    return (rec_ND * ramp_ND).sum() + rec_ND.square().sum() + (f_NF * ramp_NF).sum() + of_tokens


Autoencode = Callable[[Selection, Problem, int, str], Out]


def outputs_and_gradients(
    autoencode: Autoencode, select: Selection, given: Problem, k: int, biases: str = "both biases"
) -> dict[str, Tensor]:
    leaves = Problem(*(tensor.clone().requires_grad_() for tensor in given))
    out = autoencode(select, leaves, k, biases)
    gradients = torch.autograd.grad(scalar(out), leaves, allow_unused=True, materialize_grads=True)
    found = {f"gradient of {name}": gradient for name, gradient in zip(Problem._fields, gradients, strict=True)}
    return found | {name: tensor.detach() for name, tensor in out._asdict().items()}


def assert_sparse_equals_dense(
    selection: str, given: Problem, k: int, biases: str = "both biases"
) -> dict[str, Tensor]:
    select = SELECTIONS[selection]
    expected = outputs_and_gradients(dense_autoencode, select, given, k, biases)
    found = outputs_and_gradients(sparse_autoencode, select, given, k, biases)
    assert torch.equal(found["f_NF"] != 0, expected["f_NF"] != 0)
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-10, atol=1e-10 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )
    return found


# ------------------------------------------------------------------------------------- gradients against dense ones


def repeated(times: int) -> Problem:
    given = problem(6, 5, 40)
    return given._replace(x_ND=given.x_ND.repeat(times, 1))


def skewed() -> Problem:
    """One token thirty times as long as the others: its latents are the batch's largest."""
    given = problem(20, 6, 40, seed=5)
    return given._replace(x_ND=given.x_ND * torch.where(torch.arange(20) == 3, 30.0, 1.0)[:, None])


def partly_dead() -> Problem:
    given = problem(50, 6, 10)
    given.b_enc_F[[2, 9]] = -1000.0
    return given


def single_pair() -> Problem:
    given = problem(10, 6, 12, bias=-1000.0)
    given.x_ND[4] = 2000 * given.W_enc_FD[7] / given.W_enc_FD[7].square().sum()
    others = torch.arange(12) != 7
    given.W_enc_FD[others] = -torch.linspace(0.2, 1, 11, dtype=torch.float64)[:, None] * given.W_enc_FD[7]
    return given


PROBLEMS = {
    "small": (problem(7, 5, 11), 3),
    "one token": (problem(1, 4, 6), 2),
    "k=1": (problem(16, 8, 9), 1),
    "k=F": (problem(5, 3, 6), 6),
    "k=F-1": (problem(9, 3, 13, bias=1.0), 12),
    "one latent": (problem(3, 6, 1), 1),
    "width 1": (problem(8, 1, 24), 2),
    "F a multiple of 16": (problem(30, 6, 64), 3),
    "F a multiple of 8": (problem(30, 6, 40), 3),
    "F odd": (problem(30, 6, 77), 3),
    "one chunk": (problem(512, 4, 16), 4),
    "2.1 chunks": (problem(1100, 6, 40), 5),
    "some tokens have none": (problem(40, 6, 12, bias=-3.0), 6),
    "one pair": (single_pair(), 1),
    "nothing active": (problem(10, 6, 12, bias=-100.0), 4),
    "latents never active": (partly_dead(), 4),
    "repeated tokens": (repeated(4), 3),
    "skewed": (skewed(), 2),
}


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_sparse_equals_dense_in_outputs_and_all_gradients(selection: str, name: str, biases: str) -> None:
    assert_sparse_equals_dense(selection, *PROBLEMS[name], biases)


@pytest.mark.parametrize("columns", [1, 4, 64])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_sparse_equals_dense_where_rows_are_summed_a_few_columns_at_a_time(
    selection: str, name: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "MANY_PAIRS", 0)
    monkeypatch.setattr(pairs_module, "COLUMNS", columns)
    assert_sparse_equals_dense(selection, *PROBLEMS[name], "both biases")


@pytest.mark.parametrize("width", [63, 64, 150])
def test_columns_at_a_time_or_all_at_once_sums_are_the_same_bit_for_bit(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that how many pairs a batch happens to have, or that this limit moves one day, changes no weights."""
    generator = torch.Generator().manual_seed(0)
    tokens, latents, k = 12, 300, pairs_module.MANY_PAIRS
    indices_NK = torch.stack([torch.randperm(latents, generator=generator)[:k] for _ in range(tokens)])
    pairs, weights_M = Pairs.of(indices_NK, latents), torch.randn(tokens * k, generator=generator)
    rows_FD, rows_ND = (torch.randn(n, width, generator=generator) for n in (latents, tokens))
    asked, embedding_bag = list[int](), torch.nn.functional.embedding_bag

    def counted(input: Tensor, weight: Tensor, *args: Tensor, **more: Any) -> Tensor:
        asked.append(weight.shape[1])
        return embedding_bag(input, weight, *args, **more)

    monkeypatch.setattr(pairs_module.F, "embedding_bag", counted)
    few = pairs.rows_by_token(weights_M, rows_FD), pairs.rows_by_latent(weights_M, rows_ND)
    assert max(asked) <= pairs_module.COLUMNS < sum(asked) or width <= pairs_module.COLUMNS
    monkeypatch.setattr(pairs_module, "MANY_PAIRS", k + 1)
    whole = pairs.rows_by_token(weights_M, rows_FD), pairs.rows_by_latent(weights_M, rows_ND)
    assert asked[-2:] == [width, width]
    assert all(map(torch.equal, few, whole))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_problems_are_what_their_names_say(selection: str) -> None:
    """That is: tokens and latents without a pair, and no pair at all, were indeed among what was compared."""

    def active_of(name: str) -> Tensor:
        given, k = PROBLEMS[name]
        return dense_autoencode(SELECTIONS[selection], given, k).f_NF != 0

    active_N = active_of("some tokens have none").sum(1)
    assert active_N.min() == 0
    assert active_N.max() > 1
    assert not active_of("nothing active").any()
    assert active_of("one pair").nonzero().tolist() == [[4, 7]]
    assert active_of("latents never active").any(0).tolist() == [at not in (2, 9) for at in range(10)]
    of_longest, whole = int(active_of("skewed")[3].sum()), int(active_of("skewed").sum())
    assert of_longest > (2 if selection == "topk" else 10) - 1
    assert whole == 40 or selection == "above"


@pytest.mark.parametrize("selection", SELECTIONS)
def test_latents_that_are_never_active_get_no_gradient(selection: str) -> None:
    found = assert_sparse_equals_dense(selection, *PROBLEMS["latents never active"])
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "v_F"):
        nonzero_F = found[f"gradient of {name}"].reshape(10, -1).abs().sum(1) > 0
        assert nonzero_F.tolist() == [at not in (2, 9) for at in range(10)], name


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("selection", ["topk", "batchtopk"])
def test_tied_latents_give_what_any_choice_of_them_would(selection: str, k: int) -> None:
    # Rows 0..3 and 4..7 of both matrices are the same, so which of a pair is among the top k is open; the
    # reconstruction and the gradient of the pair together are not.
    given = problem(20, 5, 4)
    doubled = Problem(*(tensor if tensor.shape[0] != 4 else torch.cat([tensor, tensor]) for tensor in given))
    select = SELECTIONS[selection]

    def together(autoencode: Autoencode) -> list[Tensor]:
        leaves = Problem(*(tensor.clone().requires_grad_() for tensor in doubled))
        rec_ND, _, weighed_N = autoencode(select, leaves, k, "both biases")
        gradients = torch.autograd.grad(rec_ND.square().sum() + weighed_N.square().sum(), leaves)
        shared = [g if g.shape[0] != 8 else g.unflatten(0, (2, 4)).sum(0) for g in gradients]
        return [rec_ND.detach(), weighed_N.detach(), *shared]

    for sparse, dense in zip(together(sparse_autoencode), together(dense_autoencode), strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradients_equal_finite_differences(selection: str, biases: str) -> None:
    given, k, select = problem(5, 3, 7, bias=-0.3, seed=2), 3, SELECTIONS[selection]
    leaves = tuple(tensor.clone().requires_grad_() for tensor in given)

    def outputs(*tensors: Tensor) -> Out:
        return sparse_autoencode(select, Problem(*tensors), k, biases)

    f_NF = outputs(*leaves).f_NF
    assert 0 < f_NF.count_nonzero() < f_NF.numel()
    # No selection changes within the differences' step of 1e-6.
    for name in Problem._fields[:5]:
        moved = given._replace(**{name: getattr(given, name) + 1e-5})
        assert torch.equal(outputs(*moved).f_NF != 0, f_NF != 0), name
    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_weights_gradients_do_not_depend_on_whether_the_input_wants_one(selection: str) -> None:
    given = problem(9, 4, 8)

    def gradients(x_ND: Tensor) -> tuple[Tensor, ...]:
        weights = tuple(tensor.clone().requires_grad_() for tensor in given[1:])
        loss = scalar(sparse_autoencode(SELECTIONS[selection], Problem(x_ND, *weights), 3))
        return torch.autograd.grad(loss, weights)

    with_x, without_x = gradients(given.x_ND.clone().requires_grad_()), gradients(given.x_ND)
    assert all(torch.equal(a, b) for a, b in zip(with_x, without_x, strict=True))


def test_weights_that_are_held_fixed_leave_the_others_gradients_as_they_are() -> None:
    given, k = PROBLEMS["small"]
    whole = outputs_and_gradients(sparse_autoencode, SELECTIONS["above"], given, k)
    for name in Problem._fields:
        leaves = Problem(*(tensor.clone().requires_grad_(of != name) for of, tensor in given._asdict().items()))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(scalar(sparse_autoencode(SELECTIONS["above"], leaves, k)), wanted)
        others = [of for of in Problem._fields if of != name]
        for of, gradient in zip(others, found, strict=True):
            assert torch.equal(gradient, whole[f"gradient of {of}"]), (name, of)


def test_a_gradient_that_is_not_contiguous_is_the_same_gradient() -> None:
    given = problem(6, 4, 8)

    def gradients(transposed: bool) -> tuple[Tensor, ...]:
        leaves = Problem(*(tensor.clone().requires_grad_() for tensor in given))
        rec_ND = sparse_autoencode(SELECTIONS["topk"], leaves, 3).reconstruction_ND
        g_ND = torch.arange(24, dtype=torch.float64).view(6, 4)
        g_ND = g_ND.T.contiguous().T if transposed else g_ND
        return torch.autograd.grad(rec_ND, leaves[:5], g_ND)

    for straight, transposed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(straight, transposed)


@pytest.mark.parametrize("proposal", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_float32_gradients_are_those_of_float64_to_1e_5(selection: str, proposal: torch.dtype) -> None:
    given, select = problem(600, 16, 64), SELECTIONS[selection]
    exact = outputs_and_gradients(dense_autoencode, select, given, 4)
    proposed = partial(sparse_autoencode, how=SPARSELY.replace(proposal=str(proposal).removeprefix("torch.")))
    found = outputs_and_gradients(proposed, select, Problem(*(tensor.float() for tensor in given)), 4)
    assert torch.equal(found["f_NF"] != 0, exact["f_NF"] != 0)
    for name, tensor in exact.items():
        assert found[name].dtype == torch.float32, name
        error = (found[name].double() - tensor).norm() / tensor.norm()
        assert error < 1e-5, (name, float(error))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_two_backward_passes_agree_bit_for_bit(selection: str) -> None:
    given = problem(700, 16, 32)
    first, second = (outputs_and_gradients(sparse_autoencode, SELECTIONS[selection], given, 8) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------ what is selected


def test_batchtopk_looks_again_at_all_above_zero_where_its_sample_of_tokens_asked_for_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounds: list[float] = []
    inner = kernels.all_above

    def counted(x_ND: Tensor, encoder: Encoder, floor_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bounds.append(float(floor_F[0]))
        return inner(x_ND, encoder, floor_F)

    monkeypatch.setattr(kernels, "all_above", counted)
    monkeypatch.setattr(kernels, "BATCHTOPK_PROBE", 50)
    even = problem(100, 6, 40)
    assert_sparse_equals_dense("batchtopk", even, 3)
    assert len(bounds) == 1
    assert bounds[0] > 0
    bounds.clear()
    # Every second token, and so every one that is looked at first, is thirty times as long as the others.
    longer_N = torch.where(torch.arange(100) % 2 == 0, 30.0, 1.0)
    assert_sparse_equals_dense("batchtopk", even._replace(x_ND=even.x_ND * longer_N[:, None]), 12)
    assert bounds[0] > 0
    assert bounds[1:] == [0]


def test_batchtopk_keeps_exactly_k_a_token_on_average_where_that_many_are_above_zero() -> None:
    given = problem(700, 4, 16)
    pairs, z_M = encode_batchtopk(given.x_ND, Encoder(*given[1:3], chosen=SPARSELY), 3)
    assert isinstance(pairs, Pairs)
    assert len(z_M) == len(pairs.latents_M) == 2100
    assert len(set(torch.bincount(pairs.tokens_M, minlength=700).tolist())) > 5  # not three each


def test_the_encoder_is_cast_once_a_batch_however_often_batchtopk_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    casts: list[torch.dtype] = []
    first = Encoder.narrowed

    def narrowed(encoder: Encoder, dtype: torch.dtype) -> Encoder:
        casts.append(dtype)
        return first(encoder, dtype)

    monkeypatch.setattr(Encoder, "narrowed", narrowed)
    given = Problem(*(part.float() for part in problem(700, 40, 160)))
    encoder = Encoder(given.W_enc_FD, given.b_enc_F, given.b_dec_D, SPARSELY)
    pairs, z_M = encode_batchtopk(given.x_ND, encoder._replace(chosen=SPARSELY.replace(proposal="bfloat16")), 3)
    assert casts == [torch.bfloat16]
    exact, exact_M = encode_batchtopk(given.x_ND, encoder, 3)
    assert isinstance(pairs, Pairs)
    assert isinstance(exact, Pairs)
    assert torch.equal(pairs.latents_M, exact.latents_M)
    assert torch.equal(pairs.tokens_M, exact.tokens_M)
    torch.testing.assert_close(z_M, exact_M)


def test_few_pairs_above_their_floors_are_handled_as_pairs_and_many_as_all_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    given = problem(400, 6, 60)
    encoder = Encoder(given.W_enc_FD, given.b_enc_F, given.b_dec_D)
    z_NF = (given.x_ND - given.b_dec_D) @ given.W_enc_FD.T + given.b_enc_F
    for share, kind in ((0.01, Pairs), (0.07, Pairs), (0.1, AllPairs), (0.5, AllPairs)):
        # The share is estimated from the first rows.
        floor = z_NF[: kernels.PROBE_ROWS].flatten().sort(descending=True).values[round(share * 128 * 60)]
        pairs, z_P = encode_above(given.x_ND, encoder, floor.expand(60), 4)
        assert type(pairs) is kind, share
        expected_P = z_NF if isinstance(pairs, AllPairs) else z_NF[pairs.tokens_M, pairs.latents_M]
        torch.testing.assert_close(z_P, expected_P)
        assert len(expected_P.flatten()) == (z_NF.numel() if kind is AllPairs else int((z_NF > floor).sum()))


@pytest.mark.parametrize("biases", BIASES)
def test_encode_all_is_every_pre_activation(biases: str) -> None:
    given = problem(7, 5, 11)
    has_b_enc, has_b_dec = BIASES[biases]
    encoder = Encoder(given.W_enc_FD, given.b_enc_F if has_b_enc else None, given.b_dec_D if has_b_dec else None)
    z_NF = encode_all(given.x_ND, encoder)
    for n in range(7):
        for latent in range(11):
            z = float(given.W_enc_FD[latent] @ (given.x_ND[n] - given.b_dec_D * has_b_dec))
            assert float(z_NF[n, latent]) == pytest.approx(z + float(given.b_enc_F[latent]) * has_b_enc)


@pytest.mark.parametrize(("n", "k"), [(5, 3), (513, 1), (1025, 12)])
def test_topk_latents_are_the_largest_pre_activations_cut_at_zero(n: int, k: int) -> None:
    given = problem(n, 5, 12, bias=-2.0)
    latents = topk_latents(given.x_ND, Encoder(given.W_enc_FD, given.b_enc_F, given.b_dec_D), k)
    assert isinstance(latents.pairs, Pairs)
    indices_NK, values_NK = latents.pairs.latents_M.view(n, k), latents.values_P.view(n, k)
    assert indices_NK.dtype == torch.int64
    z_NF = (given.x_ND - given.b_dec_D) @ given.W_enc_FD.T + given.b_enc_F
    for row in range(n):
        z = z_NF[row].tolist()
        best = sorted(range(12), key=lambda latent, z=z: -z[latent])[:k]  # type: ignore[misc]
        found = dict(zip(indices_NK[row].tolist(), values_NK[row].tolist(), strict=True))
        assert len(found) == k  # each latent once, active or not
        active = {latent: value for latent, value in found.items() if value > 0}
        assert active == pytest.approx({latent: z[latent] for latent in best if z[latent] > 0})
        assert min(found.values()) >= 0


@pytest.mark.parametrize("n", [7, 600])
def test_threshold_latents_are_what_is_above_both_its_threshold_and_zero(n: int) -> None:
    given = problem(n, 5, 12)
    threshold_F = torch.linspace(-1.5, 2, 12, dtype=torch.float64)
    encoder = Encoder(given.W_enc_FD, given.b_enc_F, given.b_dec_D)
    found = threshold_latents(given.x_ND, encoder, threshold_F).dense()
    z_NF = (given.x_ND - given.b_dec_D) @ given.W_enc_FD.T + given.b_enc_F
    for row in range(0, n, 7):
        for latent in range(12):
            z = float(z_NF[row, latent])
            expected = z if z > 0 and z > float(threshold_F[latent]) else 0.0
            assert float(found[row, latent]) == pytest.approx(expected, abs=1e-12)
    assert ((z_NF > 0) & (z_NF < threshold_F)).any()
    assert ((z_NF < 0) & (z_NF > threshold_F)).any()


def test_a_pre_activation_at_its_threshold_is_not_active() -> None:
    encoder = Encoder(torch.eye(2), torch.tensor([0.5, 1.0]), chosen=SPARSELY)
    floor_F = torch.tensor([0.5, 0.5])
    assert threshold_latents(torch.zeros(1, 2), encoder, floor_F).dense().tolist() == [[0.0, 1.0]]
    assert jumprelu(torch.tensor([[0.5, 1.0]]), floor_F, 0.1).tolist() == [[0.0, 1.0]]
    pairs, z_M = encode_above(torch.zeros(1, 2), encoder, floor_F, 1)
    assert isinstance(pairs, Pairs)
    assert (pairs.latents_M.tolist(), z_M.tolist()) == ([1], [1.0])
