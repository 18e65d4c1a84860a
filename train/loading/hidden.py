"""Stored rows of a shard in; their hidden states, one layer after another, in memory that the caller gives, out.

What a cache holds as int8 is decoded (harvest/cache/quantise.py) in the thread that reads it, some rows at a time, so
that it goes from the page cache to float16 without leaving the core's own.

Dimension letters: m rows read, L layers of the selection, M layers of the cache, D width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch

from routesae.harvest.cache.manifest import CHANNEL_ARRAYS, SCALE, Manifest, layer_name
from routesae.harvest.cache.quantise import Channels, decode, piece_rows
from routesae.harvest.cache.reader import Shard
from routesae.train.loading.row_files import RowFiles
from routesae.train.loading.rows import Rows, Span, read_small, reading

CHANNELS_BYTES = 1 << 26  # of means and deviations of channels, kept for the shards read last


class HiddenRows:
    """Reads the layers of a cache out of `rows`, which reads those of its arrays; safe for several threads."""

    def __init__(self, manifest: Manifest, layers: Sequence[int], rows: Rows):
        self.layers = tuple(layers)
        self.rows = rows
        self.quantised = manifest.dtype == "int8"
        self.columns = [manifest.layers.index(layer) for layer in layers]
        self.shape = (len(manifest.layers), manifest.width)
        self._piece_rows = piece_rows(manifest.width, torch.device("cpu"))
        # Not a method: a cycle would hold the files open for as long as the collector pleases.
        read = partial(_read_channels, rows.files, self.shape, self.columns)
        kept_shards = CHANNELS_BYTES // (8 * len(self.layers) * manifest.width)
        self._channels = lru_cache(maxsize=max(1, kept_shards))(read)
        self._of_thread = threading.local()

    def wanted(self, span: Span) -> list[tuple[str, Span]]:
        """What reading a span reads, by name of the array."""
        names = [layer_name(layer) for layer in self.layers] + ([SCALE] if self.quantised else [])
        channels = [(name, Span(0, self.shape[0])) for name in CHANNEL_ARRAYS] if self.quantised else []
        return [*((name, span) for name in names), *channels]

    def read(self, shard: Shard, span: Span, out_LmD: npt.NDArray[np.generic]) -> None:
        """Copy the span's wanted rows, float16 or float32. Raises FailedRun where a file is gone, cut or altered."""
        if self.quantised:
            self._read_quantised(shard, span, out_LmD)
            return
        for layer, out_mD in zip(self.layers, out_LmD, strict=True):
            self._read_layer(shard, layer, span, out_mD)

    def _read_layer(self, shard: Shard, layer: int, span: Span, out_mD: npt.NDArray[np.generic]) -> None:
        with reading(shard, layer_name(layer)):
            self.rows.read(shard, layer_name(layer), span, out_mD)

    def _read_quantised(self, shard: Shard, span: Span, out_LmD: npt.NDArray[np.generic]) -> None:
        m, width = out_LmD.shape[1:]
        scale_mM = self._scratch("scale", (m, self.shape[0]), np.float32)
        with reading(shard, SCALE):
            self.rows.read(shard, SCALE, span, scale_mM)
        q_mD = self._scratch("q", (m, width), np.int8)
        x_mD = torch.from_numpy(self._scratch("x", (self._piece_rows, width), np.float32))
        for at, channels in enumerate(self._channels(shard)):
            self._read_layer(shard, self.layers[at], span, q_mD)
            scale_m = torch.from_numpy(scale_mM[:, self.columns[at]])
            stored_mD, decoded_mD = torch.from_numpy(q_mD), torch.from_numpy(out_LmD[at])
            for start in range(0, m, self._piece_rows):
                piece = slice(start, min(m, start + self._piece_rows))
                decode(stored_mD[piece], scale_m[piece], channels, x_mD[: piece.stop - start], decoded_mD[piece])

    def _scratch(self, name: str, shape: tuple[int, int], dtype: type[np.generic]) -> npt.NDArray[np.generic]:
        """Memory of this thread, used again and again."""
        held: npt.NDArray[np.generic] | None = getattr(self._of_thread, name, None)
        if held is None or len(held) < shape[0]:
            held = np.empty(shape, dtype)
            setattr(self._of_thread, name, held)
        return held[: shape[0]]


def _read_channels(files: RowFiles, shape: tuple[int, int], columns: list[int], shard: Shard) -> list[Channels]:
    """Of each layer of a selection. shape: [M, D]."""
    found = []
    for name in CHANNEL_ARRAYS:
        values_MD = np.empty(shape, np.float32)
        with reading(shard, name):
            read_small(files, shard, name, values_MD)
        found.append(torch.from_numpy(values_MD[columns]))
    return [Channels(mean_D, std_D) for mean_D, std_D in zip(*found, strict=True)]
