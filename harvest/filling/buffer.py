"""One shard in the making: rows of token ids in; the kept hidden states of every layer, shuffled, out to disk.

Hidden states are checked, measured and scattered to their stored place as each block puts them out, on the LM's
device, so that what reaches the disk is one contiguous write a layer. Filling never waits for the device;
committing waits only for what it does itself, on a stream of its own, and runs beside the next shard's filling.
With --dtype int8 the buffer holds float16, and a layer is encoded when it is its turn to be written.

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
from routesae.harvest.cache.manifest import (
    Ids,
    LayerStatistics,
    Manifest,
    ShardRecord,
    layer_name,
    shard_order,
)
from routesae.harvest.cache.quantise import Encoding, encoded
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.statistics import PIECE_ROWS, Extremes, row_statistics
from routesae.harvest.cache.writer import write_shard
from routesae.harvest.lm.model import LanguageModel
from routesae.harvest.lm.passes import capturing, run_until
from routesae.machine.device import CACHE_DTYPES
from routesae.reporting import FailedRun


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
        self.extremes = [Extremes(device) for _ in manifest.layers]
        # On a CPU rows pass through all steps while they are in its cache; a GPU wants few, large steps.
        self._piece_rows = PIECE_ROWS if device.type == "cpu" else max(1, token_ids_sT.size)
        # stored row of each flat position; -1 where it is not kept
        self._stored_row = torch.full((token_ids_sT.size,), -1, dtype=torch.int64)
        self._stored_row[torch.from_numpy(self.order).long()] = torch.arange(len(self.order))
        self._filled: torch.cuda.Event | None = None
        self._encodings: dict[int, Encoding] = {}  # by place among the layers, of those written as int8

    def fill(self, model: LanguageModel, batch_sequences: int, step: Callable[[int], None]) -> None:
        """Run the LM over the shard's rows, `batch_sequences` at a time; `step` is told the rows of each."""
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
            self.extremes[at].add(kept_mD, self.limit if clip else None)
            if clip:  # in float32: bfloat16 would round the limit itself to a value beyond it
                kept_mD = kept_mD.float().clamp_(-self.limit, self.limit)
            # By way of float32: from bfloat16 to float16 at once takes a CPU three times as long.
            kept_mD = kept_mD.float().to(self.hidden_LnD.dtype)
            mean_m, std_m = row_statistics(kept_mD)
            _words(self.hidden_LnD[at]).index_copy_(0, stored_m[piece], _words(kept_mD))
            self.mean_Ln[at].index_copy_(0, stored_m[piece], mean_m)
            self.std_Ln[at].index_copy_(0, stored_m[piece], std_m)

    def commit(self, cache: Cache, weights_hash: str, batch_sequences: int) -> ShardRecord:
        """Check, copy to the host layer by layer, and write the shard. May run in a thread of its own.

        Raises FailedRun where a kept value is not finite or does not fit the cache's dtype, naming layer,
        document and remedy.
        """
        with self._on_copy_stream():
            for at in range(len(self.manifest.layers)):
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
                    weights_hash=weights_hash,
                    batch_sequences=batch_sequences,
                    statistics={
                        str(layer): self._layer_statistics(at) for at, layer in enumerate(self.manifest.layers)
                    },
                    hashes=dict(hashes),
                ),
            )

    def _layer_statistics(self, at: int) -> LayerStatistics:
        """Of a layer that is written."""
        max_abs, clipped = self.extremes[at].finish()
        width, encoding = self.manifest.width, self._encodings.get(at)
        mean_n, std_n = (self.mean_Ln[at], self.std_Ln[at]) if encoding is None else (encoding.mean_n, encoding.std_n)
        mean_n, variance_n = mean_n.double(), std_n.double().square()
        square_n = (variance_n * (width - 1) + mean_n.square() * width) / width  # the row's mean square
        n = max(1, len(self.order))
        return LayerStatistics(
            mean=float(mean_n.sum()) / n,
            mean_square=float(square_n.sum()) / n,
            max_abs=max_abs,
            clipped=clipped,
            int8_fvu=None if encoding is None else float(encoding.lost.fvu),
            int8_norm_mse=None if encoding is None else float(encoding.lost.norm_mse),
        )

    def _arrays(self) -> Iterator[tuple[str, arrays.Array]]:
        """Every array, by name, in the order of the format."""
        yield "token_ids", self.token_ids_sT
        yield "order", self.order
        for layer, hidden_nD in self._layers_on_host():
            yield layer_name(layer), hidden_nD
        yield from self._other_arrays().items()

    def _other_arrays(self) -> dict[str, arrays.Array]:
        """Those that follow the layers, all of which are written by now."""
        if self.manifest.dtype != "int8":
            return {"token_mean": _columns(self.mean_Ln), "token_std": _columns(self.std_Ln)}

        def stacked(take: Callable[[Encoding], Tensor]) -> Tensor:
            return torch.stack([take(self._encodings[at]) for at in range(len(self.manifest.layers))])

        return {
            "token_mean": _columns(stacked(lambda one: one.mean_n)),
            "token_std": _columns(stacked(lambda one: one.std_n)),
            "token_scale": _columns(stacked(lambda one: one.scale_n)),
            "channel_mean": stacked(lambda one: one.channels.mean_D).cpu().numpy(),
            "channel_std": stacked(lambda one: one.channels.std_D).cpu().numpy(),
        }

    def _on_copy_stream(self) -> AbstractContextManager[object]:
        """On CUDA, a stream that waits for this shard's filling only, not for the next one's."""
        if self._filled is None:
            return nullcontext()
        stream = torch.cuda.Stream(self.hidden_LnD.device)  # type: ignore[no-untyped-call]
        stream.wait_event(self._filled)
        return torch.cuda.stream(stream)

    def _layers_on_host(self) -> Iterator[tuple[int, arrays.Array]]:
        layers = self.manifest.layers
        if not self.hidden_LnD.is_cuda:
            yield from ((layer, self._to_write(at).numpy()) for at, layer in enumerate(layers))
            return
        shape = self.hidden_LnD.shape[1:]
        dtype = torch.int8 if self.manifest.dtype == "int8" else self.hidden_LnD.dtype
        staging = [torch.empty(shape, dtype=dtype, pin_memory=True) for _ in layers[:2]]

        def copy(at: int) -> tuple[Tensor, torch.cuda.Event]:
            staged_nD = staging[at % 2].copy_(self._to_write(at), non_blocking=True)
            return staged_nD, torch.cuda.current_stream(self.hidden_LnD.device).record_event()

        copied = copy(0)
        for at, layer in enumerate(layers):
            staged_nD, arrived = copied
            if at + 1 < len(layers):  # into the other buffer, which is written by now, while this one is
                copied = copy(at + 1)
            arrived.synchronize()
            yield layer, staged_nD.numpy()

    def _to_write(self, at: int) -> Tensor:
        """A layer's numbers, on the device, as they go to the disk."""
        if self.manifest.dtype != "int8":
            return self.hidden_LnD[at]
        q_nD, self._encodings[at] = encoded(self.hidden_LnD[at], self.std_Ln[at])
        return q_nD

    def _check(self, at: int, cache: Cache) -> None:
        max_abs, _ = self.extremes[at].finish()  # NaN or infinite where a value was
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
                f"the LM put out NaN or infinite values for {int(bad_n.sum())} tokens, one of them at {where}; "
                "run it with --lm-dtype float32, or leave that document out"
            )
        raise FailedRun(
            f"values of up to {max_abs:,.0f} in {int(bad_n.sum())} tokens do not fit {_name(self.hidden_LnD.dtype)} "
            f"(at most {self.limit:,.0f}), one of them at {where}; --overflow clip cuts and counts them, "
            "--dtype float32 holds them"
        )


def _words(rows_nD: Tensor) -> Tensor:
    """The same memory as long whole numbers, where rows divide into such: a copy takes its time by the number."""
    whole = rows_nD.shape[1] * rows_nD.element_size() % 8 == 0
    return rows_nD.view(torch.int64) if whole else rows_nD


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _columns(values_Ln: Tensor) -> arrays.Array:
    """values_nL on the host."""
    return values_Ln.T.contiguous().cpu().numpy()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
