"""Training over the pairs that can be active and over all of them: the same gradients, the same curves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from routesae.tests.hidden import Normalised
from routesae.train import losses
from routesae.train.optimiser import EPSILON as ADAM_EPSILON
from routesae.train.saes import SAE, Forward, Recipe, RouteSAE, SingleLayerSAE, build
from routesae.train.saes.crosscoder import Crosscoder
from routesae.train.saes.topk import TopK
from routesae.train.sparse import policy
from routesae.train.sparse.pairs import AllPairs, Latents, Pairs
from routesae.train.sparse.policy import Arithmetic
from routesae.train.sparse.search import Encoder
from routesae.train.trainee import DEFAULT_CLIP

L, N, D, LATENTS, K = 3, 160, 24, 256, 4
DEAD = torch.arange(LATENTS - 30, LATENTS)
OVER_ONE: dict[str, dict[str, Any]] = {
    "vanilla": {"sae": "vanilla"},
    "gated": {"sae": "gated"},
    "jumprelu target": {"sae": "jumprelu"},
    "jumprelu lambda": {"sae": "jumprelu", "sparsity": 0.01},
    "jumprelu pre-act": {"sae": "jumprelu", "pre_act_loss": 0.03},
    "vanilla published": {"sae": "vanilla", "published": True, "sparsity": 0.5},
    "gated published": {"sae": "gated", "published": True, "sparsity": 0.5},
    "jumprelu published": {"sae": "jumprelu", "published": True, "sparsity": 0.01},
}
OVER_SEVERAL: dict[str, dict[str, Any]] = {
    "crosscoder": {"sae": "crosscoder"},
    "crosscoder published": {"sae": "crosscoder", "published": True, "sparsity": 0.5},
}
for _way, _changes in (("hard", {}), ("soft", {"routing": "soft"}), ("top2", {"router": "top2", "balance": 0.1})):
    for _name, _case in OVER_ONE.items():
        OVER_SEVERAL[f"routesae {_way} {_name}"] = {**_case, **_changes, "sae": "routesae", "routed": _case["sae"]}


def rows(layers: int, seed: int, tokens: int = N) -> Tensor:
    """Sums of a few directions out of forty, the same for every seed, and noise; normalised."""
    directions_SD = torch.randn(40, D, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    weights_LNS = torch.rand(layers, tokens, 40, generator=generator)
    noise_LND = 0.2 * torch.randn(layers, tokens, D, generator=generator)
    x_LND = torch.where(weights_LNS > 0.9, weights_LNS, 0) @ directions_SD + noise_LND
    return (x_LND - x_LND.mean(2, keepdim=True)) / x_LND.std(2, keepdim=True)


def dictionary(sae: SAE) -> SingleLayerSAE | Crosscoder:
    inner = sae.shared if isinstance(sae, RouteSAE) else sae
    assert isinstance(inner, SingleLayerSAE | Crosscoder)
    return inner


@torch.no_grad()
def make(case: dict[str, Any], x_LND: Tensor) -> SAE:
    """With weights that are special in nothing, and about a fiftieth of the pre-activations of x where they count."""
    recipe = Recipe(**{"layers": tuple(range(len(x_LND))), "width": D, "latents": LATENTS, "k": K, **case})
    sae = build(recipe, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(7)
    for parameter in sae.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if isinstance(sae, RouteSAE):
        sae.router_LD.mul_(5)
    inner, x_ND = dictionary(sae), sae(Normalised(x_LND)).x_ND
    z_NF = x_ND @ inner.W_enc_FD.T if isinstance(inner, Crosscoder) else (x_ND - inner.b_dec_D) @ inner.W_enc_FD.T
    least = torch.topk(z_NF.flatten(), z_NF.numel() // 50).values[-1]
    if hasattr(inner, "threshold_F"):
        inner.threshold_F.add_(least - inner.threshold_F.min() + 0.25)
    else:
        getattr(inner, "b_gate_F" if hasattr(inner, "b_gate_F") else "b_enc_F").sub_(least)
    for name, buffer in sae.named_buffers():
        assert name.endswith("steered")
        buffer.fill_(0.02)
    return sae


@pytest.mark.parametrize("name", [*OVER_ONE, *OVER_SEVERAL])
def test_the_objective_and_all_gradients_over_few_pairs_are_those_over_all(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, layers = (OVER_ONE[name], 1) if name in OVER_ONE else (OVER_SEVERAL[name], L)
    x_LND = rows(layers, seed=1)
    found: dict[type, dict[str, Tensor]] = {}
    few, plain = "bfloat16", "float32"
    for proposal, kind in ((few, Pairs), (plain, Pairs), (plain, AllPairs)):
        below = -1 if kind is AllPairs else policy.SPARSE_BELOW["cpu"]
        monkeypatch.setattr(SAE, "arithmetic", Arithmetic(proposal=proposal, sparse_below=below))
        sae = make(case, x_LND)
        out = sae(Normalised(x_LND))
        assert type(out.latents.pairs) is kind  # chosen by itself where few are active
        objective = sae.loss(out, DEAD)
        objective.total.backward()  # type: ignore[no-untyped-call]
        gradients = {of: p.grad for of, p in sae.named_parameters() if p.grad is not None and p.grad.any()}
        now = {**gradients, **objective._asdict(), "f": out.latents.dense().detach()}
        assert 0 < now["f"].count_nonzero() < now["f"].numel() / 20
        for of, tensor in found.get(Pairs, now).items():
            error = float((now[of] - tensor).detach().norm() / tensor.detach().norm())
            assert error < (1e-4 if of == "router_LD" else 1e-5), (of, error, proposal, kind)
        assert found.setdefault(Pairs, now).keys() == now.keys()


def plain_topk(z_NF: Tensor, k: int) -> Tensor:
    chosen_NF = torch.zeros_like(z_NF, dtype=torch.bool).scatter_(1, torch.topk(z_NF, k, dim=1).indices, value=True)
    return torch.where(chosen_NF, z_NF, 0)


class DenseTopK(TopK):
    """The same equations by plain autograd over [N, F]."""

    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        f_NF = plain_topk((x_ND - self.b_dec_D) @ self.W_enc_FD.T + self.b_enc_F, self.k).relu()
        return Forward(x_ND, f_NF @ self.W_dec_FD + self.b_dec_D, Latents(f_NF, AllPairs()), weights_N=weights_N)


def plain_encode_topk(x_ND: Tensor, encoder: Encoder, k: int) -> tuple[AllPairs, Tensor]:
    assert encoder.b_dec_D is not None
    return AllPairs(), plain_topk((x_ND - encoder.b_dec_D) @ encoder.W_enc_FD.T + encoder.b_enc_F, k)


def curve(sae: SAE, kind: type, dtype: torch.dtype) -> Tensor:
    """NormMSE of each of 200 steps of Adam, taken as routesae.train.trainee takes them."""
    assert isinstance(sae, SingleLayerSAE)
    sae.to(dtype).start_from(rows(1, seed=1000, tokens=512)[0].to(dtype))
    adam = torch.optim.Adam(sae.parameters(), lr=2e-3, eps=ADAM_EPSILON)
    errors = []
    for step in range(1, 201):
        out = sae.autoencode(rows(1, seed=step, tokens=96)[0].to(dtype))
        assert type(out.latents.pairs) is kind
        objective = sae.loss(out, DEAD)
        adam.zero_grad()
        objective.total.backward()  # type: ignore[no-untyped-call]
        sae.project_gradient()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), DEFAULT_CLIP / D)
        adam.step()
        sae.normalise_decoder(step, last=step == 200)
        errors.append(objective.norm_mse.item())
    return torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["vanilla", "gated", "jumprelu", "topk"])
def test_200_steps_of_training_over_few_pairs_have_the_curve_of_those_over_all(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SAE, "arithmetic", Arithmetic(proposal="bfloat16", sparse_below=1.1))
    recipe = Recipe(sae=name, layers=(1,), width=D, latents=LATENTS, k=2 * K)
    sparsely = build(recipe, torch.Generator().manual_seed(0))
    sparse = curve(sparsely, Pairs, dtype)
    monkeypatch.setattr(SAE, "arithmetic", Arithmetic(sparse_below=-1.0))
    monkeypatch.setattr(losses, "encode_topk", plain_encode_topk)
    densely = DenseTopK if name == "topk" else build
    dense = curve(densely(recipe, torch.Generator().manual_seed(0)), AllPairs, dtype)
    assert abs(dense[-1] / dense[0] - 1) > 0.15  # it trained
    assert dense[-1] < 0.6
    error = ((sparse - dense) / dense).abs()
    if dtype == torch.float64:
        assert error.max() < 1e-9
    elif name in ("vanilla", "jumprelu"):
        assert error.max() < 1e-4
    else:
        # A gate at zero, or two latents that all but tie at the k-th place, come out either way once weights differ
        # in their last bits, and from there on the two runs are two samples; float64 shows that nothing else parts
        # them.
        assert error[:50].max() < 1e-4
        assert error.max() < 0.05
