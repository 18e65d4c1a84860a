"""The layout of a cache, format 5, and its reader. It knows nothing of language models.

    shards/
      zarr.json             a Zarr v3 group; its attributes are the Manifest (routesae.harvest.cache.manifest)
      tokens/               int32 [S, T]: the whole packed corpus
      roles/                uint8 [S, T]: the role of the message that a token spells, from 1 as in the manifest; or 0
      document_starts/      int64 [documents]: flat positions in tokens at which documents begin
        documents.parquet   a row for each: data, the --data it is of; place, where in that; and the fields kept
      shard-00000/          a group: rows 0 … s-1 of tokens; its attributes are a ShardRecord
        token_ids/          int32 [s, T], natural order
        order/              int32 [n]: stored row r is flat position order[r] of token_ids
        layer_04/ …         float16 [n, D]: one array a layer, rows in that same order
        token_mean/         float32 [n, L]: the mean of each of those rows, one column a layer
        token_std/          float32 [n, L]: and its standard deviation (routesae.harvest.cache.quantise)
        chunk_hashes/       uint64 [⌈n / 256⌉, A]: xxh3-64 of the stored bytes of every 256 rows of the A arrays from
                            layer_04 on that have n rows, without padding; its attribute `columns` names them

With --dtype int8 the layers are int8, decoded by three arrays more (routesae.harvest.cache.quantise):

        token_scale/        float32 [n, L]
        channel_mean/       float32 [L, D]
        channel_std/        float32 [L, D]

Every array is one raw file (routesae.harvest.cache.arrays); routesae.harvest.cache.writer writes them. A folder named
shard-NNNNN is whole or does not exist: it is written under a dot-name, fsynced and renamed. `order` is one seeded
permutation of the shard's kept positions, so that a trainer gets shuffled rows out of contiguous reads. Manifest and
records hold the hash of every array (xxh3-64 of its chunk hashes, as little-endian uint64, one for every 256 rows),
and one of themselves. Whoever reads an array compares it: chunk by chunk where rows are read, else as a whole.

In an object store (s3://bucket/shards and the like, routesae.harvest.cache.store) the same names are objects. There a
shard exists once its zarr.json does, which is put last.

Dimension letters: S rows of tokens, T context, s rows of a shard, n kept positions of a shard, L layers, D width.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from routesae.harvest.cache import arrays
from routesae.harvest.cache.manifest import (
    CHANNEL_ARRAYS,
    CHUNK_HASHES,
    DOCUMENTS,
    DTYPES,
    FOLLOWERS,
    ROLES,
    STARTS,
    TOKENS,
    Ids,
    Manifest,
    RingState,
    Roles,
    ShardRecord,
    hashed_arrays,
    row_arrays,
    shard_name,
)
from routesae.harvest.cache.storage import Storage, StoredArray, open_storage
from routesae.machine.files import is_url
from routesae.reporting import FailedRun, WrongInput

LARGEST_DOCUMENTS = 1 << 32  # bytes: some 100 million documents, as columns that repeat themselves are compressed
ROOT_DTYPES = {TOKENS: "<i4", ROLES: "|u1", STARTS: "<i8"}
UNSIGNED_FORMATS = (None, 1, 2, 3)  # refused, but not as damaged: other Zarr groups, and caches of before


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
        """Array `name` whole, compared with its hash: memory-mapped from a disk, in memory out of an object store."""
        return self.array(name).whole()

    def positions(self) -> npt.NDArray[np.int64]:
        """int64 [n]: flat positions in tokens of the stored rows, in their order."""
        order, context = self.read("order"), self.manifest.context
        first, after = self.record.rows
        if len(order) and not (order.min() >= 0 and order.max() < (after - first) * context):
            raise arrays.BadArray("order: names positions that the shard does not have")
        return np.asarray(order, np.int64) + first * context


class Cache:
    """A cache opened for reading. Shards are looked at when they are asked for.

    path: a folder or a URL. Raises WrongInput where it is not a cache.
    """

    def __init__(self, path: Storage | Path | str):
        self.storage = open_storage(path) if isinstance(path, str | Path) else path
        self.shards_at = self.storage  # elsewhere for a harvest whose shards go to an object store
        self.path = self.storage.path
        self._root: dict[str, arrays.Array] = {}
        try:
            self._group = self.storage.read("zarr.json")
            self.manifest = Manifest.from_dict(arrays.read_group(self._group, UNSIGNED_FORMATS))
        except (FileNotFoundError, arrays.BadArray) as bad:
            if arrays.CHECKSUM_DIFFERS in str(bad):
                raise _lost(f"{self.path}/zarr.json", bad) from None
            raise WrongInput(
                f"{self.path} is not a cache folder (no readable zarr.json); make one with routesae harvest "
                f"--out {self.path}"
            ) from None

    @property
    def folder(self) -> Path:
        """Raises WrongInput where the cache is in an object store."""
        return self.storage.folder()

    def has_shard(self, index: int) -> bool:
        return self.shards_at.has_shard(shard_name(index))

    def missing(self) -> list[int]:
        """Indices of the shards that are not there yet; those that a ring has deleted are not among them."""
        present, ring = self.shards_at.shard_names(), self.ring()
        return [i for i in range(ring.used if ring else 0, self.manifest.shard_count) if shard_name(i) not in present]

    def ring(self) -> RingState | None:
        """What the cache says as a ring (cache/ring.py), as it is now; None: its shards stay. Raises WrongInput."""
        if is_url(self.path):
            return None
        try:
            return RingState(**arrays.read_group((self.storage / FOLLOWERS).read("zarr.json")))
        except FileNotFoundError:
            return None
        except (arrays.BadArray, ValueError) as bad:
            raise _lost(f"{self.path}/{FOLLOWERS}/zarr.json", bad) from None

    def require_layers(self, layers: Iterable[int]) -> None:
        """Raises WrongInput where one of them was not harvested."""
        if absent := sorted(set(layers) - set(self.manifest.layers)):
            raise WrongInput(
                f"layer {absent[0]!r} was not harvested; {self.path} holds layers "
                f"{', '.join(map(str, self.manifest.layers))}"
            )

    def require_whole(self, read: Sequence[int] | None = None) -> None:
        """Raises WrongInput where one of these shards is missing or deleted by a ring. None: all that stay."""
        ring = self.ring()
        if ring and (gone := [index for index in read or () if index < ring.used]):
            raise WrongInput(
                f"{self.path} is a ring: {shard_name(gone[0])} and others were deleted once every trainer had used "
                "them; what is held out is still there, and routesae harvest writes all again into a new folder"
            )
        if missing := [index for index in self.missing() if read is None or index in read]:
            remedy = "train with --follow" if ring else "run the same routesae harvest again and it writes just those"
            raise WrongInput(
                f"{self.path} lacks {len(missing)} of its {self.manifest.shard_count} shards (first "
                f"{shard_name(missing[0])}); {remedy}"
            )

    def require_unchanged(self) -> None:
        """Raises FailedRun where another cache, or nothing, is now where this one was opened."""
        try:
            if self.storage.read("zarr.json") == self._group:
                return
            what = "was replaced by another cache"
        except (FileNotFoundError, arrays.BadArray):
            what = "was deleted or unmounted"
        raise FailedRun(
            f"{self.path} {what} while it was written; bring it back and run the same command again, or begin anew"
        )

    def shard(self, index: int) -> Shard:
        """Raises BadArray where the shard's record is missing or not one."""
        name = shard_name(index)
        try:
            attributes = arrays.read_group(self.shards_at.record(name))
        except FileNotFoundError:
            raise arrays.BadArray("zarr.json missing or unreadable") from None
        return Shard(self.shards_at / name, self.manifest, ShardRecord.from_dict(attributes, self.manifest, index))

    def shards(self) -> Iterator[Shard]:
        """Every shard that is there, in order; of a ring those that stay. Raises WrongInput where one is damaged."""
        present, first = self.shards_at.shard_names(), self.manifest.first_held_out_shard if self.ring() else 0
        for index in range(first, self.manifest.shard_count):
            if shard_name(index) in present:
                yield self.opened(index)

    def opened(self, index: int) -> Shard:
        """Raises WrongInput where the shard is damaged or missing."""
        try:
            return self.shard(index)
        except arrays.BadArray as bad:
            raise damaged(f"{self.path}/{shard_name(index)}", bad) from bad

    def tokens(self) -> Ids:
        """int32 [S, T], memory-mapped and compared with its hash. Raises WrongInput where it is damaged."""
        return self._read(TOKENS)

    def roles(self) -> Roles:
        """uint8 [S, T]: each token's role, counted from 1 in the manifest's roles, or 0. Raises as `tokens`."""
        return self._read(ROLES)

    def kept(self, first: int, after: int) -> npt.NDArray[np.bool_]:
        """bool [after - first, T]: the positions of some rows that have hidden states. Raises as `tokens`."""
        return self.manifest.kept(self.tokens()[first:after], self.roles()[first:after])

    def document_starts(self) -> npt.NDArray[np.int64]:
        """int64 [documents]: flat positions in tokens at which documents begin, ascending. Raises as `tokens`."""
        return self._read(STARTS)

    def documents(self) -> Any:
        """Where each document is from, as a pyarrow Table: data, place and the fields kept. Raises as `tokens`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            data = documents_bytes(self.storage, self.manifest)
            names = ["data", "place", *self.manifest.keep_fields]
            with pq.ParquetFile(pa.BufferReader(data), read_dictionary=names) as file:  # what recurs is held once
                if file.schema_arrow.names != names or file.metadata.num_rows != len(self.document_starts()):
                    raise arrays.BadArray("its columns or the number of its rows are others")
                return file.read()
        except (arrays.BadArray, FileNotFoundError, pa.ArrowException) as bad:
            raise _lost(f"{self.path}/{DOCUMENTS}", bad) from bad

    def _read(self, name: str) -> arrays.Array:
        if name not in self._root:
            try:
                self._root[name] = root_array(self.storage, self.manifest, name).whole()
            except arrays.BadArray as bad:
                raise _lost(f"{self.path}/{name}", bad) from bad
        return self._root[name]


def root_array(storage: Storage, manifest: Manifest, name: str) -> StoredArray:
    """tokens, roles or document_starts of a cache whose folder is `storage`. Raises BadArray."""
    shape = (manifest.documents,) if name == STARTS else (manifest.rows, manifest.context)
    return (storage / name).array(shape, ROOT_DTYPES[name], manifest.root_hashes[name])


def documents_bytes(storage: Storage, manifest: Manifest) -> bytes:
    """documents.parquet, compared with its hash. Raises BadArray, and FileNotFoundError."""
    data = storage.read(DOCUMENTS, LARGEST_DOCUMENTS)
    if xxhash.xxh3_64_hexdigest(data) != manifest.documents_hash:
        raise arrays.BadArray(arrays.CHECKSUM_DIFFERS)
    return data


def _lost(path: str, bad: Exception) -> WrongInput:
    return WrongInput(
        f"{path} is damaged: {bad}. The cache cannot be repaired without it; harvest it again, into a new folder"
    )


def damaged(path: Path | str, bad: arrays.BadArray) -> WrongInput:
    """The error for a cache with a bad array at `path`."""
    return WrongInput(
        f"{path} is damaged: {bad}. `routesae cache verify` lists every bad shard, `routesae cache repair` removes "
        "them, and the same routesae harvest then writes just those"
    )
