"""One shard in the making: rows of token ids in; the kept hidden states of every layer, shuffled, out to disk.

Hidden states are scattered to their stored place as each block puts them out, on the LM's device, so that what
reaches the disk is one contiguous write a layer. Filling never waits for the device; committing waits only for
the copies it makes, on a stream of its own, and runs beside the next shard's filling.

Dimension letters: s rows a shard, B rows a batch, T context, n kept positions of the shard, m kept positions of
a batch, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from routesae.harvest import arrays
from routesae.harvest.cache import Cache, LayerStatistics, Manifest, ShardRecord, shard_order, write_shard
from routesae.harvest.device import CACHE_DTYPES
from routesae.harvest.lm import LanguageModel, capturing, run_until
from routesae.harvest.tokens import Ids
from routesae.reporting import FailedRun


class ShardBuffer:
    """hidden_LnD of shard `index` on `device`, rows in stored order, with running statistics."""

    def __init__(self, token_ids_sT: Ids, manifest: Manifest, index: int, device: torch.device):
        self.token_ids_sT = token_ids_sT
        self.manifest = manifest
        self.index = index
        self.order = shard_order(token_ids_sT, manifest, index)
        shape = (len(manifest.layers), len(self.order), manifest.width)
        self.hidden_LnD = torch.empty(shape, dtype=CACHE_DTYPES[manifest.dtype], device=device)
        self.limit = torch.finfo(self.hidden_LnD.dtype).max
        self.sums = [RunningSums(device) for _ in manifest.layers]
        # stored row of each flat position; -1 where it is not kept
        self._stored_row = torch.full((token_ids_sT.size,), -1, dtype=torch.int64)
        self._stored_row[torch.from_numpy(self.order).long()] = torch.arange(len(self.order))
        self._filled: torch.cuda.Event | None = None

    def fill(self, model: LanguageModel, batch_sequences: int, step: Callable[[int], None]) -> None:
        """Run the LM over the shard's rows, `batch_sequences` at a time; `step` is told the rows of each."""
        layers, context = self.manifest.layers, self.manifest.context
        for start in range(0, len(self.token_ids_sT), batch_sequences):
            token_ids_BT = torch.from_numpy(self.token_ids_sT[start : start + batch_sequences]).long()
            stored = self._stored_row[start * context : start * context + token_ids_BT.numel()]
            kept = torch.nonzero(stored >= 0).squeeze(1)
            kept_m, stored_m = _to_device(kept, model.device), _to_device(stored[kept], model.device)

            def take(layer: int, hidden_BTD: Tensor, kept_m: Tensor = kept_m, stored_m: Tensor = stored_m) -> None:
                self._store(layers.index(layer), hidden_BTD.flatten(0, 1).index_select(0, kept_m), stored_m)

            with capturing(model, layers, take):
                run_until(model, _to_device(token_ids_BT, model.device), layers[-1])
            step(len(token_ids_BT))
        if model.device.type == "cuda":
            self._filled = torch.cuda.current_stream(model.device).record_event()

    def _store(self, at: int, kept_mD: Tensor, stored_m: Tensor) -> None:
        clip = self.manifest.overflow == "clip"
        self.sums[at].add(kept_mD, self.limit if clip else None)
        if clip:  # in float32: bfloat16 would round the limit itself to a value beyond it
            kept_mD = kept_mD.float().clamp_(-self.limit, self.limit)
        self.hidden_LnD[at].index_copy_(0, stored_m, kept_mD.to(self.hidden_LnD.dtype))

    def commit(self, cache: Cache, weights_hash: str, batch_sequences: int) -> ShardRecord:
        """Check, copy to the host layer by layer, and write the shard. May run in a thread of its own.

        Raises FailedRun where a kept value is not finite or does not fit the cache's dtype, naming layer,
        document and remedy.
        """
        with self._on_copy_stream():
            statistics = {}
            for at, layer in enumerate(self.manifest.layers):
                statistics[str(layer)] = self.sums[at].finish()
                self._check(at, statistics[str(layer)], cache)
            return write_shard(
                cache.path,
                self.manifest,
                self.token_ids_sT,
                self.order,
                self._layers_on_host(),
                lambda hashes: ShardRecord(
                    index=self.index,
                    rows=self.manifest.shard_range(self.index),
                    kept=len(self.order),
                    weights_hash=weights_hash,
                    batch_sequences=batch_sequences,
                    statistics=statistics,
                    hashes=hashes,
                ),
                self.index,
            )

    def _on_copy_stream(self) -> AbstractContextManager[object]:
        """On CUDA, a stream that waits for this shard's filling only, not for the next one's."""
        if self._filled is None:
            return nullcontext()
        stream = torch.cuda.Stream(self.hidden_LnD.device)  # type: ignore[no-untyped-call]
        stream.wait_event(self._filled)
        return torch.cuda.stream(stream)

    def _layers_on_host(self) -> Iterator[tuple[int, arrays.Array]]:
        staging = None
        for at, layer in enumerate(self.manifest.layers):
            hidden_nD = self.hidden_LnD[at]
            if hidden_nD.is_cuda:
                if staging is None:
                    staging = torch.empty(hidden_nD.shape, dtype=hidden_nD.dtype, pin_memory=True)
                hidden_nD = staging.copy_(hidden_nD, non_blocking=True)
                torch.cuda.current_stream().synchronize()
            yield layer, hidden_nD.numpy()

    def _check(self, at: int, found: LayerStatistics, cache: Cache) -> None:
        overflows = found.max_abs > self.limit and self.manifest.overflow == "error"
        if np.isfinite(found.max_abs) and not overflows:
            return
        # What did not fit is now infinite or, rounded or clipped, the largest number that does.
        bad_n = ~(self.hidden_LnD[at].abs() < self.limit).all(dim=1)
        flat = int(self.order[int(torch.nonzero(bad_n)[0])])
        row, position = divmod(flat, self.manifest.context)
        row += self.manifest.shard_range(self.index)[0]
        starts = cache.document_starts()
        document = int(np.searchsorted(starts, row * self.manifest.context + position, side="right"))
        where = f"layer {self.manifest.layers[at]}, document {document}, row {row}, position {position}"
        if not np.isfinite(found.max_abs):
            raise FailedRun(
                f"the LM put out NaN or infinite values for {int(bad_n.sum())} tokens, one of them at {where}; "
                "run it with --lm-dtype float32, or leave that document out"
            )
        raise FailedRun(
            f"values of up to {found.max_abs:,.0f} in {int(bad_n.sum())} tokens do not fit {self.manifest.dtype} "
            f"(at most {self.limit:,.0f}), one of them at {where}; --overflow clip cuts and counts them, "
            "--dtype float32 holds them"
        )


class RunningSums:
    """Sums over one layer's kept values, kept on the device so that no batch waits for them."""

    def __init__(self, device: torch.device):
        self._values = 0
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # Σx, Σx², values over the limit
        self._extremes = torch.zeros(2, device=device)

    def add(self, x_mD: Tensor, limit: float | None) -> None:
        """limit: count the finite values beyond it, which takes a pass of its own; None: do not."""
        if x_mD.numel() == 0:
            return
        self._values += x_mD.numel()
        over = x_mD.new_zeros(()) if limit is None else (x_mD.abs() > limit).sum()
        # float32: a square overflows fp16, and bf16 keeps three digits of a sum
        norm = torch.linalg.vector_norm(x_mD, dtype=torch.float32)
        self._sums += torch.stack([x_mD.sum(dtype=torch.float32), norm.square(), over.float()]).double()
        low, high = torch.aminmax(x_mD)  # NaN comes through
        self._extremes = torch.maximum(self._extremes, torch.stack([-low, high]).float())

    def finish(self) -> LayerStatistics:
        """max_abs is NaN or infinite where a value was."""
        total, squares, over = self._sums.tolist()
        n = max(1, self._values)
        max_abs = float(self._extremes.max())
        return LayerStatistics(
            mean=total / n,
            mean_square=squares / n,
            max_abs=max_abs,
            clipped=int(over),
        )


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
