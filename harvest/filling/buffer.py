"""One shard in the making: run the LM over its rows, shuffle the kept hidden states of every layer, write them.

Hidden states are checked, measured and appended to the buffer as each block returns them, on the LM's device. A layer
is put into stored order when it is its turn to be written: a CPU takes a third of the time to read rows in a random
order that it takes to write them so. Filling never waits for the device. Committing waits only for what it does
itself, on a stream of its own, and runs beside the next shard's filling. With --dtype int8 the buffer holds float16,
and a layer is encoded when it is its turn.

Dimension letters: s rows a shard, B rows a batch, T context, P positions of a batch, n kept positions of the
shard, m kept positions of a batch, L layers, D width.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
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


class Staging:
    """What the shards of a run are held in, one after another.

    layers: as many as are written at once, pinned where they come from a GPU. stream: what copies them there. free:
    the device's memory of shards that are written. Fresh memory, which the kernel zeroes, costs a CPU more time than
    all that is done to what is put there.
    """

    def __init__(self, manifest: Manifest, device: torch.device):
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        dtype = torch.int8 if manifest.dtype == "int8" else CACHE_DTYPES[manifest.dtype]
        layers, kept = len(manifest.layers), min(manifest.shard_rows, manifest.rows) * manifest.context
        self.shape, self.device = (layers, kept, manifest.width), device
        at_once = range(min(arrays.WRITERS, layers))
        self.layers = [torch.empty(self.shape[1:], dtype=dtype, pin_memory=cuda) for _ in at_once]
        self.free: list[Tensor] = []


class ShardBuffer:
    """hidden_LnD of shard `index` on the device, with their statistics; rows as the LM reads them."""

    def __init__(
        self, token_ids_sT: Ids, kept_sT: npt.NDArray[np.bool_], manifest: Manifest, index: int, staging: Staging
    ):
        self.token_ids_sT = token_ids_sT
        self.manifest = manifest
        self.index = index
        self.order = shard_order(kept_sT, manifest, index)
        self.staging, device, dtype = staging, staging.device, CACHE_DTYPES[manifest.dtype]
        self._memory = staging.free.pop() if staging.free else torch.empty(staging.shape, dtype=dtype, device=device)
        self.hidden_LnD = self._memory[:, : len(self.order)]
        self.limit = torch.finfo(self.hidden_LnD.dtype).max
        self.statistics_2Ln = torch.empty((2, *self.hidden_LnD.shape[:2]), device=device)  # means and deviations
        # Before any cast, and on the device, so that no batch waits for them: each layer's largest −x and x, NaN if a
        # value was; and how many values exceed the limit, counted only if they are to be clipped.
        self.extremes_L2 = torch.zeros((len(manifest.layers), 2), device=device)
        self.over_L = torch.zeros(len(manifest.layers), dtype=torch.int64, device=device)
        # On a CPU rows pass through all steps while they are in its cache; a GPU wants few, large steps.
        self._piece_rows = PIECE_ROWS if device.type == "cpu" else max(1, token_ids_sT.size)
        self._kept_n = np.sort(self.order)  # flat positions, in the rows' order here
        self._place_n = _to_device(torch.from_numpy(np.searchsorted(self._kept_n, self.order)), device)  # as stored
        self._filled: torch.cuda.Event | None = None
        self._encodings: list[Encoding] = []  # of the layers written as int8 so far

    # ------------------------------------------------------------------------------------------------------ filling

    def fill(self, model: LanguageModel, batch_sequences: int, step: Callable[[int], None]) -> None:
        """Run the LM over the shard's rows, `batch_sequences` at a time; `step` gets the number of rows of each."""
        layers, context = self.manifest.layers, self.manifest.context
        for start in range(0, len(self.token_ids_sT), batch_sequences):
            token_ids_BT = torch.from_numpy(self.token_ids_sT[start : start + batch_sequences]).long()
            begin = start * context
            first, after = np.searchsorted(self._kept_n, [begin, begin + token_ids_BT.numel()]).tolist()
            kept_m = _to_device(torch.from_numpy(self._kept_n[first:after] - begin), model.device)

            def take(layer: int, hidden_BTD: Tensor, kept_m: Tensor = kept_m, first: int = first) -> None:
                self._take(layers.index(layer), hidden_BTD.flatten(0, 1), kept_m, first)

            with capturing(model, layers, take):
                run_until(model, _to_device(token_ids_BT, model.device), layers[-1])
            step(len(token_ids_BT))
        if model.device.type == "cuda":
            self._filled = torch.cuda.current_stream(model.device).record_event()

    def _take(self, at: int, hidden_PD: Tensor, kept_m: Tensor, first: int) -> None:
        """Append the kept ones of the positions to a layer, whose first `first` rows are there."""
        for start in range(0, len(kept_m), self._piece_rows):
            kept_mD = hidden_PD.index_select(0, kept_m[start : start + self._piece_rows])
            rows = slice(first + start, first + start + len(kept_mD))
            low, high = torch.aminmax(kept_mD)
            self.extremes_L2[at] = torch.maximum(self.extremes_L2[at], torch.stack([-low, high]).float())
            # By way of float32: from bfloat16 to float16 at once takes a CPU three times as long, and bfloat16 would
            # round the limit itself to a value beyond it.
            kept_mD = kept_mD.float()
            if self.manifest.overflow == "clip":
                self.over_L[at] += (kept_mD.abs() > self.limit).sum()
                kept_mD.clamp_(-self.limit, self.limit)
            self.hidden_LnD[at, rows] = kept_mD
            kept_mD.copy_(self.hidden_LnD[at, rows])  # as it is stored
            self.statistics_2Ln[:, at, rows] = torch.stack(row_statistics(kept_mD, scratch_mD=kept_mD))

    # --------------------------------------------------------------------------------------------------- committing

    def commit(self, cache: Cache, batch_sequences: int) -> ShardRecord:
        """Check, copy to the host layer by layer, and write the shard. May run in a thread of its own, one at a time.

        Raises FailedRun if a kept value is not finite or does not fit the cache's dtype, naming layer, document and
        remedy.
        """
        if self.staging.stream is not None and self._filled is not None:  # this shard's filling, not the next one's
            self.staging.stream.wait_event(self._filled)
        layers = self.manifest.layers
        with torch.cuda.stream(self.staging.stream):
            for at in range(len(layers)):
                self._check(at, cache)
            # Beside the others, whose memory the LM's stream would have for something else while it is read here.
            self.stored_2Ln = self.statistics_2Ln[:, :, self._place_n]
            record = write_shard(
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
        self.staging.free.append(self._memory)
        return record

    def _check(self, at: int, cache: Cache) -> None:
        max_abs = float(self.extremes_L2[at].max())  # NaN or infinite if a value was
        overflows = max_abs > self.limit and self.manifest.overflow == "error"
        if np.isfinite(max_abs) and not overflows:
            return
        # What did not fit is now infinite or, rounded or clipped, the largest number that does.
        bad_n = ~(self.hidden_LnD[at].abs() < self.limit).all(dim=1)
        flat = int(self._kept_n[int(torch.nonzero(bad_n)[0])])
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
        """Every array, by name, in the order of the format; layers in memory that `write_shard` is done with."""
        yield "token_ids", self.token_ids_sT
        yield "order", self.order
        for at, layer in enumerate(self.manifest.layers):
            staged_nD = self.staging.layers[at % len(self.staging.layers)][: len(self.order)]
            self._stage(at, staged_nD)
            if self.staging.stream is not None:
                self.staging.stream.synchronize()
            yield layer_name(layer), staged_nD.numpy()
        yield "token_mean", _columns(self.stored_2Ln[0])
        yield "token_std", _columns(self.stored_2Ln[1])
        if self._encodings:
            yield "token_scale", _columns(torch.stack([one.scale_n for one in self._encodings]))
            yield "channel_mean", torch.stack([one.channels.mean_D for one in self._encodings]).cpu().numpy()
            yield "channel_std", torch.stack([one.channels.std_D for one in self._encodings]).cpu().numpy()

    def _stage(self, at: int, staged_nD: Tensor) -> None:
        """Copy a layer's numbers, as they go to the disk, to memory of the host; called for each in its turn."""
        if self.manifest.dtype != "int8" and staged_nD.device == self._place_n.device:
            torch.index_select(self.hidden_LnD[at], 0, self._place_n, out=staged_nD)
            return
        stored_nD = self.hidden_LnD[at].index_select(0, self._place_n)
        if self.manifest.dtype == "int8":
            stored_nD, encoding = encoded(stored_nD, self.stored_2Ln[1, at])
            # Of the rows as they are read back.
            self.stored_2Ln[:, at] = torch.stack([encoding.mean_n, encoding.std_n])
            self._encodings.append(encoding)
        staged_nD.copy_(stored_nD, non_blocking=True)

    def _layer_statistics(self, at: int) -> LayerStatistics:
        """Of a layer that is written."""
        width, n = self.manifest.width, max(1, len(self.order))
        mean_n, variance_n = self.stored_2Ln[0, at].double(), self.stored_2Ln[1, at].double().square()
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


def _columns(values_Ln: Tensor) -> arrays.Array:
    """values_nL on the host."""
    return values_Ln.T.contiguous().cpu().numpy()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
