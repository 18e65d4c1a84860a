"""The variants over one layer, alone and shared by a routesae: the equations at the heads of their files, a token at
a time in float64 and plain autograd, in values, losses and gradients. And the published recipe, from its own code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from routesae.tests.hidden import Normalised, normalise_layers
from routesae.train.losses import AUXK_WEIGHT, squared_error_shares
from routesae.train.saes import SAE, SAES, SINGLE_LAYER, Recipe, RouteSAE, SingleLayerSAE, build
from routesae.train.saes.batchtopk import BatchTopK
from routesae.train.saes.hierarchical import halvings
from routesae.train.saes.matryoshka import default_prefixes
from routesae.train.saes.single import geometric_median

L, N, D, LATENTS, K = 3, 24, 10, 32, 4
DEAD = torch.arange(7)
NONE_DEAD = DEAD[:0]
# Each with a fixed λ where it has one: steering is tested by itself.
CASES: dict[str, dict[str, Any]] = {
    "vanilla": {"sae": "vanilla", "sparsity": 0.02},
    "gated": {"sae": "gated", "sparsity": 0.02},
    "topk": {"sae": "topk"},
    "batchtopk": {"sae": "batchtopk"},
    "matryoshka": {"sae": "matryoshka", "prefixes": (4, 9, LATENTS)},
    "hierarchical": {"sae": "hierarchical"},
    "jumprelu target": {"sae": "jumprelu"},
    "jumprelu lambda": {"sae": "jumprelu", "sparsity": 0.01},
    "jumprelu pre-act": {"sae": "jumprelu", "pre_act_loss": 0.03},
    "vanilla published": {"sae": "vanilla", "sparsity": 0.5, "published": True},
    "gated published": {"sae": "gated", "sparsity": 0.5, "published": True},
    "topk published": {"sae": "topk", "published": True},
    "jumprelu published": {"sae": "jumprelu", "sparsity": 0.01, "published": True},
}


def make(case: str, **changes: Any) -> SingleLayerSAE:
    """With weights that are special in nothing: no bias is zero, no row has unit norm, no encoder is a transpose."""
    recipe = Recipe(**{"layers": (4,), "width": D, "latents": LATENTS, "k": K, **CASES[case], **changes})
    sae = build(recipe, torch.Generator().manual_seed(0))
    assert isinstance(sae, SingleLayerSAE)
    perturb(sae)
    return sae


def perturb(sae: SingleLayerSAE) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise)
            if name == "threshold_F":
                parameter.copy_(noise.abs() * 0.5 + 0.05)
        if hasattr(sae, "bandwidth"):
            sae.bandwidth = 0.8  # wide enough that many z are near their threshold


def hidden(layers: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales_LN1 = torch.rand(layers, N, 1, generator=generator) * 20 + 0.1
    return torch.randn(layers, N, D, generator=generator) * scales_LN1 + scales_LN1.flip(1)


def normalised(layers: int = 1, seed: int = 0) -> Tensor:
    return normalise_layers(hidden(layers, seed), "token")


# ------------------------------------------------------------------------------------------------ equations


class Expected(NamedTuple):
    loss: Tensor
    f_NF: Tensor
    reconstruction_ND: Tensor


def share(x_D: Tensor, reconstruction_D: Tensor) -> Tensor:
    return ((x_D - reconstruction_D) ** 2).sum() / ((x_D**2).sum() + 1e-8)


def estimated(indicator_F: Tensor, near: Tensor, slope: Tensor | float, theta: Tensor) -> Tensor:
    """indicator_F in value; its gradient to θ is slope·1[near], an estimate written with no autograd.Function."""
    return indicator_F.detach() + (slope * near.double()) * (theta - theta.detach())


def expected_of(sae: SingleLayerSAE, W: dict[str, Tensor], x_ND: Tensor, dead_d: Tensor) -> Expected:
    """The training loss by the docstring of the variant's file, a token at a time."""
    recipe, n, kind = sae.recipe, len(x_ND), sae.recipe.sae
    lam, k = recipe.sparsity, sae.k
    W_enc, W_dec, b_dec = W["W_enc_FD"], W["W_dec_FD"], W["b_dec_D"]
    gate_bias = W["b_gate_F"] if kind == "gated" else None
    z = [W_enc @ (x_D - b_dec) + (0 if kind == "gated" else W["b_enc_F"]) for x_D in x_ND]
    norms_F = (W_dec**2).sum(1).sqrt()
    f, terms = [], []  # terms: what a token adds to the loss beside its NormMSE
    if kind in ("batchtopk", "matryoshka"):
        ranked = sorted((-z[t][i].item(), t, i) for t in range(n) for i in range(LATENTS))[: k * n]
        chosen = {(t, i) for value, t, i in ranked if value < 0}
        f = [torch.stack([z[t][i] if (t, i) in chosen else z[t][i] * 0 for i in range(LATENTS)]) for t in range(n)]
    l0 = []
    for t in range(n):
        if kind == "vanilla":
            f.append(z[t].clamp(min=0))
            terms.append(lam * (f[t].mean() if recipe.published else (f[t] * norms_F).sum()))
        elif kind in ("topk", "hierarchical"):
            best = set(sorted(range(LATENTS), key=lambda i, t=t: -z[t][i].item())[:k])
            f.append(torch.stack([z[t][i].clamp(min=0) if i in best else z[t][i] * 0 for i in range(LATENTS)]))
        elif kind == "gated":
            assert gate_bias is not None
            pi = z[t] + gate_bias
            magnitude = (W["r_mag_F"].exp() * z[t] + W["b_mag_F"]).clamp(min=0)
            f.append((pi > 0).double() * magnitude)
            if recipe.published:
                terms.append(lam * f[t].mean())
            else:
                by_gate_D = pi.clamp(min=0) @ W_dec.detach() + b_dec.detach()
                terms.append(lam * pi.clamp(min=0).sum() + share(x_ND[t], by_gate_D))
        elif kind == "jumprelu":
            theta, epsilon = W["threshold_F"], sae.bandwidth
            above, near = (z[t] > theta).double(), (z[t] - theta).abs() < epsilon / 2
            f.append(z[t] * above + estimated(0 * above, near, -theta.detach() / epsilon, theta))
            looked_at = f[t] if recipe.published else z[t]
            near = (looked_at - theta).abs() < epsilon / 2
            l0.append(estimated((looked_at > theta).double(), near, -1 / epsilon, theta).sum())
            if recipe.pre_act_loss:
                short = (theta - z[t]).clamp(min=0) * norms_F
                terms.append(recipe.pre_act_loss * short[dead_d].sum())
    reconstructions = [f_F @ W_dec + b_dec for f_F in f]
    loss = sum(share(x_D, rec_D) for x_D, rec_D in zip(x_ND, reconstructions, strict=True)) / n
    if terms:
        loss = loss + sum(terms) / n
    if kind == "jumprelu":
        mean_l0 = sum(l0) / n
        loss = loss + ((mean_l0 / k - 1) ** 2 if lam is None else lam * mean_l0)
    if kind == "matryoshka":
        for size in recipe.prefixes[:-1]:
            loss = loss + sum(share(x, f_F[:size] @ W_dec[:size] + b_dec) for x, f_F in zip(x_ND, f, strict=True)) / n
    if kind == "hierarchical":
        for size, weight in ((1, 1 / 4), (2, 1 / 4)):  # of k = 4, whose own is 1: half of 3 and 4 of all j, 2, and 1
            for x_D, f_F in zip(x_ND, f, strict=True):
                best = sorted(range(LATENTS), key=lambda i, f_F=f_F: -f_F[i].item())[:size]
                loss = loss + weight * share(x_D, sum(f_F[i] * W_dec[i] for i in best) + b_dec) / n
    if kind in ("topk", "batchtopk", "matryoshka", "hierarchical") and not recipe.published:
        loss = loss + 1 / 32 * auxk_of(W, x_ND.detach(), reconstructions, dead_d)
    return Expected(loss, torch.stack(f), torch.stack(reconstructions))


def auxk_of(W: dict[str, Tensor], x_ND: Tensor, reconstructions: list[Tensor], dead_d: Tensor) -> Tensor:
    """2406.04093, A.2: the top D/2 dead latents against what is left over, which is held fixed as b_dec is."""
    dead, total = dead_d.tolist(), x_ND.new_zeros(())
    if not dead:
        return total
    for x_D, reconstruction_D in zip(x_ND, reconstructions, strict=True):
        z = {i: W["W_enc_FD"][i] @ (x_D - W["b_dec_D"].detach()) + W["b_enc_F"][i] for i in dead}
        best = sorted(dead, key=lambda i, z=z: -z[i].item())[: D // 2]
        modelled_D = sum(z[i].clamp(min=0) * W["W_dec_FD"][i] for i in best)
        total = total + share(x_D - reconstruction_D.detach(), modelled_D)
    return total / len(x_ND)


def leaves(module: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().double().requires_grad_(parameter.requires_grad)
        for name, parameter in module.named_parameters()
    }


def assert_gradients_are(sae: SAE, W: dict[str, Tensor], rtol: float, *, router: float = 0.0) -> None:
    """To rtol of each gradient's norm; the router's, a difference of nearly equal parts, to `router`."""
    for name, parameter in sae.named_parameters():
        expected = W[name].grad
        if expected is None or not expected.abs().max() > 0:
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name
            continue
        assert parameter.grad is not None, name
        error = float((parameter.grad.double() - expected).norm() / expected.norm())
        assert error < (router if name == "router_LD" else rtol), f"{name}: {error}"


def f_of(out: Any) -> Tensor:
    return out.latents.dense().detach().double()


# ---------------------------------------------------------------------------------- alone, in training mode


@pytest.mark.parametrize("dead_d", [NONE_DEAD, DEAD], ids=["none dead", "some dead"])
@pytest.mark.parametrize("case", CASES)
def test_forward_loss_and_all_gradients_are_the_equations_token_by_token(
    case: str, dead_d: Tensor, path: tuple[torch.dtype, float]
) -> None:
    dtype, rtol = path
    sae, x_LND = make(case).to(dtype), normalised().to(dtype)
    W = leaves(sae)
    expected = expected_of(sae, W, x_LND[0].double(), dead_d)
    expected.loss.backward()
    out = sae.autoencode(x_LND[0])
    objective = sae.loss(out, dead_d)
    objective.total.backward()
    assert 0 < (expected.f_NF > 0).sum() < N * LATENTS
    torch.testing.assert_close(f_of(out), expected.f_NF.detach(), rtol=rtol, atol=rtol)
    reconstruction_ND = out.reconstruction_ND.detach().double()
    torch.testing.assert_close(reconstruction_ND, expected.reconstruction_ND.detach(), rtol=rtol, atol=rtol)
    assert objective.total.item() == pytest.approx(expected.loss.item(), rel=rtol)
    shares_N = squared_error_shares(x_LND[0].double(), expected.reconstruction_ND.detach())
    assert objective.norm_mse.item() == pytest.approx(shares_N.mean().item(), rel=rtol)
    assert_gradients_are(sae, W, rtol)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("batchtopk", "matryoshka")])
def test_a_row_of_twice_the_weight_counts_as_the_row_twice_in_every_term(case: str) -> None:
    sae, x_ND = make(case), normalised()[0]
    weights_N = torch.ones(N)
    weights_N[:5] = 2
    twice_ND = torch.cat([x_ND, x_ND[:5]])
    weighted = sae.autoencode(x_ND, weights_N / weights_N.sum())
    objective = sae.loss(weighted, DEAD)
    twice, plain = sae.loss(sae.autoencode(twice_ND), DEAD), sae.loss(sae.autoencode(x_ND), DEAD)
    for given, same, other in zip(objective, twice, plain, strict=True):
        assert given.item() == pytest.approx(same.item(), rel=1e-5)
        assert given.item() != pytest.approx(other.item(), rel=1e-4)


def test_matryoshkas_prefixes_are_weighted_as_the_whole() -> None:
    sae, x_ND = make("matryoshka"), normalised()[0]
    only_first_N = torch.zeros(N)
    only_first_N[0] = 1
    out = sae.autoencode(x_ND, only_first_N)
    f_NF = out.latents.dense()
    reconstructions = [f_NF[:, :m] @ sae.W_dec_FD[:m] + sae.b_dec_D for m in sae.recipe.prefixes]
    expected = sum(squared_error_shares(x_ND[:1], x_hat_ND[:1]) for x_hat_ND in reconstructions)
    assert sae.loss(out, NONE_DEAD).total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_cases_cover_every_variant_over_one_layer() -> None:
    assert {case["sae"] for case in CASES.values()} == set(SINGLE_LAYER)


@pytest.mark.parametrize("case", ["topk", "batchtopk", "matryoshka", "hierarchical"])
def test_dead_latents_change_the_loss_by_a_32nd_of_auxk(case: str) -> None:
    sae = make(case)
    out = sae(Normalised(normalised()))
    W = leaves(sae)
    extra = auxk_of(W, out.x_ND.double(), list(out.reconstruction_ND.double()), DEAD).item()
    assert extra > 0.01
    assert AUXK_WEIGHT == 1 / 32
    difference = sae.loss(out, DEAD).total.item() - sae.loss(out, NONE_DEAD).total.item()
    assert difference == pytest.approx(extra / 32, rel=1e-3)


def test_the_gates_decoder_is_frozen_in_the_auxiliary_term_and_free_elsewhere() -> None:
    sae = make("gated")
    out = sae(Normalised(normalised()))
    assert out.auxiliary is not None
    gradients = torch.autograd.grad(out.auxiliary, (sae.W_dec_FD, sae.b_dec_D), allow_unused=True, retain_graph=True)
    assert gradients[0] is None  # b_dec has one still, through the encoder's centring
    assert torch.autograd.grad(sae.loss(out, NONE_DEAD).total, sae.W_dec_FD)[0].abs().max() > 0


def test_a_hierarchical_sae_is_trained_at_its_k_and_all_of_its_halvings() -> None:
    assert [halvings(k) for k in (1, 4, 13)] == [[1], [1, 2, 4], [1, 3, 6, 13]]


def test_matryoshkas_sizes_default_to_halvings_that_end_with_all_latents() -> None:
    assert default_prefixes(512) == (32, 64, 128, 256, 512)
    assert default_prefixes(4) == (1, 2, 4)


# ------------------------------------------------------------------------------------------- in routesae


ROUTED = ["topk", "vanilla", "gated", "jumprelu target", "jumprelu lambda", "batchtopk", "matryoshka"]


def routed(case: str, **changes: Any) -> RouteSAE:
    given = {"width": D, "latents": LATENTS, "k": K, "layers": (4, 6, 9), **CASES[case], **changes}
    sae = build(Recipe(**{**given, "sae": "routesae", "routed": given["sae"]}), torch.Generator().manual_seed(0))
    assert isinstance(sae, RouteSAE)
    perturb(sae.shared)
    with torch.no_grad():
        sae.router_LD.mul_(5)
    return sae


@pytest.mark.usefixtures("float32_path")
@pytest.mark.parametrize("routing", ["hard", "soft"])
@pytest.mark.parametrize(
    ("case", "aggregate"), [*((case, "sum") for case in [*ROUTED, "topk published"]), ("topk", "mean")]
)
def test_a_routed_variants_loss_and_gradients_are_its_own_on_the_routed_input(
    case: str, aggregate: str, routing: str
) -> None:
    sae, x_LND = routed(case, routing=routing, aggregate=aggregate), normalised(L, seed=3)
    W = leaves(sae)
    inputs = []
    for t in range(N):
        layers = [x_LND[layer, t].double() for layer in range(L)]
        gathered_D = sum(layers) / (L if aggregate == "mean" else 1)
        w = torch.softmax(torch.stack([W["router_LD"][layer] @ gathered_D for layer in range(L)]), 0)
        best = int(w.argmax())
        inputs.append(w[best] * layers[best] if routing == "hard" else sum(w[i] * layers[i] for i in range(L)))
    shared = {name.removeprefix("shared."): tensor for name, tensor in W.items()}
    expected = expected_of(sae.shared, shared, torch.stack(inputs), DEAD)
    expected.loss.backward()
    out = sae(Normalised(x_LND))
    objective = sae.loss(out, DEAD)
    objective.total.backward()
    torch.testing.assert_close(f_of(out), expected.f_NF.detach(), rtol=1e-5, atol=1e-5)
    assert objective.total.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert W["router_LD"].grad is not None
    assert W["router_LD"].grad.abs().max() > 1e-6
    assert_gradients_are(sae, W, 1e-5, router=1e-3)


# --------------------------------------------------------------------------------------------------- in use


@pytest.mark.parametrize("case", CASES)
def test_in_use_encode_and_decode_are_the_two_halves_of_forward(case: str) -> None:
    sae = make(case)
    x_LND = normalised()
    sae(Normalised(x_LND))  # batchtopk learns its threshold
    with torch.no_grad():
        trained = f_of(sae(Normalised(x_LND)))
        sae.eval()
        out = sae(Normalised(x_LND))
        latents = sae.encode(Normalised(x_LND))
    dense_NF = latents.dense().double()
    torch.testing.assert_close(dense_NF, f_of(out), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(latents), out.reconstruction_ND, rtol=1e-5, atol=1e-5)
    if "batchtopk" not in case and case != "matryoshka":  # these select otherwise in use
        torch.testing.assert_close(dense_NF, trained, rtol=1e-5, atol=1e-5)
    assert not latents.dense().requires_grad


def test_forward_leaves_its_input_as_it_was() -> None:
    for case in CASES:
        x_LND = normalised()
        before_LND = x_LND.clone()
        make(case)(x_LND)
        assert torch.equal(x_LND, before_LND), case


# ------------------------------------------------------------------------------------- batchtopk's threshold


@pytest.mark.parametrize("case", ["batchtopk", "matryoshka"])
def test_the_threshold_is_the_mean_of_each_batchs_least_positive_latent_then_a_running_one(case: str) -> None:
    sae, expected = make(case), 0.0
    assert isinstance(sae, BatchTopK)
    least = []
    for seed in range(14):
        x_LND = normalised(seed=seed)
        f_NF = expected_of(sae, leaves(sae), x_LND[0].double(), NONE_DEAD).f_NF
        least.append(f_NF[f_NF > 0].min().item())
        sae(Normalised(x_LND))
        share = max(1 / len(least), 0.1)  # the first ten count alike
        expected = (1 - share) * expected + share * least[-1]
        assert float(sae.threshold) == pytest.approx(expected, rel=1e-4)
        assert len(least) > 10 or expected == pytest.approx(sum(least) / len(least))


@pytest.mark.parametrize("case", ["batchtopk", "matryoshka"])
def test_in_use_a_latent_is_active_above_the_threshold_which_stays_as_it_is(case: str) -> None:
    sae, x_LND = make(case), normalised()
    sae(Normalised(x_LND))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    theta = float(before["threshold"])
    assert theta > 0
    sae.eval()
    out = sae(Normalised(normalised(seed=1)))
    z_NF = (normalised(seed=1)[0] - sae.b_dec_D) @ sae.W_enc_FD.T + sae.b_enc_F
    torch.testing.assert_close(f_of(out), torch.where(z_NF > theta, z_NF, 0).detach().double(), rtol=1e-4, atol=1e-5)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_batch_without_an_active_latent_leaves_the_threshold_finite() -> None:
    sae = make("batchtopk")
    sae(Normalised(normalised()))
    theta = float(sae.threshold)
    with torch.no_grad():
        sae.b_enc_F.fill_(-1000)
    sae(Normalised(normalised()))
    assert float(sae.threshold) == theta


# ------------------------------------------------------------------------------------------- sparsity weight


def test_lambda_is_steered_by_the_stated_rule() -> None:
    recipe = Recipe(sae="vanilla", layers=(4,), width=D, latents=LATENTS, k=K)
    for active, clipped in ((8.0, None), (2.0, None), (4.0, 0.0), (32.0, 1.0), (0.5, -1.0), (0.0, -1.0)):
        sae = build(recipe)
        before = float(sae.penalty_weight(1.0))
        sae.steer(torch.tensor(active))
        change = torch.tensor(active / K).log().item() if clipped is None else clipped
        assert float(sae.penalty_weight(1.0)) == pytest.approx(
            before * torch.tensor(change / 20).exp().item(), rel=1e-5
        )


def test_a_steered_lambda_ignores_the_warm_up_and_a_given_one_obeys_it() -> None:
    recipe = Recipe(sae="vanilla", layers=(4,), width=D, latents=LATENTS, k=K)
    assert float(build(recipe).penalty_weight(0.25)) == float(build(recipe).penalty_weight(1.0)) > 0
    given = build(recipe.replace(sparsity=0.5))
    given.steer(torch.tensor(32.0))
    assert [float(given.penalty_weight(factor)) for factor in (0.0, 0.25, 1.0)] == [0, 0.125, 0.5]


@pytest.mark.parametrize("case", ["vanilla", "gated"])
def test_training_batches_steer_lambda_by_the_latents_they_found_active_and_others_do_not(case: str) -> None:
    sae = make(case, sparsity=None)
    before = float(sae.steered)
    out = sae(Normalised(normalised()))
    mean = float((f_of(out) > 0).sum(1).double().mean())
    assert mean != K
    ratio = torch.tensor(mean / K).log().clamp(-1, 1)
    after = before * float((ratio / 20).exp())
    assert float(sae.steered) == pytest.approx(after, rel=1e-5)
    fixed = make(case, sparsity=after)
    assert sae.loss(out, NONE_DEAD).total.item() == pytest.approx(
        fixed.loss(fixed(normalised()), NONE_DEAD).total.item(), rel=1e-5
    )
    sae.eval()
    sae(Normalised(normalised(seed=1)))
    assert float(sae.steered) == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("case", ["vanilla", "gated", "jumprelu lambda", "jumprelu target"])
def test_the_warm_up_scales_the_penalty_and_nothing_else(case: str) -> None:
    sae = make(case)
    out = sae(Normalised(normalised()))
    none, half, whole = (sae.loss(out, NONE_DEAD, factor).total.item() for factor in (0.0, 0.5, 1.0))
    assert whole > none
    assert half == pytest.approx((none + whole) / 2, rel=1e-5)


@pytest.mark.parametrize("k", [1, K, 9])
@pytest.mark.parametrize("name", ["vanilla", "gated", "jumprelu"])
def test_variants_of_no_fixed_k_start_with_k_latents_active_on_the_sample_on_average(name: str, k: int) -> None:
    recipe = Recipe(sae=name, layers=(4,), width=D, latents=LATENTS, k=k)
    sae, sample_LND = build(recipe, torch.Generator().manual_seed(0)), normalised()
    sae.initialise(Normalised(sample_LND))
    assert isinstance(sae, SingleLayerSAE)
    torch.testing.assert_close(sae.b_dec_D.detach(), geometric_median(sample_LND[0]))
    active = int((f_of(sae(Normalised(sample_LND))) > 0).sum())
    assert k * N <= active <= k * N + 1  # the next lies at zero, or above it by rounding


@pytest.mark.parametrize("name", ["vanilla", "gated", "crosscoder"])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_a_latent_of_twice_the_size_of_a_pre_activation_starts_worth_its_penalty(name: str, scale: float) -> None:
    """Whatever the size of the inputs: a steered λ moves 5 % a batch, and would need hundreds to make up for it."""
    layers = 3 if name == "crosscoder" else 1
    sample_LND = scale * normalised()[:1].expand(layers, -1, -1)
    recipe = Recipe(sae=name, layers=tuple(range(layers)), width=D, latents=LATENTS, k=K)
    sae = build(recipe, torch.Generator().manual_seed(0))
    sae.initialise(Normalised(sample_LND))
    x_NC = torch.cat(list(sample_LND), dim=1)
    f = 2 * x_NC.norm(dim=1).mean() / (layers * D) ** 0.5
    decoder_norms = layers**0.5  # of a unit row over all layers, the same in each
    worth = (f / x_NC.norm(dim=1).mean()) ** 2  # what NormMSE falls by at most
    assert float(sae.steered) * float(f) * decoder_norms == pytest.approx(float(worth), rel=1e-5)


# ----------------------------------------------------------------------------------------------- fold_scale


FOLDED = [*CASES, "crosscoder", "mlsae", "random", *(f"routesae {variant}" for variant in SINGLE_LAYER)]


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_scale_gives_the_same_latents_on_h_and_reconstructions_divided_by_it(name: str) -> None:
    scale = 0.37
    if name in CASES:
        sae: SAE = make(name)
    else:
        kind, _, variant = name.partition(" ")
        given = {"width": D, "latents": LATENTS, "k": K, "layers": (4, 6, 9)}
        nested = {"prefixes": (4, LATENTS)} if variant == "matryoshka" else {}
        recipe = Recipe(sae=kind, routed=variant or "topk", normalize="dataset", **given, **nested)
        sae = build(recipe, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for index, parameter in enumerate(sae.parameters()):
                generator = torch.Generator().manual_seed(index)
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    h_LND = torch.randn(len(sae.recipe.layers), N, D, generator=torch.Generator().manual_seed(2)) / scale
    with torch.no_grad():
        # What is learned from batches has been; from others, so that no f is right at θ.
        sae(Normalised(scale * h_LND.flip(2)))
        sae.eval()
        before = sae(Normalised(scale * h_LND))
        sae.fold_scale(scale)
        after = sae(Normalised(h_LND))
    assert (f_of(before) > 0).any()
    torch.testing.assert_close(f_of(after), f_of(before), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.reconstruction_ND, before.reconstruction_ND / scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.x_ND, before.x_ND / scale, rtol=1e-4, atol=1e-5)
    if before.routing_NL is not None:
        torch.testing.assert_close(after.routing_NL, before.routing_NL, rtol=1e-4, atol=1e-5)


def test_the_folded_cover_every_variant() -> None:
    assert {CASES[name]["sae"] if name in CASES else name.split()[0] for name in FOLDED} == set(SAES)


# --------------------------------------------------------------------------------- start, decoder, published


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", SINGLE_LAYER)
def test_an_sae_starts_with_unit_decoder_rows_along_the_encoders(name: str, published: bool) -> None:
    recipe = Recipe(sae=name, layers=(4,), width=D, latents=LATENTS, k=K, published=published)
    sae = build(recipe, torch.Generator().manual_seed(3))
    assert isinstance(sae, SingleLayerSAE)
    unit_FD = sae.W_enc_FD / sae.W_enc_FD.norm(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec_FD, unit_FD)
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=1), torch.ones(LATENTS))
    if published:  # a linear layer's: even within ±1/√D
        assert 0.9 * D**-0.5 < sae.W_enc_FD.abs().max().item() <= D**-0.5
    else:
        torch.testing.assert_close(sae.W_enc_FD.norm(dim=1), torch.ones(LATENTS))
    assert sae.W_enc_FD.data_ptr() != sae.W_dec_FD.data_ptr()
    assert all(not getattr(sae, own).any() for own in ("b_dec_D", *sae.tensors.values()) if own != "threshold_F")
    again = build(recipe, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True))
    other = build(recipe, torch.Generator().manual_seed(4))
    assert not torch.equal(other.W_dec_FD, sae.W_dec_FD)


@pytest.mark.parametrize("name", SINGLE_LAYER)
def test_initialise_puts_the_decoder_bias_at_the_median_but_not_with_the_published_recipe(name: str) -> None:
    for published in (False, True):
        recipe = Recipe(sae=name, layers=(4,), width=D, latents=LATENTS, k=K, published=published)
        sae = build(recipe, torch.Generator().manual_seed(0))
        sae.initialise(Normalised(normalised()))
        assert isinstance(sae, SingleLayerSAE)
        expected_D = torch.zeros(D) if published else geometric_median(normalised()[0])
        torch.testing.assert_close(sae.b_dec_D.detach(), expected_D)


def test_published_jumprelus_threshold_and_bandwidth_are_a_thousandth_and_stay_at_the_start() -> None:
    sae = build(Recipe(sae="jumprelu", layers=(4,), width=D, latents=LATENTS, k=K, published=True, sparsity=0.1))
    sae.initialise(Normalised(normalised()))
    assert sae.bandwidth == 0.001
    assert torch.equal(sae.threshold_F.detach(), torch.full((LATENTS,), 0.001))


@pytest.mark.parametrize("name", ["gated", "topk", "batchtopk", "jumprelu", "matryoshka", "hard", "soft", "mlsae"])
def test_training_steps_keep_the_decoder_at_unit_norm_and_its_gradient_orthogonal(name: str) -> None:
    parts: dict[str, Any] = {"sae": name, "layers": (4,)}
    if name in ("hard", "soft"):
        parts = {"sae": "routesae", "layers": (4, 6, 9), "routing": name}
    recipe = Recipe(width=D, latents=LATENTS, k=K, sparsity=0.01, **parts)
    whole = build(recipe, torch.Generator().manual_seed(0))
    sae = whole.shared if isinstance(whole, RouteSAE) else whole
    assert isinstance(sae, SingleLayerSAE)
    adam = torch.optim.Adam(whole.parameters(), lr=0.05)
    start_FD = sae.W_dec_FD.detach().clone()
    for step in range(1, 5):
        whole.loss(whole(Normalised(normalised(len(recipe.layers), seed=step))), NONE_DEAD).total.backward()
        grad_FD, W_dec_FD = sae.W_dec_FD.grad, sae.W_dec_FD.detach()
        assert grad_FD is not None
        raw_FD = grad_FD.clone()
        whole.project_gradient()
        assert (grad_FD * W_dec_FD).sum(1).abs().max() < 1e-6 * max(1, raw_FD.norm(dim=1).max())
        assert (raw_FD * W_dec_FD).sum(1).abs().max() > 1e-5  # there was something to take out
        removed_FD = raw_FD - grad_FD  # all of it along the rows
        across_FD = removed_FD - (removed_FD * W_dec_FD).sum(1, keepdim=True) * W_dec_FD
        assert across_FD.abs().max() < 1e-6
        adam.step()
        assert (sae.W_dec_FD.norm(dim=1) - 1).abs().max() > 1e-3  # the step alone leaves the sphere
        whole.normalise_decoder(step)
        adam.zero_grad()
        torch.testing.assert_close(sae.W_dec_FD.norm(dim=1), torch.ones(LATENTS), rtol=0, atol=1e-6)
    assert (sae.W_dec_FD - start_FD).abs().max() > 0.01


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", SAES)
def test_a_zero_decoder_row_stays_zero_and_makes_no_nan(name: str, published: bool) -> None:
    layers = (4,) if name in SINGLE_LAYER else (4, 6, 9)
    parts = {"prefixes": (8, LATENTS)} if name == "matryoshka" else {}
    recipe = Recipe(
        sae=name, layers=layers, width=D, latents=LATENTS, k=K, sparsity=0.1, published=published, **parts
    )
    sae = build(recipe, torch.Generator().manual_seed(0))
    W_dec_FD = getattr(sae, "shared", sae).W_dec_FD
    with torch.no_grad():
        W_dec_FD[3] = 0
    sae.loss(sae(Normalised(normalised(len(layers)))), torch.arange(LATENTS)).total.backward()
    sae.project_gradient()
    sae.normalise_decoder(1, last=True)
    assert W_dec_FD[3].count_nonzero() == 0
    values = [tensor for parameter in sae.parameters() for tensor in (parameter.detach(), parameter.grad)]
    assert all(bool(tensor.isfinite().all()) for tensor in values if tensor is not None)
    hidden_NLD = hidden(len(layers)).transpose(0, 1)
    given = hidden_NLD[:, 0] if sae.one_layer else hidden_NLD
    assert bool(sae.decode(sae.encode(given)).isfinite().all())


def test_vanillas_decoder_norms_are_free() -> None:
    sae = make("vanilla")
    before_FD = sae.W_dec_FD.detach().clone()
    sae.loss(sae(Normalised(normalised())), NONE_DEAD).total.backward()
    assert sae.W_dec_FD.grad is not None
    gradient_FD = sae.W_dec_FD.grad.clone()
    sae.project_gradient()
    sae.normalise_decoder(1, last=True)
    assert torch.equal(sae.W_dec_FD, before_FD)
    assert torch.equal(sae.W_dec_FD.grad, gradient_FD)


@pytest.mark.parametrize("name", ["vanilla", "gated", "topk", "jumprelu", "routesae"])
def test_published_renormalises_the_decoder_after_steps_1_11_21_and_the_last_and_projects_nothing(name: str) -> None:
    layers = (4, 6, 9) if name == "routesae" else (4,)
    recipe = Recipe(sae=name, layers=layers, width=D, latents=LATENTS, k=K, published=True, sparsity=0.1)
    sae = build(recipe, torch.Generator().manual_seed(0))
    W_dec_FD = getattr(sae, "shared", sae).W_dec_FD
    sae.loss(sae(Normalised(normalised(len(layers)))), NONE_DEAD).total.backward()
    gradient_FD = W_dec_FD.grad.clone()
    assert (gradient_FD * W_dec_FD.detach()).sum(1).abs().max() > 1e-6
    sae.project_gradient()
    assert torch.equal(W_dec_FD.grad, gradient_FD)
    done = []
    for step in range(1, 26):
        with torch.no_grad():
            W_dec_FD.mul_(1.5)
        sae.normalise_decoder(step, last=step == 25)
        if torch.allclose(W_dec_FD.norm(dim=1), torch.ones(LATENTS), atol=1e-5):
            done.append(step)
    assert done == [1, 11, 21, 25]
