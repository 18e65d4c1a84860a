"""Caches of random hidden states, as large as a measurement of the disk or of memory needs, and the page cache.

The rows are as good as any: nothing measured on them depends on what the numbers are. They go through the project's
own writer, so the files are those of a harvest.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from routesae.harvest.cache import arrays
from routesae.harvest.cache.manifest import (
    CHANNEL_ARRAYS,
    SCALE,
    STATISTICS,
    LayerStatistics,
    Manifest,
    ShardRecord,
    layer_name,
)
from routesae.harvest.cache.quantise import encoded, row_statistics
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.writer import write_shard
from routesae.tests.shards import begin

CONTEXT = 256
PIECE_ROWS = 4096  # random rows, repeated to the length of a shard


def synthetic_cache(
    path: Path,
    *,
    layers: int,
    tokens: int,
    shard_tokens: int,
    width: int = 2048,
    dtype: str = "float16",
) -> Cache:
    """About `tokens` hidden states of `layers` layers: every position is kept. path: not there yet.

    dtype: float16, or int8 of the same numbers.
    """
    names = ("model", "config_hash", "tokenizer_hash", "corpus", "split", "text_field")
    nought = ("min_chars", "documents_short", "documents_malformed", "seed", "skip_positions")
    rows = -(-tokens // CONTEXT)
    tokens_ST = np.zeros((rows, CONTEXT), np.int32)
    manifest = begin(
        path,
        tokens_ST,
        **dict.fromkeys(names, "synthetic"),
        **dict.fromkeys(nought, 0),
        revision=None,
        lm_dtype="float32",
        model_layers=layers,
        layers=tuple(range(1, layers + 1)),
        width=width,
        context=CONTEXT,
        rows=rows,
        shard_rows=max(1, shard_tokens // CONTEXT),
        kept_tokens=rows * CONTEXT,
        dtype=dtype,
        overflow="error",
        corpus_fingerprint="",
        tokens_asked=tokens,
        special_ids=(),
        keep_special=True,
        versions={},
    )
    rng = np.random.default_rng(0)
    piece_nD = rng.standard_normal((PIECE_ROWS, width), np.float32).astype(np.float16)
    for index in range(manifest.shard_count):
        _write(path, manifest, tokens_ST, piece_nD, index)
    return Cache(path)


def _write(path: Path, manifest: Manifest, tokens_ST: arrays.Array, piece_nD: arrays.Array, index: int) -> None:
    first, after = manifest.shard_range(index)
    n = (after - first) * CONTEXT
    hidden_nD = np.resize(piece_nD, (n, manifest.width))
    if manifest.dtype == "int8":
        hidden_nD, others = _quantised(hidden_nD, len(manifest.layers))
    else:
        of_a_layer = row_statistics(torch.from_numpy(piece_nD))
        mean_nL, std_nL = (np.tile(np.resize(of.numpy(), (n, 1)), len(manifest.layers)) for of in of_a_layer)
        others = {"token_mean": mean_nL, "token_std": std_nL}
    order = np.random.default_rng(index).permutation(n).astype(np.int32)

    # Of the float16 numbers that are repeated, whatever they are stored as.
    x_nD = piece_nD.astype(np.float64)
    of_each = LayerStatistics(
        mean=float(x_nD.mean()), mean_square=float((x_nD**2).mean()), max_abs=float(np.abs(x_nD).max()), clipped=0
    )

    def record(hashes: dict[str, str]) -> ShardRecord:
        return ShardRecord(
            index=index,
            rows=(first, after),
            kept=n,
            weights_hash="x",
            batch_sequences=1,
            statistics={str(layer): of_each for layer in manifest.layers},
            hashes=hashes,
        )

    write_shard(
        path,
        manifest,
        index,
        [
            ("token_ids", tokens_ST[first:after]),
            ("order", order),
            *((layer_name(layer), hidden_nD) for layer in manifest.layers),
            *others.items(),
        ],
        record,
    )


def _quantised(hidden_nD: arrays.Array, layers: int) -> tuple[arrays.Array, dict[str, arrays.Array]]:
    """The int8 numbers of rows that are the same in every layer, and the arrays that follow the layers."""
    of_a_layer = torch.from_numpy(hidden_nD)
    q_nD, encoding = encoded(of_a_layer, row_statistics(of_a_layer)[1])
    of_rows = (encoding.mean_n, encoding.std_n, encoding.scale_n)
    others = {
        name: np.tile(of_n.numpy()[:, None], layers) for name, of_n in zip((*STATISTICS, SCALE), of_rows, strict=True)
    }
    of_channels = zip(CHANNEL_ARRAYS, (encoding.channels.mean_D, encoding.channels.std_D), strict=True)
    return q_nD.numpy(), others | {name: np.tile(of_D.numpy(), (layers, 1)) for name, of_D in of_channels}


def drop_from_page_cache(files: Sequence[Path]) -> None:
    """Have the next read of each come from the disk. Raises RuntimeError where the kernel keeps a page in memory."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # a page that is not written yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    kept = sum(map(resident_bytes, files))
    if kept > 0.01 * sum(file.stat().st_size for file in files):
        raise RuntimeError(f"the kernel keeps {kept:,} bytes of {files[0].parent} and others in memory")


def resident_bytes(file: Path) -> int:
    """Bytes of the file that are in the page cache."""
    mapped = np.memmap(file, np.uint8, "r")
    pages = -(-len(mapped) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    address, length = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped))
    if libc.mincore(address, length, found) != 0:
        raise OSError(ctypes.get_errno(), "mincore", str(file))
    return int((np.frombuffer(found, np.uint8) & 1).sum()) * mmap.PAGESIZE
