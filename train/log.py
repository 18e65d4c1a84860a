"""Steps in; a line of metrics.jsonl, of every tracker and of the progress bar every so often out.

Dimension letters: F latents, L layers.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from routesae.machine.files import refuse_link
from routesae.reporting import FailedRun
from routesae.train.evaluate import entropy
from routesae.train.losses import Objective
from routesae.train.ranks.distributed import batch_rows, batch_sum
from routesae.train.saes import SAE, Forward
from routesae.train.trackers import Tracker

METRICS = "metrics.jsonl"


class StepLog:
    """Sums over the steps since the last line, and that line. Reads the device once a line.

    folder: where the lines go; None: nowhere, as another rank writes them.
    """

    def __init__(self, sae: SAE, folder: Path | None, trackers: list[Tracker], peak_lr: float):
        self.sae, self.trackers, self.peak_lr = sae, trackers, peak_lr
        path = Path(os.devnull) if folder is None else folder / METRICS
        refuse_link(path)
        self.file = path.open("a")
        self.writes = folder is not None
        self.tokens_done = 0
        self.lr = 0.0
        self.steps = self.tokens = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=sae.device)  # loss, NormMSE, L0; each times tokens
        self.lost = torch.zeros((), dtype=torch.int64, device=sae.device)  # the first step whose loss was no number
        self.routed_L = torch.zeros(len(sae.recipe.layers), dtype=torch.float64, device=sae.device)
        self.waited_seconds = 0.0  # for batches
        self.began = time.perf_counter()

    @torch.no_grad()
    def add(self, out: Forward, objective: Objective, counts_F: Tensor, tokens: int, lr: float, step: int) -> None:
        """counts_F: on how many of the batch's rows each latent was active. tokens: of the batch."""
        l0 = counts_F.sum() / batch_rows(len(out.x_ND))
        self.sums += torch.stack([objective.total.double(), objective.norm_mse.double(), l0.double()]) * tokens
        self.lost = torch.where((self.lost == 0) & ~objective.total.isfinite(), step, self.lost)
        if out.routing_NL is not None:
            tokens_L = batch_sum(torch.bincount(out.routing_NL.argmax(1), minlength=len(self.routed_L)))
            self.routed_L += tokens_L * (tokens / batch_rows(len(out.routing_NL)))
        self.steps += 1
        self.tokens += tokens
        self.lr = lr

    def require_finite(self) -> None:
        """Raises FailedRun naming the step where the loss became no number. Waits for the device."""
        if lost := int(self.lost):
            raise FailedRun(f"the loss became no number at step {lost}; lower --lr {self.peak_lr}")

    def write(self, step: int, dead: Tensor) -> dict[str, str]:
        """The line; returns what of it a progress bar shows. Raises FailedRun where the loss is no number."""
        self.require_finite()
        loss, error, l0 = (self.sums / self.tokens).tolist()
        self.tokens_done += self.tokens
        seconds = time.perf_counter() - self.began
        tokens_per_second = self.tokens / seconds
        line: dict[str, Any] = {
            "step": step,
            "tokens": self.tokens_done,
            "loss": loss,
            "norm_mse": error,
            "l0": l0,
            "dead": float(dead),
            "lr": self.lr,
            "tokens_per_second": tokens_per_second,
            "data_wait": self.waited_seconds / seconds,
        }
        facts = {"NormMSE": f"{error:.4f}", "L0": f"{l0:.1f}", "dead": f"{float(dead):.1%}"}
        if self.routed_L.any():
            shares_L = self.routed_L / self.tokens
            line["layer_shares"] = dict(zip(map(str, self.sae.recipe.layers), shares_L.tolist(), strict=True))
            line["routing_entropy"] = entropy(shares_L)
            top = int(shares_L.argmax())
            facts["top layer"] = f"{self.sae.recipe.layers[top]}: {float(shares_L[top]):.0%}"
        facts["tokens/s"] = f"{tokens_per_second:,.0f}"
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for tracker in self.trackers:
            tracker.log(step, line)
        self.sums.zero_()
        self.routed_L.zero_()
        self.steps = self.tokens = 0
        self.waited_seconds = 0.0
        self.began = time.perf_counter()
        return facts

    def tensors(self) -> dict[str, Tensor]:
        """The sums since the last line, for a checkpoint."""
        return {"log.sums": self.sums, "log.routed": self.routed_L}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.sums.copy_(tensors["log.sums"])
        self.routed_L.copy_(tensors["log.routed"])

    def facts(self) -> dict[str, Any]:
        """Where metrics.jsonl stands, so that a resumed run can cut what came after its checkpoint."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {
            "metrics_bytes": self.file.tell(),
            "tokens_done": self.tokens_done,
            "log_steps": self.steps,
            "log_tokens": self.tokens,
        }

    def load_facts(self, facts: dict[str, Any]) -> None:
        """Raises FailedRun where metrics.jsonl has lost what the checkpoint knew of."""
        self.tokens_done, self.steps, self.tokens = facts["tokens_done"], facts["log_steps"], facts["log_tokens"]
        if not self.writes:
            return
        size = self.file.seek(0, os.SEEK_END)
        if size < facts["metrics_bytes"]:
            raise FailedRun(f"{self.file.name} is {size} bytes, shorter than at its checkpoint; start again")
        self.file.truncate(facts["metrics_bytes"])
        self.file.seek(0, os.SEEK_END)  # truncating leaves tell(), which the next checkpoint keeps, where it was

    def close(self) -> None:
        self.file.close()
        for tracker in self.trackers:
            tracker.close()
