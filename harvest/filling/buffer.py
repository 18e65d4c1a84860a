"""One shard in the making: run the LM over its rows, shuffle the kept hidden states of every layer, write them.

Hidden states are checked, measured and scattered to their stored place as each block returns them, on the LM's
device, so that what reaches the disk is one contiguous write a layer. Filling never waits for the device. Committing
waits only for what it does itself, on a stream of its own, and runs beside the next shard's filling. With --dtype
int8 the buffer holds float16, and a layer is encoded when it is its turn to be written.

Dimension letters: s rows a shard, B rows a batch, T context, P positions of a batch, n kept positions of the
shard, m kept positions of a batch, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from routesae.harvest.cache import arrays
from routesae.harvest.cache.manifest import Ids, LayerStatistics, Manifest, ShardRecord, layer_name, shard_order
from routesae.harvest.cache.quantise import Encoding, encoded, row_statistics
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.writer import write_shard
from routesae.harvest.lm.model import LanguageModel
from routesae.harvest.lm.passes import capturing, run_until
from routesae.machine.device import CACHE_DTYPES
from routesae.reporting import FailedRun

PIECE_ROWS = 1024  # to measure at a time: fewer cost more calls, more leave the cores' caches


class ShardBuffer:
    """hidden_LnD of shard `index` on `device`, rows in stored order, with their statistics."""

    def __init__(self, token_ids_sT: Ids, manifest: Manifest, index: int, device: torch.device):
        self.token_ids_sT = token_ids_sT
        self.manifest = manifest
        self.index = index
        self.order = shard_order(token_ids_sT, manifest, index)
        shape = (len(manifest.layers), len(self.order), manifest.width)
        self.hidden_LnD = torch.empty(shape, dtype=CACHE_DTYPES[manifest.dtype], device=device)
        self.limit = torch.finfo(self.hidden_LnD.dtype).max
        self.mean_Ln = torch.empty(shape[:2], device=device)
        self.std_Ln = torch.empty(shape[:2], device=device)
        # Before any cast, and on the device, so that no batch waits for them: each layer's largest −x and x, NaN if a
        # value was; and how many values exceed the limit, counted only if they are to be clipped.
        self.extremes_L2 = torch.zeros((shape[0], 2), device=device)
        self.over_L = torch.zeros(shape[0], dtype=torch.int64, device=device)
        # On a CPU rows pass through all steps while they are in its cache; a GPU wants few, large steps.
        self._piece_rows = PIECE_ROWS if device.type == "cpu" else max(1, token_ids_sT.size)
        # stored row of each flat position; -1 where it is not kept
        self._stored_row = torch.full((token_ids_sT.size,), -1, dtype=torch.int64)
        self._stored_row[torch.from_numpy(self.order).long()] = torch.arange(len(self.order))
        self._filled: torch.cuda.Event | None = None
        self._encodings: list[Encoding] = []  # of the layers written as int8 so far

    # ------------------------------------------------------------------------------------------------------ filling

    def fill(self, model: LanguageModel, batch_sequences: int, step: Callable[[int], None]) -> None:
        """Run the LM over the shard's rows, `batch_sequences` at a time; `step` gets the number of rows of each."""
        layers, context = self.manifest.layers, self.manifest.context
        for start in range(0, len(self.token_ids_sT), batch_sequences):
            token_ids_BT = torch.from_numpy(self.token_ids_sT[start : start + batch_sequences]).long()
            stored = self._stored_row[start * context : start * context + token_ids_BT.numel()]
            kept = torch.nonzero(stored >= 0).squeeze(1)
            kept_m, stored_m = _to_device(kept, model.device), _to_device(stored[kept], model.device)

            def take(layer: int, hidden_BTD: Tensor, kept_m: Tensor = kept_m, stored_m: Tensor = stored_m) -> None:
                self._take(layers.index(layer), hidden_BTD.flatten(0, 1), kept_m, stored_m)

            with capturing(model, layers, take):
                run_until(model, _to_device(token_ids_BT, model.device), layers[-1])
            step(len(token_ids_BT))
        if model.device.type == "cuda":
            self._filled = torch.cuda.current_stream(model.device).record_event()

    def _take(self, at: int, hidden_PD: Tensor, kept_m: Tensor, stored_m: Tensor) -> None:
        clip = self.manifest.overflow == "clip"
        for start in range(0, len(kept_m), self._piece_rows):
            piece = slice(start, start + self._piece_rows)
            kept_mD = hidden_PD.index_select(0, kept_m[piece])
            low, high = torch.aminmax(kept_mD)
            self.extremes_L2[at] = torch.maximum(self.extremes_L2[at], torch.stack([-low, high]).float())
            if clip:  # in float32: bfloat16 would round the limit itself to a value beyond it
                self.over_L[at] += (kept_mD.abs() > self.limit).sum()
                kept_mD = kept_mD.float().clamp_(-self.limit, self.limit)
            # By way of float32: from bfloat16 to float16 at once takes a CPU three times as long.
            kept_mD = kept_mD.float().to(self.hidden_LnD.dtype)
            mean_m, std_m = row_statistics(kept_mD)
            _words(self.hidden_LnD[at]).index_copy_(0, stored_m[piece], _words(kept_mD))
            self.mean_Ln[at].index_copy_(0, stored_m[piece], mean_m)
            self.std_Ln[at].index_copy_(0, stored_m[piece], std_m)

    # --------------------------------------------------------------------------------------------------- committing

    def commit(self, cache: Cache, batch_sequences: int) -> ShardRecord:
        """Check, copy to the host layer by layer, and write the shard. May run in a thread of its own.

        Raises FailedRun if a kept value is not finite or does not fit the cache's dtype, naming layer, document and
        remedy.
        """
        stream: AbstractContextManager[object] = nullcontext()
        if self._filled is not None:  # on CUDA, wait for this shard's filling only, not for the next one's
            copies = torch.cuda.Stream(self.hidden_LnD.device)  # type: ignore[no-untyped-call]
            copies.wait_event(self._filled)
            stream = torch.cuda.stream(copies)
        layers = self.manifest.layers
        with stream:
            for at in range(len(layers)):
                self._check(at, cache)
            return write_shard(
                cache.folder,
                self.manifest,
                self.index,
                self._arrays(),
                lambda hashes: ShardRecord(
                    index=self.index,
                    rows=self.manifest.shard_range(self.index),
                    kept=len(self.order),
                    weights_hash=self.manifest.exact_weights_hash,
                    batch_sequences=batch_sequences,
                    statistics={str(layer): self._layer_statistics(at) for at, layer in enumerate(layers)},
                    hashes=dict(hashes),
                ),
            )

    def _check(self, at: int, cache: Cache) -> None:
        max_abs = float(self.extremes_L2[at].max())  # NaN or infinite if a value was
        overflows = max_abs > self.limit and self.manifest.overflow == "error"
        if np.isfinite(max_abs) and not overflows:
            return
        # What did not fit is now infinite or, rounded or clipped, the largest number that does.
        bad_n = ~(self.hidden_LnD[at].abs() < self.limit).all(dim=1)
        flat = int(self.order[int(torch.nonzero(bad_n)[0])])
        row, position = divmod(flat, self.manifest.context)
        row += self.manifest.shard_range(self.index)[0]
        starts = cache.document_starts()
        document = int(np.searchsorted(starts, row * self.manifest.context + position, side="right"))
        where = f"layer {self.manifest.layers[at]}, document {document}, row {row}, position {position}"
        if not np.isfinite(max_abs):
            raise FailedRun(
                f"the LM returned NaN or infinite values for {int(bad_n.sum())} tokens, one of them at {where}; "
                "run it with --lm-dtype float32, or leave that document out"
            )
        dtype = str(self.hidden_LnD.dtype).removeprefix("torch.")
        raise FailedRun(
            f"values of up to {max_abs:,.0f} in {int(bad_n.sum())} tokens do not fit {dtype} "
            f"(at most {self.limit:,.0f}), one of them at {where}; --overflow clip cuts and counts them, "
            "--dtype float32 holds them"
        )

    def _arrays(self) -> Iterator[tuple[str, arrays.Array]]:
        """Every array, by name, in the order of the format."""
        yield "token_ids", self.token_ids_sT
        yield "order", self.order
        layers = self.manifest.layers
        if self.hidden_LnD.is_cuda:
            hidden = self._copied_to_host()
        else:
            hidden = (self._to_write(at).numpy() for at in range(len(layers)))
        for layer, hidden_nD in zip(layers, hidden, strict=True):
            yield layer_name(layer), hidden_nD
        yield "token_mean", _columns(self.mean_Ln)
        yield "token_std", _columns(self.std_Ln)
        if self._encodings:
            yield "token_scale", _columns(torch.stack([one.scale_n for one in self._encodings]))
            yield "channel_mean", torch.stack([one.channels.mean_D for one in self._encodings]).cpu().numpy()
            yield "channel_std", torch.stack([one.channels.std_D for one in self._encodings]).cpu().numpy()

    def _to_write(self, at: int) -> Tensor:
        """A layer's numbers, on the device, as they go to the disk; called for each layer in its turn."""
        if self.manifest.dtype != "int8":
            return self.hidden_LnD[at]
        q_nD, encoding = encoded(self.hidden_LnD[at], self.std_Ln[at])
        self.mean_Ln[at], self.std_Ln[at] = encoding.mean_n, encoding.std_n  # of the rows as they are read back
        self._encodings.append(encoding)
        return q_nD

    def _copied_to_host(self) -> Iterator[arrays.Array]:
        """The layers by way of two pinned buffers: one is filled while the other is written."""
        count = len(self.manifest.layers)
        dtype = torch.int8 if self.manifest.dtype == "int8" else self.hidden_LnD.dtype
        pinned = [torch.empty(self.hidden_LnD.shape[1:], dtype=dtype, pin_memory=True) for _ in range(min(2, count))]

        def copy(at: int) -> tuple[Tensor, torch.cuda.Event]:
            copied_nD = pinned[at % 2].copy_(self._to_write(at), non_blocking=True)
            return copied_nD, torch.cuda.current_stream(self.hidden_LnD.device).record_event()

        ahead = copy(0)
        for at in range(count):
            copied_nD, arrived = ahead
            if at + 1 < count:
                ahead = copy(at + 1)
            arrived.synchronize()
            yield copied_nD.numpy()

    def _layer_statistics(self, at: int) -> LayerStatistics:
        """Of a layer that is written."""
        width, n = self.manifest.width, max(1, len(self.order))
        mean_n, variance_n = self.mean_Ln[at].double(), self.std_Ln[at].double().square()
        square_n = (variance_n * (width - 1) + mean_n.square() * width) / width  # the row's mean square
        lost = self._encodings[at] if self._encodings else None
        return LayerStatistics(
            mean=float(mean_n.sum()) / n,
            mean_square=float(square_n.sum()) / n,
            max_abs=float(self.extremes_L2[at].max()),
            clipped=int(self.over_L[at]),
            int8_fvu=None if lost is None else float(lost.fvu),
            int8_norm_mse=None if lost is None else float(lost.norm_mse),
        )


def _words(rows_nD: Tensor) -> Tensor:
    """The same memory as int64, if rows divide into such: a copy takes its time by the number."""
    whole = rows_nD.shape[1] * rows_nD.element_size() % 8 == 0
    return rows_nD.view(torch.int64) if whole else rows_nD


def _columns(values_Ln: Tensor) -> arrays.Array:
    """values_nL on the host."""
    return values_Ln.T.contiguous().cpu().numpy()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
