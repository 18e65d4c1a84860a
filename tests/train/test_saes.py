"""The SAE variants and their normalisation: the equations at the heads of their files, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from routesae.reporting import WrongInput
from routesae.train.losses import AUXK_WEIGHT, auxk
from routesae.train.saes import Forward, Recipe, RouteSAE, TopK
from routesae.train.saes.normalise import geometric_median, normalise

L, N, D, LATENTS, K = 3, 40, 16, 48, 5
NONE_DEAD = torch.zeros(LATENTS, dtype=torch.bool)
VARIANTS = [(routing, aggregate) for routing in ("hard", "soft") for aggregate in ("sum", "mean")]


def hidden(seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    """Hidden states with a mean and a scale of their own in every layer and token."""
    generator = torch.Generator().manual_seed(seed)
    scales_LN1 = torch.rand(L, N, 1, generator=generator) * 20 + 0.1
    return (torch.randn(L, N, D, generator=generator) * scales_LN1 + scales_LN1.flip(0)).to(dtype)


def topk(seed: int = 0) -> TopK:
    recipe = Recipe(sae="topk", layers=(4,), width=D, latents=LATENTS, k=K)
    return TopK(recipe, torch.Generator().manual_seed(seed))


def routesae(routing: str, aggregate: str = "sum", seed: int = 0) -> RouteSAE:
    """With a router ten times its initial size, so that tokens differ in where they go."""
    layers = (4, 6, 9)
    recipe = Recipe(
        sae="routesae", layers=layers, width=D, latents=LATENTS, k=K, routing=routing, aggregate=aggregate
    )
    sae = RouteSAE(recipe, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        sae.router_LD.mul_(10)
    return sae


def normalised_by_hand(hidden_D: Tensor) -> Tensor:
    values = [float(value) for value in hidden_D]
    mean = sum(values) / len(values)
    std = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return torch.tensor([(value - mean) / (std + 1e-6) for value in values], dtype=torch.float64)


# -------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_normalise_is_the_equation_token_by_token(dtype: torch.dtype) -> None:
    hidden_ND = hidden(dtype=dtype)[0]
    x_ND = normalise(hidden_ND).x_ND
    assert x_ND.dtype == torch.float32
    for n in range(N):
        torch.testing.assert_close(x_ND[n].double(), normalised_by_hand(hidden_ND[n]), rtol=1e-5, atol=1e-5)


def test_normalised_tokens_have_zero_mean_and_unit_unbiased_std() -> None:
    x_ND = normalise(hidden()[1]).x_ND.double()
    assert x_ND.mean(1).abs().max() < 1e-6
    assert (x_ND.square().sum(1) / (D - 1) - 1).abs().max() < 1e-4


def test_normalise_survives_what_overflows_float16_when_squared() -> None:
    hidden_ND = torch.full((1, D), 30_000.0, dtype=torch.float16)
    hidden_ND[0, 0] = -60_000
    x_ND = normalise(hidden_ND).x_ND
    torch.testing.assert_close(x_ND[0].double(), normalised_by_hand(hidden_ND[0]), rtol=1e-5, atol=1e-5)


def test_a_constant_token_normalises_to_zero() -> None:
    assert normalise(torch.full((2, D), 3.0, dtype=torch.float16)).x_ND.count_nonzero() == 0


def test_undo_takes_the_normalised_back_to_what_was_stored() -> None:
    hidden_ND = hidden()[2]
    normalised = normalise(hidden_ND)
    undone_ND = normalised.undo(normalised.x_ND)
    torch.testing.assert_close(undone_ND, hidden_ND.float(), rtol=1e-6, atol=1e-4)
    assert torch.equal(undone_ND.half(), hidden_ND)


def test_undo_of_a_reconstruction_is_in_the_models_scale() -> None:
    hidden_ND = hidden()[2].double()
    undone_ND = normalise(hidden_ND).undo(torch.full((N, D), 2.0))
    expected_N = hidden_ND.mean(1) + 2 * (hidden_ND.std(1) + 1e-6)
    torch.testing.assert_close(undone_ND.double(), expected_N[:, None].expand(N, D), rtol=1e-5, atol=1e-4)


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


# ----------------------------------------------------------------------------------------------------- topk


@pytest.mark.parametrize("name", ["topk", "routesae"])
def test_an_sae_starts_with_unit_rows_and_the_encoder_as_the_decoders_transpose(name: str) -> None:
    sae = topk() if name == "topk" else routesae("hard").shared
    assert sae.W_dec_FD.shape == (LATENTS, D)
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=1), torch.ones(LATENTS))
    assert torch.equal(sae.W_enc_FD, sae.W_dec_FD)
    assert sae.W_enc_FD.data_ptr() != sae.W_dec_FD.data_ptr()
    assert sae.b_enc_F.count_nonzero() == 0


def test_the_generator_fixes_the_weights() -> None:
    assert torch.equal(topk(3).W_dec_FD, topk(3).W_dec_FD)
    assert not torch.equal(topk(3).W_dec_FD, topk(4).W_dec_FD)
    assert torch.equal(routesae("hard", seed=3).router_LD, routesae("hard", seed=3).router_LD)


def autoencoded_by_hand(sae: TopK, x_D: Tensor) -> tuple[dict[int, float], Tensor]:
    """The active latents of one token and its reconstruction."""
    W_enc_FD, W_dec_FD = sae.W_enc_FD.detach().double(), sae.W_dec_FD.detach().double()
    b_enc_F, b_dec_D = sae.b_enc_F.detach().double(), sae.b_dec_D.detach().double()
    z = [float(W_enc_FD[latent] @ (x_D - b_dec_D) + b_enc_F[latent]) for latent in range(LATENTS)]
    active = {latent: z[latent] for latent in sorted(range(LATENTS), key=lambda i: -z[i])[:K] if z[latent] > 0}
    reconstruction_D = b_dec_D.clone()
    for latent, value in active.items():
        reconstruction_D += value * W_dec_FD[latent]
    return active, reconstruction_D


def assert_is_autoencoded(sae: TopK, out: Forward, x_ND: Tensor) -> None:
    torch.testing.assert_close(out.x_ND.double(), x_ND, rtol=1e-4, atol=1e-4)
    for n in range(N):
        active, reconstruction_D = autoencoded_by_hand(sae, x_ND[n])
        pairs = zip(out.latents.indices_NK[n].tolist(), out.latents.values_NK[n].tolist(), strict=True)
        assert {latent: value for latent, value in pairs if value > 0} == pytest.approx(active, rel=1e-3, abs=1e-4)
        torch.testing.assert_close(out.reconstruction_ND[n].double(), reconstruction_D, rtol=1e-4, atol=1e-4)


def perturb(sae: TopK) -> None:
    """Biases that are not zero, and an encoder that is not the decoder."""
    with torch.no_grad():
        sae.b_enc_F.copy_(torch.linspace(-1, 0.5, LATENTS))
        sae.b_dec_D.copy_(torch.linspace(-0.5, 1, D))
        sae.W_enc_FD.mul_(torch.linspace(0.5, 2, D))


def test_topk_is_its_equations_token_by_token() -> None:
    sae = topk()
    perturb(sae)
    hidden_LND = hidden()[1:2]
    out = sae(hidden_LND)
    assert out.latents.values_NK.shape == out.latents.indices_NK.shape == (N, K)
    assert out.routing_NL is None
    assert_is_autoencoded(sae, out, torch.stack([normalised_by_hand(row) for row in hidden_LND[0]]))


def test_encode_and_decode_are_the_two_halves_of_forward() -> None:
    sae = topk()
    perturb(sae)
    out = sae(hidden()[:1])
    latents = sae.encode(out.x_ND)
    assert torch.equal(latents.values_NK, out.latents.values_NK)
    assert torch.equal(latents.indices_NK, out.latents.indices_NK)
    assert torch.equal(sae.decode(latents), out.reconstruction_ND)
    assert not sae.decode(latents).requires_grad


@pytest.mark.parametrize("name", ["topk", "hard", "soft"])
def test_the_loss_is_norm_mse_to_the_saes_own_input_plus_weighted_auxk(name: str) -> None:
    sae = topk() if name == "topk" else routesae(name)
    shared = sae if isinstance(sae, TopK) else sae.shared
    out = sae(hidden()[: len(sae.recipe.layers)])
    dead_F = NONE_DEAD.clone()
    dead_F[:10] = True
    error = ((out.x_ND - out.reconstruction_ND).square().sum(1) / out.x_ND.square().sum(1)).mean()
    assert sae.loss(out, NONE_DEAD).item() == pytest.approx(error.item(), rel=1e-5)
    weights = (shared.W_enc_FD, shared.b_enc_F, shared.W_dec_FD, shared.b_dec_D)
    extra = auxk(out.x_ND, out.reconstruction_ND, *weights, dead_F).item()
    assert extra > 0
    assert sae.loss(out, dead_F).item() == pytest.approx(error.item() + AUXK_WEIGHT * extra, rel=1e-5)


@pytest.mark.parametrize("name", ["topk", "hard", "soft"])
def test_training_steps_keep_the_decoder_at_unit_norm_and_its_gradient_orthogonal(name: str) -> None:
    sae = topk() if name == "topk" else routesae(name)
    shared = sae if isinstance(sae, TopK) else sae.shared
    adam = torch.optim.Adam(sae.parameters(), lr=0.05)
    start_FD = shared.W_dec_FD.detach().clone()
    for seed in range(5):
        sae.loss(sae(hidden(seed)[: len(sae.recipe.layers)]), NONE_DEAD).backward()  # type: ignore[no-untyped-call]
        grad_FD = shared.W_dec_FD.grad
        assert grad_FD is not None
        raw_FD = grad_FD.clone()
        sae.project_gradient()
        along_F = (grad_FD * shared.W_dec_FD.detach()).sum(1)
        assert along_F.abs().max() < 1e-6 * max(1, raw_FD.norm(dim=1).max())
        assert (raw_FD * shared.W_dec_FD.detach()).sum(1).abs().max() > 1e-4  # there was something to take out
        removed_FD = raw_FD - grad_FD  # all of it along the rows
        across_FD = removed_FD - (removed_FD * shared.W_dec_FD).sum(1, keepdim=True) * shared.W_dec_FD
        assert across_FD.abs().max() < 1e-6
        adam.step()
        assert (shared.W_dec_FD.norm(dim=1) - 1).abs().max() > 1e-3  # the step alone leaves the sphere
        sae.normalise_decoder()
        adam.zero_grad()
        torch.testing.assert_close(shared.W_dec_FD.norm(dim=1), torch.ones(LATENTS), rtol=0, atol=1e-6)
    assert (shared.W_dec_FD - start_FD).abs().max() > 0.01


def test_initialise_puts_the_decoder_bias_at_the_median_of_the_normalised_sample() -> None:
    sae = topk()
    sample_LND = hidden()[:1]
    sae.initialise(sample_LND)
    x_ND = torch.stack([normalised_by_hand(row) for row in sample_LND[0]])
    nearby = [(x_ND - (sae.b_dec_D.detach() + step)).norm(dim=1).sum() for step in (0.0, 0.05, -0.05)]
    assert nearby[0] < min(nearby[1:])
    torch.testing.assert_close(sae.b_dec_D.detach().double(), geometric_median(x_ND), rtol=1e-3, atol=1e-3)
    assert sae.b_enc_F.count_nonzero() == 0


# ------------------------------------------------------------------------------------------------- routesae


def routed_by_hand(sae: RouteSAE, hidden_LND: Tensor) -> tuple[Tensor, Tensor]:
    """w_NL and the routed input x_ND, in float64, a token at a time."""
    routing, inputs = [], []
    router_LD = sae.router_LD.detach().double()
    for n in range(N):
        layers = [normalised_by_hand(hidden_LND[layer, n]) for layer in range(L)]
        gathered_D = torch.zeros(D, dtype=torch.float64)
        for x_D in layers:
            gathered_D = gathered_D + x_D
        if sae.recipe.aggregate == "mean":
            gathered_D = gathered_D / L
        scores = [float(router_LD[layer] @ gathered_D) for layer in range(L)]
        exp_L = torch.tensor(scores, dtype=torch.float64).exp()
        w = (exp_L / exp_L.sum()).tolist()
        if sae.recipe.routing == "hard":
            best = w.index(max(w))
            inputs.append(w[best] * layers[best])
        else:
            inputs.append(sum((w[layer] * layers[layer] for layer in range(L)), torch.zeros(D)))
        routing.append(w)
    return torch.tensor(routing, dtype=torch.float64), torch.stack(inputs)


@pytest.mark.parametrize(("routing", "aggregate"), VARIANTS)
def test_routesae_is_its_equations_token_by_token(routing: str, aggregate: str) -> None:
    sae = routesae(routing, aggregate)
    perturb(sae.shared)
    hidden_LND = hidden()
    w_NL, x_ND = routed_by_hand(sae, hidden_LND)
    assert len(set(w_NL.argmax(1).tolist())) == L  # every layer is some token's
    out = sae(hidden_LND)
    assert out.routing_NL is not None
    torch.testing.assert_close(out.routing_NL.double(), w_NL, rtol=1e-3, atol=1e-4)
    assert_is_autoencoded(sae.shared, out, x_ND)


def test_routes_are_the_layer_of_the_largest_weight_and_that_weight() -> None:
    sae = routesae("hard")
    w_NL = sae.routing(hidden()).detach()
    routes = sae.routes(w_NL)
    for n in range(N):
        w = w_NL[n].tolist()
        assert routes.at_N[n] == w.index(max(w))
        assert routes.scale_N[n] == max(w)


def test_sum_and_mean_differ_by_the_number_of_layers_before_the_softmax() -> None:
    summed, averaged = routesae("hard", "sum"), routesae("hard", "mean")
    hidden_LND = hidden()
    with torch.no_grad():
        averaged.router_LD.mul_(L)
    torch.testing.assert_close(summed.routing(hidden_LND), averaged.routing(hidden_LND))
    with torch.no_grad():
        averaged.router_LD.div_(L)
    assert (summed.routing(hidden_LND) - averaged.routing(hidden_LND)).abs().max() > 0.01


def loss_by_autograd(sae: RouteSAE, hidden_LND: Tensor, router_LD: Tensor, double: bool) -> Tensor:
    """The whole of RouteSAE in plain, dense autograd."""
    dtype = torch.float64 if double else torch.float32
    h_LND = hidden_LND.to(dtype)
    x_LND = (h_LND - h_LND.mean(2, keepdim=True)) / (h_LND.std(2, keepdim=True) + 1e-6)
    gathered_ND = x_LND.sum(0) if sae.recipe.aggregate == "sum" else x_LND.mean(0)
    w_NL = torch.softmax(gathered_ND @ router_LD.T, 1)
    if sae.recipe.routing == "hard":
        chosen_LN1 = torch.nn.functional.one_hot(w_NL.argmax(1), L).T[:, :, None]
        x_ND = (chosen_LN1 * w_NL.T[:, :, None] * x_LND).sum(0)
    else:
        x_ND = (w_NL.T[:, :, None] * x_LND).sum(0)
    W_enc_FD, W_dec_FD, b_enc_F, b_dec_D = (
        tensor.detach().to(dtype)
        for tensor in (sae.shared.W_enc_FD, sae.shared.W_dec_FD, sae.shared.b_enc_F, sae.shared.b_dec_D)
    )
    z_NF = (x_ND - b_dec_D) @ W_enc_FD.T + b_enc_F
    best = torch.topk(z_NF, K, dim=1)
    f_NF = torch.zeros_like(z_NF).scatter(1, best.indices, best.values.relu())
    reconstruction_ND = f_NF @ W_dec_FD + b_dec_D
    return ((x_ND - reconstruction_ND).square().sum(1) / x_ND.square().sum(1)).mean()


@pytest.mark.parametrize(("routing", "aggregate"), VARIANTS)
def test_the_routers_gradient_is_that_of_plain_autograd(routing: str, aggregate: str) -> None:
    sae = routesae(routing, aggregate)
    perturb(sae.shared)
    hidden_LND = hidden(2)
    router_LD = sae.router_LD.detach().double().requires_grad_()
    expected = loss_by_autograd(sae, hidden_LND, router_LD, double=True)
    expected.backward()  # type: ignore[no-untyped-call]
    loss = sae.loss(sae(hidden_LND), NONE_DEAD)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert sae.router_LD.grad is not None
    assert router_LD.grad is not None
    scale = float(router_LD.grad.abs().max())
    assert scale > 1e-4
    torch.testing.assert_close(sae.router_LD.grad.double(), router_LD.grad, rtol=1e-3, atol=1e-3 * scale)


def test_the_gradient_of_soft_routing_equals_finite_differences() -> None:
    sae, hidden_LND = routesae("soft"), hidden()
    w_NL = torch.rand(N, L, generator=torch.Generator().manual_seed(1), requires_grad=True)
    g_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    (sae._routed(hidden_LND, w_NL) * g_ND).sum().backward()
    assert w_NL.grad is not None
    for n, layer in ((0, 0), (0, 2), (17, 1), (39, 2)):
        step_NL = torch.zeros(N, L)
        step_NL[n, layer] = 0.5  # the function is linear in w, so a large step is exact
        up_ND, down_ND = (sae._routed(hidden_LND, w_NL.detach() + sign * step_NL) for sign in (1, -1))
        slope = float(((up_ND - down_ND) * g_ND)[n].sum())
        assert float(w_NL.grad[n, layer]) == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_routesae_initialises_on_the_routed_inputs(routing: str) -> None:
    sae = routesae(routing)
    sample_LND = hidden()
    _, x_ND = routed_by_hand(sae, sample_LND)
    sae.initialise(sample_LND)
    torch.testing.assert_close(sae.shared.b_dec_D.detach().double(), geometric_median(x_ND), rtol=1e-2, atol=1e-3)


def test_forward_leaves_the_hidden_states_as_they_were() -> None:
    hidden_LND = hidden(dtype=torch.float32)
    before_LND = hidden_LND.clone()
    for routing, aggregate in VARIANTS:
        routesae(routing, aggregate)(hidden_LND)
    topk()(hidden_LND[:1])
    assert torch.equal(hidden_LND, before_LND)


# --------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 49}, r"--k 49 is more than the SAE's 48 latents.*lower it"),
        ({"k": 0}, "k 0 is not"),
        ({"latents": 0}, "latents 0 is not"),
        ({"latents": 2.5}, "latents 2.5 is not"),
        ({"width": True}, "width True is not"),
        ({"routing": "firm"}, "--routing 'firm' is none of hard, soft"),
        ({"aggregate": "max"}, "--aggregate 'max' is none of sum, mean"),
    ],
)
def test_an_impossible_recipe_is_refused_with_value_and_limit(change: dict[str, object], message: str) -> None:
    parts: dict[str, object] = {"sae": "topk", "layers": (4,), "width": D, "latents": LATENTS, "k": K}
    with pytest.raises(WrongInput, match=message):
        Recipe(**{**parts, **change})  # type: ignore[arg-type]
