"""RouteSAE and its routers: the equations at the heads of their files, token by token in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from routesae.reporting import WrongInput
from routesae.tests.hidden import Normalised, normalise_layers
from routesae.train.saes import Forward, Recipe, RouteSAE, build
from routesae.train.saes.normalise import NormalisedLayers, places_of
from routesae.train.saes.routesae import balance_loss, hashed_layers
from routesae.train.saes.sae import CONTROLS, ROUTERS
from routesae.train.saes.single import SingleLayerSAE, geometric_median

L, N, D, LATENTS, K = 3, 40, 16, 48, 5
NONE_DEAD = torch.zeros(0, dtype=torch.int64)
VARIANTS = [(routing, aggregate) for routing in ("hard", "soft") for aggregate in ("sum", "mean")]


def normalised(seed: int = 0, tokens: int = N) -> Tensor:
    """From hidden states with a mean and a scale of their own in every layer and token."""
    generator = torch.Generator().manual_seed(seed)
    scales_LN1 = torch.rand(L, tokens, 1, generator=generator) * 20 + 0.1
    hidden_LND = torch.randn(L, tokens, D, generator=generator) * scales_LN1 + scales_LN1.flip(0)
    return normalise_layers(hidden_LND.half(), "token")


def routesae(**changes: Any) -> RouteSAE:
    """With a router ten times its initial size, so that tokens differ in where they go; biases that are not zero,
    and an encoder that is not the decoder."""
    recipe = Recipe(**{"sae": "routesae", "layers": (4, 6, 9), "width": D, "latents": LATENTS, "k": K, **changes})
    sae = build(recipe, torch.Generator().manual_seed(0))
    assert isinstance(sae, RouteSAE)
    with torch.no_grad():
        sae.router_LD.mul_(10)
        sae.shared.b_enc_F.copy_(torch.linspace(-1, 0.5, LATENTS))
        sae.shared.b_dec_D.copy_(torch.linspace(-0.5, 1, D))
        sae.shared.W_enc_FD.mul_(torch.linspace(0.5, 2, D))
    return sae


def routed_by_hand(sae: RouteSAE, x_LND: Tensor) -> tuple[Tensor, Tensor]:
    """w_NL and the routed input x_ND, in float64, a token at a time."""
    routing, inputs = [], []
    router_LD = sae.router_LD.detach().double()
    for n in range(x_LND.shape[1]):
        layers = [x_LND[layer, n].double() for layer in range(L)]
        gathered_D = torch.zeros(D, dtype=torch.float64)
        for x_D in layers:
            gathered_D = gathered_D + x_D
        if sae.recipe.aggregate == "mean":
            gathered_D = gathered_D / L
        scores = [float(router_LD[layer] @ gathered_D) for layer in range(L)]
        exp_L = torch.tensor(scores, dtype=torch.float64).exp()
        w = (exp_L / exp_L.sum()).tolist()
        if sae.recipe.routing == "soft":
            inputs.append(sum((w[layer] * layers[layer] for layer in range(L)), torch.zeros(D)))
        else:
            best = w.index(max(w))
            inputs.append(layers[best] * (w[best] if sae.recipe.router in ("published", "frozen") else 1))
        routing.append(w)
    return torch.tensor(routing, dtype=torch.float64), torch.stack(inputs)


def assert_is_autoencoded(shared: SingleLayerSAE, out: Forward, x_ND: Tensor) -> None:
    torch.testing.assert_close(out.x_ND.double(), x_ND, rtol=1e-4, atol=1e-4)
    weights = (shared.W_enc_FD, shared.b_enc_F, shared.W_dec_FD, shared.b_dec_D)
    W_enc_FD, b_enc_F, W_dec_FD, b_dec_D = (tensor.detach().double() for tensor in weights)
    f_NF = out.latents.dense()
    for n in range(len(x_ND)):
        z = (W_enc_FD @ (x_ND[n] - b_dec_D) + b_enc_F).tolist()
        active = {at: z[at] for at in sorted(range(LATENTS), key=lambda i, z=z: -z[i])[:K] if z[at] > 0}
        found = {at: f_NF[n, at].item() for at in f_NF[n].nonzero().flatten().tolist()}
        assert found == pytest.approx(active, rel=1e-3, abs=1e-4)
        reconstruction_D = b_dec_D.clone()
        for latent, value in active.items():
            reconstruction_D += value * W_dec_FD[latent]
        torch.testing.assert_close(out.reconstruction_ND[n].double(), reconstruction_D, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("routing", "aggregate"), VARIANTS)
def test_routesae_is_its_equations_token_by_token(routing: str, aggregate: str) -> None:
    sae, x_LND = routesae(routing=routing, aggregate=aggregate), normalised()
    w_NL, x_ND = routed_by_hand(sae, x_LND)
    assert len(set(w_NL.argmax(1).tolist())) == L  # every layer is some token's
    out = sae(Normalised(x_LND))
    assert out.routing_NL is not None
    torch.testing.assert_close(out.routing_NL.double(), w_NL, rtol=1e-3, atol=1e-4)
    assert_is_autoencoded(sae.shared, out, x_ND)


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "random"])
def test_in_use_every_router_reads_the_likeliest_layer_and_only_published_ones_scale_it(router: str) -> None:
    sae, x_LND = routesae(router=router).eval(), normalised()
    w_NL, x_ND = routed_by_hand(sae, x_LND)
    out = sae(Normalised(x_LND))
    assert out.weights_N is None
    assert_is_autoencoded(sae.shared, out, x_ND)
    routes = sae.routes(Normalised(x_LND))
    for n in range(N):
        w = w_NL[n].tolist()
        assert routes.at_R[n] == w.index(max(w))
        expected = max(w) if router in ("published", "frozen") else 1.0
        assert (1.0 if routes.scale_R is None else float(routes.scale_R[n])) == pytest.approx(expected, rel=1e-4)


def test_sum_and_mean_differ_by_the_number_of_layers_before_the_softmax() -> None:
    summed, averaged, x_LND = routesae(aggregate="sum"), routesae(aggregate="mean"), normalised()
    with torch.no_grad():
        averaged.router_LD.mul_(L)
    torch.testing.assert_close(summed.routing(Normalised(x_LND)), averaged.routing(Normalised(x_LND)))
    with torch.no_grad():
        averaged.router_LD.div_(L)
    assert (summed.routing(Normalised(x_LND)) - averaged.routing(Normalised(x_LND))).abs().max() > 0.01


def test_the_gradient_of_soft_routing_equals_plain_autograds() -> None:
    hidden_LND = torch.randn(L, N, D, generator=torch.Generator().manual_seed(2)) * 7 + 3
    mean_LN1, std_LN1 = hidden_LND.mean(2, keepdim=True), hidden_LND.std(2, keepdim=True)
    x_LND = (hidden_LND.double() - mean_LN1) / std_LN1
    w_NL = torch.rand(N, L, generator=torch.Generator().manual_seed(1), requires_grad=True)
    g_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(3))
    exact_NL = w_NL.detach().double().requires_grad_()
    expected_ND = torch.einsum("nl,lnd->nd", exact_NL, x_LND)
    (expected_NL,) = torch.autograd.grad(expected_ND, exact_NL, g_ND.double())
    for x in (NormalisedLayers(hidden_LND, mean_LN1, std_LN1), NormalisedLayers(x_LND.float())):
        found_ND = x.weighted(w_NL)
        torch.testing.assert_close(found_ND.double(), expected_ND.detach(), rtol=1e-5, atol=1e-5)
        (found_NL,) = torch.autograd.grad(found_ND, w_NL, g_ND)
        torch.testing.assert_close(found_NL.double(), expected_NL, rtol=1e-5, atol=1e-5)


def test_the_generator_fixes_the_routers_weights() -> None:
    recipe = Recipe(sae="routesae", layers=(4, 6, 9), width=D, latents=LATENTS, k=K)
    first, again, other = (build(recipe, torch.Generator().manual_seed(seed)).state_dict() for seed in (3, 3, 4))
    assert torch.equal(first["router_LD"], again["router_LD"])
    assert not torch.equal(first["router_LD"], other["router_LD"])
    assert first["router_LD"].abs().max() <= D**-0.5  # a linear layer's


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_routesae_initialises_on_the_routed_inputs(routing: str) -> None:
    sae, sample_LND = routesae(routing=routing), normalised()
    _, x_ND = routed_by_hand(sae, sample_LND)
    sae.initialise(Normalised(sample_LND))
    torch.testing.assert_close(sae.shared.b_dec_D.detach().double(), geometric_median(x_ND), rtol=1e-2, atol=1e-3)


def test_the_shared_sae_uses_the_k_that_the_trainer_set() -> None:
    sae = routesae()
    sae.k = 2
    assert (sae(Normalised(normalised())).latents.dense() > 0).sum(1).max() == 2


def test_forward_leaves_its_input_as_it_was() -> None:
    for changes in [*({"router": router} for router in ROUTERS), {"routing": "soft"}]:
        x_LND = normalised()
        before_LND = x_LND.clone()
        routesae(**changes)(Normalised(x_LND))
        assert torch.equal(x_LND, before_LND)


# ----------------------------------------------------------------------------------------------------- top2


def shares_by_autograd(sae: RouteSAE, W: dict[str, Tensor], x_ND: Tensor) -> Tensor:
    """[N]: ‖x − x̂‖²/‖x‖² under the shared topk, in plain, dense autograd."""
    z_NF = (x_ND - W["shared.b_dec_D"]) @ W["shared.W_enc_FD"].T + W["shared.b_enc_F"]
    best = torch.topk(z_NF, K, dim=1)
    f_NF = torch.zeros_like(z_NF).scatter(1, best.indices, best.values.relu())
    reconstruction_ND = f_NF @ W["shared.W_dec_FD"] + W["shared.b_dec_D"]
    return (x_ND - reconstruction_ND).square().sum(1) / x_ND.square().sum(1)


def leaves(sae: RouteSAE) -> dict[str, Tensor]:
    return {name: parameter.detach().double().requires_grad_() for name, parameter in sae.named_parameters()}


def assert_gradients_are(sae: RouteSAE, W: dict[str, Tensor], *, router: float) -> None:
    """To 1e-5 of each gradient's norm; the router's, a difference of nearly equal parts, to `router`."""
    for name, parameter in sae.named_parameters():
        expected = W[name].grad
        assert expected is not None, name
        assert parameter.grad is not None, name
        assert expected.abs().max() > 1e-5, name
        error = float((parameter.grad.double() - expected).norm() / expected.norm())
        assert error < (router if name == "router_LD" else 1e-5), f"{name}: {error}"


def test_top2_reads_each_token_at_its_two_likeliest_layers_with_weights_that_sum_to_one() -> None:
    w_NL = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    read = routesae(router="top2")._routes(w_NL, training=True)
    assert read.token_R.tolist() == [0, 0, 1, 1]
    assert read.at_R.tolist() == [1, 2, 0, 2]
    assert read.scale_R is None
    assert read.weights_R is not None
    assert read.weights_R.tolist() == pytest.approx([0.5 / 0.8 / 2, 0.3 / 0.8 / 2, 0.6 / 0.9 / 2, 0.3 / 0.9 / 2])
    assert float(read.weights_R.sum()) == pytest.approx(1)
    in_use = routesae(router="top2")._routes(w_NL, training=False)
    assert in_use.at_R.tolist() == [1, 0]
    assert in_use.weights_R is None
    assert (
        routesae(router="top2")._routes(torch.ones(4, 1), training=True).at_R.tolist() == [0] * 4
    )  # one layer has no second


@pytest.mark.usefixtures("float32_path")
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_top2s_loss_and_gradients_are_those_of_the_expected_loss_over_the_two(aggregate: str) -> None:
    sae, x_LND = routesae(router="top2", aggregate=aggregate), normalised()
    W, x = leaves(sae), x_LND.double()
    gathered_ND = x.sum(0) if aggregate == "sum" else x.mean(0)
    w_NL = torch.softmax(gathered_ND @ W["router_LD"].T, 1)
    expected = torch.zeros((), dtype=torch.float64)
    shares_LN = torch.stack([shares_by_autograd(sae, W, x[layer]) for layer in range(L)])
    for n in range(N):
        first, second = sorted(range(L), key=lambda layer, n=n: -w_NL[n, layer].item())[:2]
        both = w_NL[n, first] * shares_LN[first, n] + w_NL[n, second] * shares_LN[second, n]
        expected = expected + both / (w_NL[n, first] + w_NL[n, second]) / N
    expected.backward()
    out = sae(Normalised(x_LND))
    assert len(out.x_ND) == 2 * N
    objective = sae.loss(out, NONE_DEAD)
    objective.total.backward()
    assert objective.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.norm_mse.item() == objective.total.item()
    assert_gradients_are(sae, W, router=1e-3)


# ------------------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("router", ROUTERS)
def test_only_the_controls_do_not_learn(router: str) -> None:
    sae = routesae(router=router)
    assert sae.router_LD.requires_grad == (router not in CONTROLS) == (router not in ("frozen", "random"))
    out = sae(Normalised(normalised()))
    sae.loss(out, NONE_DEAD).total.backward()
    assert (sae.router_LD.grad is not None) == sae.router_LD.requires_grad
    assert sae.shared.W_enc_FD.grad is not None


def test_the_random_router_spreads_tokens_evenly_by_their_ids_and_positions_and_nothing_else() -> None:
    sae, x_LND = routesae(router="random").eval(), normalised(tokens=6000)
    place_N = places_of(torch.arange(6000) % 50, torch.arange(6000) // 50)
    used = sae(Normalised(x_LND, place_N=place_N))
    assert used.routing_NL is not None
    assert used.routing_NL.sum(1).unique().tolist() == [1]
    assert used.routing_NL.mean(0).tolist() == pytest.approx([1 / L] * L, abs=0.03)  # five standard deviations
    at_N = used.routing_NL.argmax(1)
    assert torch.equal(used.x_ND, x_LND[at_N, torch.arange(6000)])  # unscaled
    # Tokens of neighbouring ids or positions are apart as often as any two.
    by_position = at_N.view(120, 50)
    for apart in (by_position[1:] != by_position[:-1], by_position[:, 1:] != by_position[:, :-1]):
        assert float(apart.float().mean()) == pytest.approx(1 - 1 / L, abs=0.03)
    # Other hidden states, another batch, another order: the same layers.
    other = Normalised(torch.randn(L, 37, D), place_N=place_N[100:137].flip(0))
    assert torch.equal(sae.routes(other).at_R, at_N[100:137].flip(0))
    with pytest.raises(WrongInput, match="random goes by each token's id and position"):
        sae(Normalised(x_LND))


def test_the_random_router_draws_evenly_in_training_and_again_what_the_seed_says() -> None:
    sae, x_LND = routesae(router="random"), normalised(tokens=6000)
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        routing_NL = sae(Normalised(x_LND)).routing_NL
        assert routing_NL is not None
        assert routing_NL.mean(0).tolist() == pytest.approx([1 / L] * L, abs=0.03)
        drawn.append(routing_NL)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_hashed_layers_are_layers_for_any_place() -> None:
    extreme_N = torch.tensor([0, 1, 2**31 - 1, 2**32, 2**63 - 1, -1])
    assert set(hashed_layers(extreme_N, 4).tolist()) <= {0, 1, 2, 3}


# -------------------------------------------------------------------------------------------------- balance


def test_the_balance_loss_is_1_when_even_and_the_number_of_layers_when_collapsed() -> None:
    even_NL, at_N = torch.full((12, 4), 0.25), torch.arange(12) % 4
    assert float(balance_loss(even_NL, at_N)) == pytest.approx(1)
    collapsed_NL = torch.nn.functional.one_hot(torch.full((12,), 2), 4).float()
    assert float(balance_loss(collapsed_NL, torch.full((12,), 2))) == pytest.approx(4)


@pytest.mark.parametrize("router", ["published", "top2"])
def test_balance_adds_its_weight_times_layers_times_shares_by_mean_probabilities(router: str) -> None:
    plain, balanced, x_LND = routesae(router=router), routesae(router=router, balance=0.7), normalised()
    out = balanced(Normalised(x_LND))
    w_NL = out.routing_NL
    assert w_NL is not None
    reads = w_NL.topk(2 if router == "top2" else 1, dim=1).indices.flatten().tolist()
    term = L * sum(reads.count(at) / len(reads) * w_NL[:, at].mean().item() for at in range(L))
    difference = (
        balanced.loss(out, NONE_DEAD).total.item() - plain.loss(plain(Normalised(x_LND)), NONE_DEAD).total.item()
    )
    assert difference == pytest.approx(0.7 * term, rel=1e-4)
    balanced.eval()
    plain.eval()
    in_use = [sae.loss(sae(Normalised(x_LND)), NONE_DEAD).total.item() for sae in (balanced, plain)]
    assert in_use[0] == in_use[1]
