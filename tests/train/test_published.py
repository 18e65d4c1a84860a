"""`--recipe published` trains step by step as the published RouteSAE code (2503.08200, its Trainer) does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from routesae.benchmarks import published
from routesae.harvest.cache.reader import Cache
from routesae.train.losses import Objective
from routesae.train.run import train
from routesae.train.saes.normalise import Hidden
from routesae.train.settings import TrainSettings
from routesae.train.trainee import Trainee

LATENTS, K, LR, LAMBDA = 64, 8, 3e-3, 0.02
# Ours, in the words of benchmarks/published.py.
NAMES = {
    "pre_bias_D": "b_dec_D",
    "encoder.weight": "W_enc_FD",
    "decoder.weight": "W_dec_FD",
    "threshold_F": "threshold_F",
    "magnitude_bias_F": "b_mag_F",
    "log_scale_F": "r_mag_F",
}
VARIANTS = {
    "vanilla": {"sae": "vanilla", "sparsity": LAMBDA},
    "gated": {"sae": "gated", "sparsity": LAMBDA},
    "topk": {"sae": "topk"},
    "jumprelu": {"sae": "jumprelu", "sparsity": LAMBDA / LATENTS},
    "routesae hard": {"sae": "routesae", "routing": "hard"},
    "routesae soft": {"sae": "routesae", "routing": "soft"},
    "crosscoder": {"sae": "crosscoder", "sparsity": LAMBDA},
    "mlsae": {"sae": "mlsae"},
}


def theirs(variant: str, weights: dict[str, Tensor], width: int, layers: int) -> Any:
    """The published model with the weights that ours starts from."""
    model = published.build("topk" if variant == "mlsae" else variant, width, LATENTS, K, layers)
    if variant == "crosscoder":
        for at in range(layers):
            columns = slice(at * width, (at + 1) * width)
            model.encoders[at].weight.data = weights["W_enc_FD"][:, columns].clone()
            model.outputs[at].weight.data = weights["W_dec_FD"][:, columns].T.clone()
        return model
    if variant.startswith("routesae"):
        model.router.weight.data = weights["router_LD"].clone()
    bare = {name.removeprefix("shared."): tensor for name, tensor in weights.items()}
    inner = model.sae if variant.startswith("routesae") else model
    for name, parameter in inner.named_parameters():
        ours = NAMES.get(name, "b_gate_F" if variant == "gated" else "b_enc_F")
        parameter.data = (bare[ours].T if name == "decoder.weight" else bare[ours]).clone()
    return model


def curve(variant: str, model: Any, epochs: list[list[Tensor]], sparsity: float) -> Iterator[float]:
    """Trainer.run, on batches [L, N, D] of normalised states."""
    total = sum(map(len, epochs))
    warmup, decay = int(total * 0.05), total // 5

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return 1.0 if step < total - decay else max(0.0, 1.0 - (step - (total - decay)) / decay)

    adam = torch.optim.Adam(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, factor)

    def unit_norm() -> None:
        for decoder in model.decoders():
            decoder.weight.data /= decoder.weight.data.norm(dim=0, keepdim=True)

    def step(x: Tensor) -> float:
        x, out, f_NF = model(x)
        error = ((out - x).square().mean(-1) / x.square().mean(-1)).mean()
        loss = error + sparsity * model.penalty(f_NF)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return error.item()

    unit_norm()
    for batches in epochs:
        for at, x_LND in enumerate(batches):
            if variant == "mlsae":
                yield sum(step(x_ND) for x_ND in x_LND) / len(x_LND)
                unit_norm()
            else:
                yield step(x_LND.transpose(0, 1) if variant[:5] in ("route", "cross") else x_LND[0])
                if at % 10 == 0:
                    unit_norm()
            schedule.step()


@pytest.mark.parametrize("variant", VARIANTS)
def test_40_steps_have_the_published_codes_curve(
    variant: str, tiny_cache: Cache, settings: Callable[..., TrainSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: dict[str, Tensor] = {}
    batches: list[Tensor] = []
    errors: list[float] = []
    inner = Trainee.step

    def step(self: Trainee, at: int, hidden: Hidden, tokens: int) -> None:
        if at == 1:
            for name, parameter in self.sae.named_parameters():
                if name == "threshold_F":
                    parameter.data.fill_(0.3)  # far from 0: below it ours let nothing through, as the help says
                elif name.startswith("shared.b_"):
                    parameter.data.uniform_(-0.2, 0.2)  # at 0 a hard router's gradient is nothing but rounding
            weights.update({name: tensor.clone() for name, tensor in self.sae.state_dict().items()})
        batches.append(published.normalised(hidden.hidden_LND))
        inner(self, at, hidden, tokens)

    monkeypatch.setattr(Trainee, "step", step)

    def add(self: Any, out: Any, objective: Objective, *rest: Any) -> None:
        errors.append(objective.norm_mse.item())

    monkeypatch.setattr("routesae.train.log.StepLog.add", add)
    monkeypatch.setattr("routesae.train.log.StepLog.write", lambda self, step, dead: {"NormMSE": ""})
    changes = VARIANTS[variant]
    train(settings(recipe="published", k=K, latents=LATENTS, lr=LR, batch_tokens=330, epochs=2, **changes))
    epoch_steps = len(batches) // 2
    assert len(batches) == len(errors) >= 40
    assert epoch_steps % 10  # the decoder's tenth steps begin anew with every epoch
    model = theirs(variant, weights, tiny_cache.manifest.width, len(batches[0]))
    epochs = [batches[:epoch_steps], batches[epoch_steps:]]
    expected = list(curve(variant, model, epochs, changes.get("sparsity", 0.0)))
    assert expected[-1] < 0.9 * expected[0]  # it learned
    assert errors == pytest.approx(expected, rel=2e-5)
