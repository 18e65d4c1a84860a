"""Steps in; a line of metrics.jsonl and of the progress bar every so often out.

Dimension letters: N tokens a batch, L layers.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any, TextIO

import torch

from routesae.reporting import FailedRun, Progress, Report
from routesae.train.evaluate import entropy
from routesae.train.losses import norm_mse
from routesae.train.saes import SAE, Forward


class StepLog:
    """Sums over the steps since the last line of metrics.jsonl, and that line. Reads the device once a line."""

    def __init__(self, sae: SAE, lr: float, total_steps: int, metrics: TextIO, report: Report):
        self.sae, self.peak_lr, self.total_steps = sae, lr, total_steps
        self.metrics, self.report = metrics, report
        self.tokens_done = 0
        self._clear()

    def _clear(self) -> None:
        self.steps = self.tokens = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.sae.device)
        self.routed_L = torch.zeros(len(self.sae.recipe.layers), device=self.sae.device)
        self.began = time.perf_counter()

    @torch.no_grad()
    def add(self, out: Forward, loss: torch.Tensor) -> None:
        n = len(out.x_ND)
        error = norm_mse(out.x_ND, out.reconstruction_ND)
        active = (out.latents.values_NK > 0).sum() / n
        self.sums += torch.stack([loss.detach(), error, active]).double() * n
        if out.routing_NL is not None:
            self.routed_L += torch.bincount(out.routing_NL.argmax(1), minlength=len(self.routed_L))
        self.steps += 1
        self.tokens += n

    def write(self, step: int, lr: float, dead: torch.Tensor) -> None:
        """Raises FailedRun where the loss is no number any more."""
        loss, error, l0 = (self.sums / self.tokens).tolist()
        self.tokens_done += self.tokens
        if not math.isfinite(loss):
            raise FailedRun(f"the loss is {loss} by step {step} of {self.total_steps}; lower --lr {self.peak_lr}")
        tokens_per_second = self.tokens / (time.perf_counter() - self.began)
        line: dict[str, Any] = {
            "step": step,
            "tokens": self.tokens_done,
            "loss": loss,
            "norm_mse": error,
            "l0": l0,
            "dead": float(dead),
            "lr": lr,
            "tokens_per_second": tokens_per_second,
        }
        facts = {"NormMSE": f"{error:.4f}", "L0": f"{l0:.1f}", "dead": f"{float(dead):.1%}"}
        if self.routed_L.any():
            shares_L = self.routed_L / self.tokens
            line["layer_shares"] = dict(zip(map(str, self.sae.recipe.layers), shares_L.tolist(), strict=True))
            line["routing_entropy"] = entropy(shares_L)
            top = int(shares_L.argmax())
            facts["top layer"] = f"{self.sae.recipe.layers[top]}: {float(shares_L[top]):.0%}"
        facts["tokens/s"] = f"{tokens_per_second:,.0f}"
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()
        self.report(Progress(f"train {self.sae.recipe.sae}", step, self.total_steps, "steps", facts))
        self._clear()
