"""One change at a time to how a topk is trained, and what it does to held-out NormMSE: the ladder of RESULTS.md.

    python benchmarks/ladder.py --cache CACHE                               # all of it, hours, resumable
    python benchmarks/ladder.py --cache CACHE '{"lr": 4e-3, "dual": 0.5}'   # one run
    python benchmarks/ladder.py --only-table

A run is a JSON object over BASE. What `routesae train` has no setting for is patched into it here: shape and shares
of the schedule, Adam's betas, learning rates of encoder and decoder (factors), an average of the weights over the
last steps (ema), another optimiser (signum, muon, rowwise), the decoder's gradient as it is (project false), batches
joined for a step in equal parts of the run (grow), jumprelu's L0 as Σ tanh(4f) (penalty), and how the SAE begins
(data: decoder rows are that share a hidden state of the sample; dual: the encoder's rows are the decoder's times
C^-dual, C the sample's covariance; whiten: the encoder is trained as V·C^-p).
One line of results/ladder.jsonl a run; a run that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import append, where
from torch import Tensor
from torch.nn.functional import normalize

from routesae.train import optimiser, trainee
from routesae.train.optimiser import Adam
from routesae.train.run import train
from routesae.train.saes import jumprelu
from routesae.train.saes.single import SingleLayerSAE
from routesae.train.settings import settings_of

BASE: dict[str, Any] = {"layer": 15, "latents": 2304, "k": 32, "lr": 4e-3, "steps": 1001, "batch": 4096, "seed": 0}
BASE |= {"warmup": 0.05, "decay": 0.2}
LADDER: tuple[dict[str, Any], ...] = (
    {},
    {"decay": 1.0},
    {"lr": 8e-3, "decay": 0.6},
    {"betas": [0.0, 0.999]},
    {"betas": [0.95, 0.999]},
    {"ema": 0.99, "decay": 0.05},
    {"encoder": 0.5},
    {"decoder": 0.5},
    {"batch": 2048, "steps": 2002},
    {"data": 1.0},
    {"dual": 0.5},
    {"whiten": 0.5},
    {"steps": 4004},
    {"optimizer": "rowwise"},
    {"optimizer": "rowwise", "lr": 8e-3},
    {"optimizer": "signum", "lr": 1e-3},
    {"optimizer": "muon"},
    {"optimizer": "muon", "lr": 1e-2},
    {"project": False},
    {"clip": 0.0},
    {"clip": 0.0, "betas": [0.9, 0.99]},
    {"anneal_k_from": 96},
    {"decay": 0.4},
    {"decay": 0.6},
    {"decay": 0.5, "steps": 2002},
    {"batch": 16384, "steps": 250},
    {"seed": 1},
    {"batch": 2048, "steps": 2002, "grow": [1, 2, 4]},
    {"sae": "jumprelu", "steps": 500},
    {"sae": "jumprelu", "steps": 500, "penalty": "tanh"},
)
# Whether taking the part along its row out of the decoder's gradient is worth a pass over the weights.
PROJECTION: tuple[dict[str, Any], ...] = tuple(
    {"sae": sae, "steps": 300} | change
    for sae in ("batchtopk", "gated", "jumprelu", "vanilla")
    for change in ({}, {"project": False})
)
SWEEP: tuple[dict[str, Any], ...] = tuple(
    of | {"lr": lr}
    for of, rates in (
        ({}, (2e-3, 4e-3, 8e-3)),
        ({"steps": 250}, (2e-3, 4e-3, 8e-3)),
        ({"latents": 576}, (4e-3, 8e-3, 16e-3)),
        ({"latents": 9216}, (2e-3, 4e-3)),
        ({"latents": 9216, "steps": 400}, (1e-3, 2e-3, 4e-3)),
        ({"batch": 1024, "steps": 2002}, (2e-3, 4e-3, 8e-3)),
        ({"layer": 9, "k": 64, "steps": 500}, (2e-3, 4e-3, 8e-3)),
    )
    for lr in rates
)
RIDGE = 1e-2  # of C's mean eigenvalue
EMA_FROM = 0.3  # of the steps


class Changed:
    """The training code with a run's changes in it. One run a process, as they are not taken out again."""

    def __init__(self, run: dict[str, Any]):
        self.run, self.power_DD, self.batches, self.waiting = run, None, 0, 0
        self.first_rates, self.first_start = SingleLayerSAE.rate_factors, SingleLayerSAE.start_from
        trainee.lr_factor = self.lr_factor  # type: ignore[attr-defined]
        optimiser.BETAS = tuple(run.get("betas", optimiser.BETAS))
        if not run.get("project", True):
            SingleLayerSAE.project_gradient = lambda sae: None  # type: ignore[method-assign]
        SingleLayerSAE.rate_factors = lambda sae: self.rate_factors(sae)  # type: ignore[method-assign]
        SingleLayerSAE.start_from = lambda sae, x_ND: self.start_from(sae, x_ND)  # type: ignore[method-assign]
        step = UPDATES[run["optimizer"]] if "optimizer" in run else Adam.step
        Adam.step = lambda adam, lr, divisor: self.step(step, adam, lr, divisor)  # type: ignore[method-assign]
        if run.get("penalty") == "tanh":
            jumprelu.step = lambda z, threshold, width: torch.tanh(4 * jumprelu.jumprelu(z, threshold, width))

    def lr_factor(self, step: int, total_steps: int, *, published: bool = False) -> float:
        warmup_steps = max(1, round(self.run["warmup"] * total_steps))
        decay_steps = max(1, round(self.run["decay"] * total_steps))
        left = min(1.0, (total_steps - step) / decay_steps)
        shape = self.run.get("shape", "linear")
        fall = {"linear": left, "root": 1 - math.sqrt(1 - left), "square": left**2}[shape]
        return min(1.0, (step + 1) / warmup_steps) * fall

    def rate_factors(self, sae: SingleLayerSAE) -> dict[Any, float]:
        self.encoder = sae.W_enc_FD
        factors = {sae.W_enc_FD: self.run.get("encoder", 1.0), sae.W_dec_FD: self.run.get("decoder", 1.0)}
        return {**self.first_rates(sae), **factors}

    @torch.no_grad()
    def start_from(self, sae: SingleLayerSAE, x_ND: Tensor) -> None:
        self.first_start(sae, x_ND)
        centred_ND, run = x_ND - sae.b_dec_D, self.run
        if share := run.get("data"):
            generator = torch.Generator().manual_seed(run["seed"])
            row_F = torch.randperm(len(x_ND), generator=generator)[: len(sae.W_dec_FD)]
            mixed_FD = share * normalize(centred_ND[row_F]) + (1 - share) * normalize(sae.W_dec_FD)
            sae.W_dec_FD.copy_(normalize(mixed_FD))
            sae.W_enc_FD.copy_(sae.W_dec_FD)
        values_D, vectors_DD = torch.linalg.eigh((centred_ND.T @ centred_ND / len(x_ND)).double())
        values_D = values_D.clamp(min=0) / values_D.mean() + RIDGE

        def power(exponent: float) -> Tensor:
            powers_D = values_D**-exponent
            powers_D /= powers_D.square().mean().sqrt()
            return ((vectors_DD * powers_D) @ vectors_DD.T).float()

        if "dual" in run:
            sae.W_enc_FD.copy_(normalize(sae.W_enc_FD @ power(run["dual"])))
        if "whiten" in run:
            self.power_DD = power(run["whiten"])
            self.V_FD = sae.W_enc_FD @ torch.linalg.inv(self.power_DD.double()).float()

    @torch.no_grad()
    def step(self, step: Any, adam: Adam, lr: float, divisor: Tensor | None) -> None:
        for parameter in adam.parameters if divisor is not None else ():
            parameter.grad = None if parameter.grad is None else parameter.grad / divisor
        if "grow" in self.run and not self.is_due(adam):
            return
        if self.power_DD is None:
            step(adam, lr)
        else:
            assert self.encoder.grad is not None
            self.encoder.grad = self.encoder.grad @ self.power_DD
            self.encoder.copy_(self.V_FD)
            step(adam, lr)
            self.V_FD.copy_(self.encoder)
            self.encoder.copy_(self.V_FD @ self.power_DD)
        done, total = int(adam.steps[0]), self.run["steps"]
        if "ema" in self.run and done >= EMA_FROM * total:
            if not hasattr(self, "average"):
                self.average = [parameter.clone() for parameter in adam.parameters]
            for mean, parameter in zip(self.average, adam.parameters, strict=True):
                mean.lerp_(parameter, 1 - self.run["ema"])
                if done == total:
                    parameter.copy_(mean)

    def is_due(self, adam: Adam) -> bool:
        """Whether the optimiser steps now, on the mean gradient of as many batches as this part of the run joins."""
        self.batches += 1
        parts = self.run["grow"]  # the steps that there are may be a few more: an epoch's last batch is smaller
        joined = parts[min((self.batches - 1) * len(parts) // self.run["steps"], len(parts) - 1)]
        grads = [parameter.grad for parameter in adam.parameters]
        self.joined = [old + new for old, new in zip(self.joined, grads, strict=True)] if self.waiting else grads
        self.waiting = (self.waiting + 1) % joined
        if self.waiting:
            return False
        for parameter, grad in zip(adam.parameters, self.joined, strict=True):
            parameter.grad = grad / joined
        return True


@torch.no_grad()
def signum(adam: Adam, lr: float) -> None:
    """Every number moves by the rate against the sign of its gradients' mean: sign SGD with momentum (1802.04434)."""
    for at, parameter in enumerate(adam.parameters):
        if parameter.grad is not None:
            adam.steps[at] += 1
            mean = adam.means[at].lerp_(parameter.grad, 0.05)
            parameter.sub_(lr * adam.factors[at] * mean.sign())


@torch.no_grad()
def muon(adam: Adam, lr: float) -> None:
    """Muon for the matrices (2502.16982: an update of the size of Adam's, 0.2 a number), Adam for the vectors."""
    matrices = [at for at, parameter in enumerate(adam.parameters) if parameter.ndim == 2]
    kept = {at: adam.parameters[at].grad for at in matrices}
    for at in matrices:
        parameter, grad = adam.parameters[at], kept[at]
        if grad is None:
            continue
        mean = adam.means[at].lerp_(grad, 0.05)
        update = orthogonal(torch.lerp(grad, mean, 0.95))
        parameter.sub_(lr * adam.factors[at] * 0.2 * math.sqrt(max(parameter.shape)) * update)
        parameter.grad = None
        adam.steps[at] += 1
    ADAM_STEP(adam, lr)


@torch.no_grad()
def rowwise(adam: Adam, lr: float) -> None:
    """Adam whose second moment is one number a row of a matrix (2406.16793)."""
    for at, parameter in enumerate(adam.parameters):
        grad = parameter.grad
        if grad is None:
            continue
        adam.steps[at] += 1
        t = float(adam.steps[at])
        beta1, beta2 = optimiser.BETAS
        mean, square = adam.means[at].lerp_(grad, 1 - beta1), adam.squares[at]
        squares = grad.square().mean(1, keepdim=True).expand_as(grad) if grad.ndim == 2 else grad.square()
        square.lerp_(squares, 1 - beta2)
        root = (square / (1 - beta2**t)).sqrt_().add_(adam.epsilon)
        parameter.sub_(lr * adam.factors[at] / (1 - beta1**t) * mean / root)


def orthogonal(matrix: Tensor) -> Tensor:
    """About UVᵀ of its USVᵀ, by five steps of Muon's iteration."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-20)).bfloat16()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


ADAM_STEP = Adam.step
UPDATES: dict[str, Any] = {"signum": signum, "muon": muon, "rowwise": rowwise}


def measured(cache: str, run: dict[str, Any]) -> dict[str, Any]:
    Changed(run)
    flags = {
        name: run[name] for name in ("layer", "latents", "k", "lr", "seed", "clip", "anneal_k_from") if name in run
    }
    flags |= {
        "cache": cache,
        "sae": run.get("sae", "topk"),
        "batch_tokens": run["batch"],
        "tokens": run["steps"] * run["batch"],
    }
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        (result,) = train(settings_of(flags | {"out": out}))
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "lr" in line]  # and not the held-out scores
    assert result.held_out is not None
    scores = {name: getattr(result.held_out, name) for name in ("norm_mse", "fvu", "l0")}
    curve = [[line["step"], line["norm_mse"]] for line in steps if line["step"] % 50 == 0]
    return {
        "run": run,
        **scores,
        "dead": result.held_out.dead,
        "seconds": time.perf_counter() - began,
        "curve": curve,
    }


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| change | NormMSE | dead |", "|---|---|---|"]
    for line in lines:
        change = {name: value for name, value in line["run"].items() if BASE.get(name) != value}
        shown = ", ".join(f"{name} {value}" for name, value in change.items()) or "as BASE"
        rows.append(f"| {shown} | {line['norm_mse']:.5f} | {100 * line['dead']:.1f} % |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", type=json.loads, help="JSON objects over BASE")
    parser.add_argument("--cache", help="of the whole demo corpus, layers 9 and 15")
    parser.add_argument("--only-table", action="store_true", help="of the lines that are there")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "ladder.jsonl")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    for change in () if args.only_table else args.run or (*LADDER, *PROJECTION, *SWEEP):
        run = BASE | change
        if any(line["run"] == run for line in done):
            continue
        if (child := os.fork()) == 0:
            line = measured(args.cache, run)
            append(args.results, [{**line, **where()}])
            print(f"{change}: NormMSE {line['norm_mse']:.5f}", flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"{change} failed")
        done.append(json.loads(args.results.read_text().splitlines()[-1]))
    print(table(done))


if __name__ == "__main__":
    main()
