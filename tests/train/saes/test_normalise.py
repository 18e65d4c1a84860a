"""Input normalisation and the recipe: by their formulas, token by token, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from routesae.reporting import WrongInput
from routesae.tests.hidden import normalise_layers
from routesae.train.saes import SAE, SAES, SINGLE_LAYER, Recipe, RouteSAE, build
from routesae.train.saes.normalise import Hidden, dataset_scale, normalise
from routesae.train.saes.single import geometric_median

L, N, D, LATENTS, K = 3, 40, 16, 48, 5


def hidden(seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    """Hidden states with a mean and a scale of their own in every layer and token."""
    generator = torch.Generator().manual_seed(seed)
    scales_LN1 = torch.rand(L, N, 1, generator=generator) * 20 + 0.1
    return (torch.randn(L, N, D, generator=generator) * scales_LN1 + scales_LN1.flip(0)).to(dtype)


def normalised_by_hand(hidden_D: Tensor) -> Tensor:
    values = [float(value) for value in hidden_D]
    mean = sum(values) / len(values)
    std = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return torch.tensor([(value - mean) / (std + 1e-6) for value in values], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_normalise_is_the_equation_token_by_token(dtype: torch.dtype) -> None:
    hidden_ND = hidden(dtype=dtype)[0]
    x_ND = normalise(hidden_ND)[0]
    assert x_ND.dtype == torch.float32
    for n in range(N):
        torch.testing.assert_close(x_ND[n].double(), normalised_by_hand(hidden_ND[n]), rtol=1e-5, atol=1e-5)


def test_normalised_tokens_have_zero_mean_and_unit_unbiased_std() -> None:
    x_ND = normalise(hidden()[1])[0].double()
    assert x_ND.mean(1).abs().max() < 1e-6
    assert (x_ND.square().sum(1) / (D - 1) - 1).abs().max() < 1e-4


def test_normalise_survives_what_overflows_float16_when_squared() -> None:
    hidden_ND = torch.full((1, D), 30_000.0, dtype=torch.float16)
    hidden_ND[0, 0] = -60_000
    x_ND = normalise(hidden_ND)[0]
    torch.testing.assert_close(x_ND[0].double(), normalised_by_hand(hidden_ND[0]), rtol=1e-5, atol=1e-5)


def test_a_constant_token_normalises_to_zero() -> None:
    assert normalise(torch.full((2, D), 3.0, dtype=torch.float16))[0].count_nonzero() == 0


# ---------------------------------------------------------------------------------- hidden states in and out of SAEs


def identity(name: str, normalize: str, **changes: Any) -> SAE:
    """An SAE that reconstructs exactly what it reads: f = ReLU(x), ReLU(−x), every latent kept."""
    layers = (4,) if name in SINGLE_LAYER else (4, 6, 9)
    width = D if name != "crosscoder" else D * len(layers)
    changes |= {"prefixes": (2 * width,)} if name == "matryoshka" else {}
    recipe = Recipe(sae=name, layers=layers, width=D, latents=2 * width, k=2 * width, normalize=normalize, **changes)
    sae = build(recipe).eval().requires_grad_(False)
    eye = torch.eye(width)
    rows = torch.cat([eye, -eye])
    for key, parameter in sae.named_parameters():
        if "W_" in key:
            parameter.copy_(rows)
        elif "router" not in key:
            parameter.zero_()
    sae.scale = 0.3 if normalize == "dataset" else 1.0
    return sae


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normalize", ["token", "dataset", "none"])
@pytest.mark.parametrize("name", SAES)
def test_hidden_states_go_in_and_come_back_as_they_are_in_the_lm(
    name: str, normalize: str, dtype: torch.dtype
) -> None:
    sae = identity(name, normalize)
    hidden_LND = hidden(dtype=dtype)
    ending = (D,) if sae.one_layer else (L, D)
    given = hidden_LND[0] if sae.one_layer else hidden_LND.transpose(0, 1)
    expected = given.float()
    if isinstance(sae, RouteSAE):
        expected = hidden_LND[sae.routes(given).at_R, torch.arange(N)].float()
    tolerances = {"rtol": 1e-4, "atol": 1e-4}
    for lead in ((N,), (5, 8), (2, 4, 5)):
        latents = sae.encode(given.view(*lead, *ending) if given.is_contiguous() else given.reshape(*lead, *ending))
        back = sae.decode(latents)
        assert back.dtype == torch.float32
        torch.testing.assert_close(back, expected.reshape(*lead, *expected.shape[1:]), **tolerances)
    torch.testing.assert_close(sae.decode(sae(given).latents), expected, **tolerances)
    # What a cache knows of its rows is what an SAE finds out by itself.
    statistics = (hidden_LND.float().mean(2, keepdim=True), hidden_LND.float().std(2, keepdim=True))
    layers = [0] if sae.one_layer else [0, 1, 2]
    stored = Hidden(hidden_LND[layers], *(part_LN1[layers] for part_LN1 in statistics))
    torch.testing.assert_close(sae.encode(stored).dense(), sae.encode(given).dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(sae.encode(stored)), expected, **tolerances)


@pytest.mark.parametrize("name", SAES)
def test_hidden_states_of_another_shape_are_refused(name: str) -> None:
    sae = identity(name, "token")
    reads = "16" if sae.one_layer else "3, 16"
    for shape in ((N, D + 1), (D,)[: 0 if sae.one_layer else 1], (N, 2, D + 1)):
        with pytest.raises(WrongInput, match=rf"reads \[\.\.\., {reads}\]"):
            sae.encode(torch.zeros(shape))


def test_soft_routing_has_no_way_back() -> None:
    sae = identity("routesae", "token", routing="soft")
    with pytest.raises(WrongInput, match="soft routing mixes all layers"):
        sae.decode(sae.encode(hidden().transpose(0, 1)))


def test_geometric_median_of_points_on_a_line_is_the_median() -> None:
    x_ND = torch.tensor([0.0, 1.0, 2.0, 50.0, 3.0])[:, None] * torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(geometric_median(x_ND), torch.tensor([6.0, 8.0]), rtol=0, atol=0.05)


def test_geometric_median_has_the_least_summed_distance() -> None:
    x_ND = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).exp()  # skewed: the mean is elsewhere

    def distance(point_D: Tensor) -> float:
        return float((x_ND - point_D).norm(dim=1).sum())

    naive_D = x_ND.mean(0).clone().requires_grad_()
    descent = torch.optim.LBFGS([naive_D], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        descent.zero_grad()
        loss = (x_ND - naive_D).norm(dim=1).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    descent.step(closure)
    best, mean = distance(naive_D.detach()), distance(x_ND.mean(0))
    assert distance(geometric_median(x_ND)) - best < 1e-4 * (mean - best)


def test_geometric_median_of_equal_points_is_that_point() -> None:
    assert geometric_median(torch.full((5, 3), 2.0)).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("layers", [1, L])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_normalise_layers_by_token_normalises_every_token_of_every_layer_by_itself(
    layers: int, dtype: torch.dtype
) -> None:
    hidden_LND = hidden(dtype=dtype)[:layers]
    before_LND = hidden_LND.clone()
    x_LND = normalise_layers(hidden_LND, "token")
    assert x_LND.dtype == torch.float32
    assert torch.equal(hidden_LND, before_LND)
    for layer in range(layers):
        for n in range(N):
            expected_D = normalised_by_hand(hidden_LND[layer, n])
            torch.testing.assert_close(x_LND[layer, n].double(), expected_D, rtol=1e-5, atol=1e-5)


def test_normalise_layers_by_the_dataset_scales_and_by_none_leaves_as_it_is() -> None:
    hidden_LND = hidden()
    torch.testing.assert_close(normalise_layers(hidden_LND, "dataset", 0.25), hidden_LND.float() / 4)
    for how in ("none", "token"):
        assert torch.equal(normalise_layers(hidden_LND, how, 0.25), normalise_layers(hidden_LND, how))
    found_LND = normalise_layers(hidden_LND, "none")
    assert found_LND.dtype == torch.float32
    assert torch.equal(found_LND, hidden_LND.float())


def test_the_dataset_scale_makes_the_mean_norm_the_root_of_the_width() -> None:
    hidden_LND = hidden(seed=1)
    norms = [float(row.double().norm()) for row in hidden_LND.flatten(0, 1)]
    scale = dataset_scale(hidden_LND)
    assert scale == pytest.approx(D**0.5 / (sum(norms) / len(norms)), rel=1e-5)
    assert float((scale * hidden_LND.float()).norm(dim=2).mean()) == pytest.approx(D**0.5, rel=1e-5)


# --------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 49}, r"--k 49 is more than the SAE's 48 latents.*lower it"),
        ({"k": 0}, "k 0 is below 1"),
        ({"latents": 0}, "latents 0 is below 1"),
        ({"latents": 2.5}, "latents 2.5 is not"),
        ({"width": True}, "width True is not"),
        ({"routing": "firm"}, "--routing 'firm' is none of hard, soft"),
        ({"aggregate": "max"}, "--aggregate 'max' is none of sum, mean"),
        ({"normalize": "layer"}, "--normalize 'layer' is none of token, dataset, none"),
        ({"router": "best"}, "--router 'best' is none of published, top2, frozen, random"),
        ({"sparsity": -0.1}, "--sparsity -0.1 is below 0"),
        ({"sparsity": float("nan")}, "--sparsity nan is not"),
        ({"sparsity": "much"}, "--sparsity 'much' is not"),
        ({"pre_act_loss": float("inf")}, "--pre-act-loss inf is not"),
        ({"balance": -1.0}, "--balance -1 is below 0"),
        ({"prefixes": (4, 4, LATENTS)}, "--prefixes .* must rise and end with the SAE's 48 latents"),
        ({"prefixes": (LATENTS, 4)}, "must rise"),
        ({"prefixes": (4, 8)}, "must rise and end"),
        ({"prefixes": (0, LATENTS)}, "--prefixes 0 is below 1"),
        ({"layers": ()}, "layers"),
        ({"layers": (-1,)}, "layers"),
    ],
)
def test_an_impossible_recipe_is_refused_with_value_and_limit(change: dict[str, object], message: str) -> None:
    parts: dict[str, object] = {"sae": "topk", "layers": (4,), "width": D, "latents": LATENTS, "k": K}
    with pytest.raises(WrongInput, match=message):
        Recipe(**{**parts, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sae": "transcoder"}, "'transcoder' is none of vanilla, gated, topk"),
        ({"layers": (4, 5)}, "a topk reads one"),
        ({"sae": "routesae", "layers": (4, 5), "routed": "routesae"}, "--routed 'routesae' is none of vanilla"),
        ({"sae": "routesae", "layers": (4, 5), "routed": "crosscoder"}, "--routed 'crosscoder' is none of vanilla"),
    ],
)
def test_build_refuses_what_no_variant_can_be(change: dict[str, object], message: str) -> None:
    parts: dict[str, object] = {"sae": "topk", "layers": (4,), "width": D, "latents": LATENTS, "k": K}
    with pytest.raises(WrongInput, match=message):
        build(Recipe(**{**parts, **change}))  # type: ignore[arg-type]
