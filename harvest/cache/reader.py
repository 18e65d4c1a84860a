"""The layout of a cache, format 3, and its reader. It knows nothing of language models.

    shards/
      zarr.json             a Zarr v3 group; its attributes are the Manifest (routesae.harvest.cache.manifest)
      tokens/               int32 [S, T]: the whole packed corpus
      document_starts/      int64 [documents]: flat positions in tokens at which documents begin
      shard-00000/          a group: rows 0 … s-1 of tokens; its attributes are a ShardRecord
        token_ids/          int32 [s, T], natural order
        order/              int32 [n]: stored row r is flat position order[r] of token_ids
        layer_04/ …         float16 [n, D]: one array a layer, rows in that same order
        token_mean/         float32 [n, L]: the mean of each of those rows, one column a layer
        token_std/          float32 [n, L]: and its standard deviation (routesae.harvest.cache.statistics)
        chunk_hashes/       uint64 [⌈n / 256⌉, A]: xxh3-64 of the stored bytes of every 256 rows of the A arrays from
                            layer_04 on that have n rows, without padding; its attribute `columns` names them

With --dtype int8 the layers are int8, decoded by three arrays more (routesae.harvest.cache.quantise):

        token_scale/        float32 [n, L]
        channel_mean/       float32 [L, D]
        channel_std/        float32 [L, D]

Every array is one raw file (routesae.harvest.cache.arrays); routesae.harvest.cache.writer writes them. A folder named
shard-NNNNN is whole or does not exist: it is written under a dot-name, fsynced and renamed. `order` is one seeded
permutation of the shard's kept positions, so that a trainer gets shuffled rows out of contiguous reads. Manifest and
records hold the hash of every array: xxh3-64 of its chunk hashes, as little-endian uint64, one for every 256 rows.

In an object store (s3://bucket/shards and the like, routesae.harvest.cache.store) the same names are objects. There a
shard exists once its zarr.json does, which is put last.

Dimension letters: S rows of tokens, T context, s rows of a shard, n kept positions of a shard, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from routesae.harvest.cache import arrays
from routesae.harvest.cache.manifest import (
    CHANNEL_ARRAYS,
    CHUNK_HASHES,
    DTYPES,
    Ids,
    Manifest,
    ShardRecord,
    hashed_arrays,
    row_arrays,
    shard_name,
)
from routesae.harvest.cache.storage import Storage, StoredArray, chunk_hashes, is_url
from routesae.harvest.cache.store.disk import DiskFolder
from routesae.machine.files import parse_json
from routesae.reporting import WrongInput


def open_storage(path: Path | str) -> Storage:
    """The folder or URL `path`. Raises WrongInput for a URL that cannot be used."""
    if not is_url(path):
        return DiskFolder(Path(path))
    from routesae.harvest.cache.store.bucket import BucketFolder

    return BucketFolder.at(str(path))


class Shard:
    """One shard. Each array is checked (size, index) before its first read.

    Raises BadArray (routesae.harvest.cache.arrays) from every read of a file that is not what the record says.
    """

    def __init__(self, storage: Storage, manifest: Manifest, record: ShardRecord):
        self.storage, self.path = storage, storage.path
        self.manifest, self.record = manifest, record
        self._arrays: dict[str, StoredArray] = {}

    def form(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of array `name`."""
        n, layers, width = self.record.kept, len(self.manifest.layers), self.manifest.width
        forms: dict[str, tuple[tuple[int, ...], str]] = {
            "token_ids": ((self.record.rows[1] - self.record.rows[0], self.manifest.context), "<i4"),
            "order": ((n,), "<i4"),
            CHUNK_HASHES: ((-(-n // arrays.CHUNK_ROWS), len(hashed_arrays(self.manifest))), "<u8"),
            **dict.fromkeys(row_arrays(self.manifest.dtype), ((n, layers), "<f4")),
            **dict.fromkeys(CHANNEL_ARRAYS, ((layers, width), "<f4")),
        }
        return forms.get(name, ((n, width), DTYPES[self.manifest.dtype]))

    def array(self, name: str) -> StoredArray:
        """Array `name`, checked (size, index, metadata) once, by this or by its first read. Raises BadArray."""
        if name not in self._arrays:
            content = self.record.hashes[name]
            self._arrays[name] = (self.storage / name).array(*self.form(name), content)
        return self._arrays[name]

    def read(self, name: str) -> arrays.Array:
        """Array `name` whole: memory-mapped from a disk, in memory out of an object store.

        It is compared with its checksum, unless it is one of those that are read by rows.
        """
        values = self.array(name).read()
        if name not in hashed_arrays(self.manifest) and arrays.array_hash(values) != self.record.hashes[name]:
            raise arrays.BadArray(f"{name}: {arrays.CHECKSUM_DIFFERS}")
        return values

    def chunk_hashes(self, name: str) -> arrays.ChunkHashes:
        """uint64 [C]: of array `name` as it is now, read in pieces."""
        return chunk_hashes(self.array(name))

    def positions(self, first_row: int, after_row: int) -> npt.NDArray[np.int64] | None:
        """Stored rows whose token stands in rows [first_row, after_row) of tokens; None where all do."""
        first, after = self.record.rows
        if first_row <= first and after <= after_row:
            return None
        row = self.read("order") // self.manifest.context + first
        return np.flatnonzero((first_row <= row) & (row < after_row))


class Cache:
    """A cache opened for reading. Shards are looked at when they are asked for.

    path: a folder or a URL. Raises WrongInput where it is not a cache.
    """

    def __init__(self, path: Storage | Path | str):
        self.storage = open_storage(path) if isinstance(path, str | Path) else path
        self.path = self.storage.path
        try:
            self.manifest = Manifest.from_dict(_group_attributes(self.storage.read("zarr.json")))
        except (FileNotFoundError, arrays.BadArray):
            raise WrongInput(
                f"{self.path} is not a cache folder (no readable zarr.json); make one with routesae harvest "
                f"--out {self.path}"
            ) from None

    @property
    def folder(self) -> Path:
        """Raises WrongInput where the cache is in an object store."""
        return self.storage.folder()

    @property
    def address(self) -> str:
        """An absolute path or a URL."""
        return self.storage.address

    def has_shard(self, index: int) -> bool:
        return self.storage.has_shard(shard_name(index))

    def publish(self, index: int) -> None:
        """Called once shard `index` is committed on disk. Here everyone sees it now; a staged cache sends it."""

    def missing(self) -> list[int]:
        """Indices of the shards that are not there yet."""
        present = self.storage.shard_names()
        return [i for i in range(self.manifest.shard_count) if shard_name(i) not in present]

    def require_layers(self, layers: Iterable[int]) -> None:
        """Raises WrongInput where one of them was not harvested."""
        if absent := sorted(set(layers) - set(self.manifest.layers)):
            raise WrongInput(
                f"layer {absent[0]} was not harvested; {self.path} holds layers "
                f"{', '.join(map(str, self.manifest.layers))}"
            )

    def require_whole(self) -> None:
        """Raises WrongInput where shards are missing."""
        if missing := self.missing():
            raise WrongInput(
                f"{self.path} lacks {len(missing)} of its {self.manifest.shard_count} shards (first "
                f"{shard_name(missing[0])}); run the same routesae harvest again and it writes just those"
            )

    def weights_hash(self) -> str | None:
        """Of the LM that wrote the shards, which all agree; None while there is no shard."""
        return next((shard.record.weights_hash for shard in self.shards()), None)

    def shard(self, index: int) -> Shard:
        """Raises BadArray where the shard's record is missing or not one."""
        name = shard_name(index)
        try:
            attributes = _group_attributes(self.storage.record(name))
        except FileNotFoundError:
            raise arrays.BadArray("zarr.json missing or unreadable") from None
        return Shard(self.storage / name, self.manifest, ShardRecord.from_dict(attributes, self.manifest, index))

    def shards(self) -> Iterator[Shard]:
        """Every shard that is there, in order. Raises WrongInput naming the first that is damaged."""
        present = self.storage.shard_names()
        for index in range(self.manifest.shard_count):
            if shard_name(index) in present:
                try:
                    yield self.shard(index)
                except arrays.BadArray as bad:
                    raise damaged(f"{self.path}/{shard_name(index)}", bad) from bad

    def tokens(self) -> Ids:
        """int32 [S, T], memory-mapped."""
        return self._read("tokens")

    def document_starts(self) -> npt.NDArray[np.int64]:
        """int64 [documents]: flat positions in tokens at which documents begin, ascending."""
        return self._read("document_starts")

    def root_array(self, name: str) -> StoredArray:
        """tokens or document_starts. Raises BadArray."""
        manifest = self.manifest
        if name == "tokens":
            return (self.storage / name).array((manifest.rows, manifest.context), "<i4", manifest.tokens_hash)
        return (self.storage / name).array((manifest.documents,), "<i8")

    def _read(self, name: str) -> arrays.Array:
        try:
            return self.root_array(name).read()
        except arrays.BadArray as bad:
            raise WrongInput(
                f"{self.path}/{name} is damaged: {bad}. The cache cannot be repaired without it; harvest it again, "
                "into a new folder"
            ) from bad


def damaged(path: Path | str, bad: arrays.BadArray) -> WrongInput:
    """The error for a cache with a bad array at `path`."""
    return WrongInput(
        f"{path} is damaged: {bad}. `routesae cache verify` lists every bad shard, `routesae cache repair` removes "
        "them, and the same routesae harvest then writes just those"
    )


def _group_attributes(data: bytes) -> dict[str, Any]:
    """The attributes of a Zarr group, out of its zarr.json. Raises BadArray where it is none.

    Plain JSON rather than zarr: a cache of 3,000 shards opens in the time of 3,000 small reads.
    """
    try:
        metadata = parse_json(data)
        attributes, kind = metadata["attributes"], metadata["node_type"]
    except (ValueError, KeyError, TypeError):
        attributes = kind = None
    if kind != "group" or not isinstance(attributes, dict):
        raise arrays.BadArray("zarr.json missing or unreadable")
    return attributes
