"""The log of an SAE in training: every few steps a line for metrics.jsonl, the trackers and the progress bar.

Dimension letters: F latents, L layers.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from pydantic import TypeAdapter
from torch import Tensor

from routesae.machine.files import BadFile, parse_json, read_bytes, reading, refuse_link, signed
from routesae.reporting import FailedRun
from routesae.train.evaluate import entropy
from routesae.train.folder.checkpoint import COPY_WHOLE, METRICS_FILE, Numbers
from routesae.train.losses import Objective
from routesae.train.ranks.distributed import batch_rows, batch_sum
from routesae.train.saes import SAE, Forward
from routesae.train.sparse.pairs import counted
from routesae.train.trackers import Tracker

log = logging.getLogger(__name__)
LARGEST_METRICS_BYTES = 1 << 28


class StepLog:
    """Sums over the steps since the last line. Waits for the device once a line.

    folder: where metrics.jsonl is written; None on ranks that do not write it.
    """

    def __init__(self, sae: SAE, folder: Path | None, trackers: list[Tracker], peak_lr: float):
        self.sae, self.trackers, self.peak_lr = sae, trackers, peak_lr
        self.writes = folder is not None
        self.path = Path(os.devnull) if folder is None else folder / METRICS_FILE
        self.file = _open(self.path)
        self.tokens_done = 0  # up to the last line
        self.lr, self.dead = 0.0, 0.0
        self.tokens = 0  # since the last line
        self.start = torch.zeros((), dtype=torch.float64, device=sae.device)  # NormMSE of the first step
        self.sums = torch.zeros(3, dtype=torch.float64, device=sae.device)  # loss, NormMSE, L0; each times tokens
        self.first_bad_step = torch.zeros((), dtype=torch.int64, device=sae.device)  # whose loss was not finite
        self.routed_L = torch.zeros(len(sae.recipe.layers), dtype=torch.float64, device=sae.device)
        self.waited_seconds = 0.0  # for batches
        self.began = time.perf_counter()

    @torch.no_grad()
    def add(self, out: Forward, objective: Objective, counts_F: Tensor, tokens: int, lr: float, step: int) -> None:
        """counts_F: on how many of the batch's rows each latent was active. tokens: of the whole batch."""
        l0 = counts_F.sum() / batch_rows(len(out.x_ND))
        self.sums += torch.stack([objective.total.double(), objective.norm_mse.double(), l0.double()]) * tokens
        if step == 1:
            self.start.copy_(objective.norm_mse)
        is_first = (self.first_bad_step == 0) & ~objective.total.isfinite()
        self.first_bad_step = torch.where(is_first, step, self.first_bad_step)
        if out.routing_NL is not None:
            at_N = out.routing_NL.argmax(1)
            tokens_L = batch_sum(counted(at_N, len(self.routed_L), torch.ones_like(at_N)))
            self.routed_L += tokens_L * (tokens / batch_rows(len(out.routing_NL)))
        self.tokens += tokens
        self.lr = lr

    def require_finite(self) -> None:
        """Raises FailedRun naming the first step whose loss was NaN or infinite. Waits for the device."""
        if step := int(self.first_bad_step):
            raise FailedRun(f"the loss is NaN or infinite at step {step}; lower --lr {self.peak_lr}")

    def write(self, step: int, dead: int) -> dict[str, str]:
        """Write a line and return what a progress bar shows of it. dead: how many latents are.

        Raises FailedRun if a loss was not finite.
        """
        self.require_finite()
        loss, error, l0 = (self.sums / self.tokens).tolist()
        self.tokens_done += self.tokens
        self.dead = dead / self.sae.latents
        seconds = time.perf_counter() - self.began
        line: dict[str, Any] = {
            "step": step,
            "tokens": self.tokens_done,
            "loss": loss,
            "norm_mse": error,
            "l0": l0,
            "dead": self.dead,
            "lr": self.lr,
            "tokens_per_second": self.tokens / seconds,
            "data_wait": self.waited_seconds / seconds,
        }
        shown = {"NormMSE": f"{error:.4f}", "L0": f"{l0:.1f}", "dead": f"{self.dead:.1%}"}
        if self.routed_L.any():
            layers, shares_L = self.sae.recipe.layers, self.routed_L / self.tokens
            line["layer_shares"] = dict(zip(map(str, layers), shares_L.tolist(), strict=True))
            line["routing_entropy"] = entropy(shares_L)
            top = int(shares_L.argmax())
            shown[f"layer {layers[top]}"] = f"{float(shares_L[top]):.0%}"
        shown["tokens/s"] = f"{line['tokens_per_second']:,.0f}"
        self.file.write(json.dumps(signed(line)) + "\n")
        self.file.flush()
        self._tell(lambda tracker: tracker.log(step, line))
        self.sums.zero_()
        self.routed_L.zero_()
        self.tokens, self.waited_seconds, self.began = 0, 0.0, time.perf_counter()
        return shown

    def write_held_out(self, step: int, scores: dict[str, Any]) -> None:
        """Give the trackers the scores on the held-out rows; cfg.json has them anyway."""
        known = {name: value for name, value in scores.items() if value is not None}
        self._tell(lambda tracker: tracker.log(step, {"held_out": known}))

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """What a tracker raises is warned of, and the run goes on without it: its lines are in metrics.jsonl."""
        for tracker in list(self.trackers):
            try:
                what(tracker)
            except Exception as error:
                log.warning("%s takes no more lines (%s: %s)", type(tracker).__name__, type(error).__name__, error)
                self.trackers.remove(tracker)

    def keep(self) -> None:
        """Have all lines on the disk, also if somebody deleted the folder: the open file still has them."""
        self.file.flush()
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file.seek(0)
            deleted, self.file = self.file, _open(self.path)
            self.file.write(deleted.read())
            self.file.flush()
            deleted.close()
        if self.writes:
            os.fsync(self.file.fileno())

    def tensors(self) -> dict[str, Tensor]:
        """The state for a checkpoint: sums, and how long metrics.jsonl is, which is then on the disk."""
        self.keep()
        counts = torch.tensor([self.file.tell(), self.tokens_done, self.tokens])
        return {"log.start": self.start, "log.sums": self.sums, "log.routed": self.routed_L, "log.counts": counts}

    def restore(self, length: int, tokens_done: int, tokens: int) -> None:
        """Go on from a checkpoint: cut metrics.jsonl back to its length then. Raises FailedRun if it is shorter."""
        self.tokens_done, self.tokens = tokens_done, tokens
        if not self.writes:
            return
        size = self.file.seek(0, os.SEEK_END)
        if size < length:
            raise FailedRun(f"{self.file.name} has {size} bytes, fewer than at its checkpoint; start again")
        self.file.truncate(length)
        self.file.seek(0, os.SEEK_END)  # truncating does not move tell(), which the next checkpoint keeps

    def close(self) -> None:
        """Close the file and the trackers; once is enough."""
        with suppress(OSError):  # of a full disk, which has been said; `keep` has written what is to last
            self.file.close()
        self._tell(lambda tracker: tracker.close())
        self.trackers.clear()


def _open(path: Path) -> TextIO:
    refuse_link(path)
    return open(path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))


def read_metrics(folder: Path) -> list[Numbers]:
    """The lines of an SAE's metrics.jsonl, or [] if it has none. Raises WrongInput naming a line that was altered.

    Lines without a hash, of earlier versions, are read as they are.
    """
    path, lines, of_line = folder / METRICS_FILE, list[Numbers](), TypeAdapter(Numbers)
    with reading(path, COPY_WHOLE):
        texts = read_bytes(path, LARGEST_METRICS_BYTES).splitlines() if os.path.lexists(path) else []
    for number, text in enumerate(texts, 1):
        with reading(f"line {number} of {path}", COPY_WHOLE):
            line = parse_json(text)
            if not isinstance(line, dict) or ("hash" in line and line != signed(line)):
                raise BadFile("it is not what was written")
            line.pop("hash", None)
            lines.append(of_line.validate_python(line, strict=True))
    return lines
