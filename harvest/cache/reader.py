"""The cache on disk, read: its layout and its reader. Knows nothing of language models.

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
        chunk_hashes/       uint64 [⌈n / 256⌉, A]: xxh3-64 of each 256 rows of the A arrays from layer_04 on that have
                            n rows, which its attribute `columns` names; of stored bytes, padding apart

With --dtype int8 the layers are int8, decoded by three arrays more (routesae.harvest.cache.quantise):

        token_scale/        float32 [n, L]
        channel_mean/       float32 [L, D]
        channel_std/        float32 [L, D]

Every array is one raw file (routesae.harvest.cache.arrays); routesae.harvest.cache.writer writes them. A folder named
shard-NNNNN is whole or does not exist: it is written under a dot-name, fsynced and renamed. `order` is one seeded
permutation of the shard's kept positions, so that a trainer gets shuffled rows out of contiguous reads. Caches made
before there were chunk_hashes have none, say so in their manifest, and go on without.

In an object store (s3://bucket/shards and the like, routesae.harvest.cache.store) the same names are objects. There a
shard exists once its zarr.json does, which is put last.

Dimension letters: S rows of tokens, T context, s rows of a shard, n kept positions of a shard, L layers, D width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from routesae.harvest.cache import arrays
from routesae.harvest.cache.manifest import (
    CHANNEL_ARRAYS,
    CHUNK_HASHES,
    DTYPES,
    SCALE,
    STATISTICS,
    Manifest,
    ShardRecord,
    hashed_arrays,
    layer_name,
    shard_name,
)
from routesae.harvest.cache.store.folder import RemoteFolder, is_url
from routesae.harvest.corpus.tokens import Ids
from routesae.machine.files import LARGEST_BYTES, leads_out_of, parse_json, read_json
from routesae.reporting import WrongInput

if TYPE_CHECKING:  # what only a cache in an object store needs
    from routesae.harvest.cache.store.arrays import RemoteArray
    from routesae.harvest.cache.store.shards import RemoteShards

Place = Path | RemoteFolder


class Shard:
    """One shard. Arrays are checked (size, index) before the first read of each.

    Raises BadArray (routesae.harvest.cache.arrays) from every read where the file is not what the record says.
    """

    def __init__(self, path: Place, manifest: Manifest, record: ShardRecord):
        self.path = path
        self.manifest = manifest
        self.record = record
        self._checked: set[str] = set()
        self._remote: dict[str, RemoteArray] = {}

    def _array(self, name: str) -> tuple[Place, tuple[int, ...], str, bool]:
        first, after = self.record.rows
        n = self.record.kept
        if name == "token_ids":
            return self.path / name, (after - first, self.manifest.context), "<i4", False
        if name == "order":
            return self.path / name, (n,), "<i4", False
        if name in (*STATISTICS, SCALE):
            return self.path / name, (n, len(self.manifest.layers)), "<f4", False
        if name in CHANNEL_ARRAYS:
            return self.path / name, (len(self.manifest.layers), self.manifest.width), "<f4", False
        if name == CHUNK_HASHES:
            return self.path / name, (-(-n // arrays.CHUNK_ROWS), len(hashed_arrays(self.manifest))), "<u8", False
        compress = self.manifest.compress != "none"
        return self.path / name, (n, self.manifest.width), DTYPES[self.manifest.dtype], compress

    def row_bytes(self, name: str) -> int:
        """Of a stored row of array `name`, uncompressed."""
        _, shape, dtype, _ = self._array(name)
        return prod(shape[1:]) * np.dtype(dtype).itemsize

    def rows(self, name: str) -> int:
        """Of array `name`."""
        return self._array(name)[1][0]

    def compressed(self, name: str) -> bool:
        """Whether array `name` is not one raw file."""
        return self.manifest.compress != "none" and self._array(name)[3]

    def check(self, name: str) -> None:
        """Size, index and metadata of array `name`; remembered, so only the first call reads."""
        if name not in self._checked:
            folder, shape, dtype, compress = self._array(name)
            if isinstance(folder, RemoteFolder):
                self._remote[name] = _open_remote(folder, shape, dtype, compress=compress)
            else:
                _require_inside(folder.parent.parent, arrays.data_file(folder, len(shape)))
                arrays.check_array(folder, shape, dtype, compress=compress)
            self._checked.add(name)

    def read(self, name: str) -> arrays.Array:
        """Array `name` whole: memory-mapped, or decompressed where the cache is compressed. Out of an object store it
        comes into memory. Small ones are compared with their checksum; those of many bytes a row are not."""
        values = self._read(name)
        if name not in hashed_arrays(self.manifest) and arrays.array_hash(values) != self.record.hashes[name]:
            raise arrays.BadArray(f"{name}: {arrays.CHECKSUM_DIFFERS}")
        return values

    def _read(self, name: str) -> arrays.Array:
        self.check(name)
        folder, shape, dtype, compress = self._array(name)
        if isinstance(folder, RemoteFolder):
            return self._remote[name].read()
        return arrays.map_array(folder, shape, dtype, compress=compress)

    def hashes(self, name: str) -> arrays.Hashed:
        """Of array `name` as it is, read in pieces."""
        self.check(name)
        return self._remote[name].hashes() if name in self._remote else arrays.array_hashes(self._read(name))

    def read_rows(self, name: str, first: int, after: int) -> arrays.Array:
        """Stored rows first … after-1 of a compressed array [after-first, D] of a cache on disk."""
        self.check(name)
        folder, shape, dtype, _ = self._array(name)
        return arrays.read_compressed(_on_disk(folder), first, after, shape, dtype)

    def remote_array(self, name: str) -> RemoteArray:
        """Array `name` of a shard in an object store, checked."""
        self.check(name)
        return self._remote[name]

    def layer_file(self, layer: int) -> Path:
        """The raw file of a layer, rows from byte 0; only where the cache is on disk and not compressed."""
        self.check(layer_name(layer))
        return arrays.data_file(_on_disk(self.path) / layer_name(layer), 2)

    def positions(self, first_row: int, after_row: int) -> npt.NDArray[np.int64] | None:
        """Stored rows whose token stands in rows [first_row, after_row) of tokens; None where all do."""
        first, after = self.record.rows
        if first_row <= first and after <= after_row:
            return None
        row = self.read("order") // self.manifest.context + first
        return np.flatnonzero((first_row <= row) & (row < after_row))


def statistics_problem(shard: Shard) -> str | None:
    """What is wrong with the statistics in the shard's record, which are looked at nowhere else; None: nothing."""
    for layer in shard.manifest.layers:
        try:
            shard.record.statistics[str(layer)]
        except KeyError:
            return f"its record has no statistics of layer {layer}"
        except ValueError as bad:
            return f"of layer {layer} {bad}"
    return None


class Cache:
    """A cache opened for reading, from a folder or a URL. Shards are looked at when they are asked for.

    Raises WrongInput where `path` is not a cache.
    """

    def __init__(self, path: Place | str):
        self.path: Place = place(path)
        self._listing = _listing_of(self.path)
        attributes = _group_attributes(self.path)
        if attributes is None:
            raise WrongInput(
                f"{path} is not a cache folder (no readable zarr.json); make one with routesae harvest --out {path}"
            )
        self.manifest = Manifest.from_dict(attributes)

    @property
    def folder(self) -> Path:
        """Its folder on disk. Raises WrongInput where it is in an object store."""
        return _on_disk(self.path)

    @property
    def address(self) -> str:
        """Where it is, from wherever one looks: an absolute path or a URL."""
        return str(self.path if isinstance(self.path, RemoteFolder) else self.path.resolve())

    def has_shard(self, index: int) -> bool:
        if self._listing is not None:
            return self._listing.record(shard_name(index)) is not None
        return (self.folder / shard_name(index)).is_dir()

    def publish(self, index: int) -> None:
        """Called once shard `index` is committed on disk. Everyone sees it now (not so in harvest/staging.py)."""

    def missing(self) -> list[int]:
        """Indices of the shards that are not there yet."""
        there = self._shard_folders()
        return [i for i in range(self.manifest.shard_count) if shard_name(i) not in there]

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
        path = self.path / shard_name(index)
        if self._listing is None:
            attributes = _group_attributes(path)
        else:
            attributes = _attributes(self._listing.record(shard_name(index)) or b"")
        if attributes is None:
            raise arrays.BadArray("zarr.json missing or unreadable")
        try:
            record = ShardRecord.from_dict(attributes)
            record.require_of(self.manifest, index)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise arrays.BadArray(f"its attributes are not the shard's record: {error!r}") from error
        return Shard(path, self.manifest, record)

    def shards(self) -> Iterator[Shard]:
        """Every shard that is there, in order. Raises WrongInput naming the first that is damaged."""
        there = self._shard_folders()
        for index in range(self.manifest.shard_count):
            if shard_name(index) in there:
                try:
                    yield self.shard(index)
                except arrays.BadArray as bad:
                    raise damaged(self.path / shard_name(index), bad) from bad

    def _shard_folders(self) -> set[str]:
        if self._listing is not None:
            return self._listing.names()
        with os.scandir(self.folder) as entries:  # one listing, not a look for each of thousands
            return {entry.name for entry in entries if entry.name.startswith("shard-") and entry.is_dir()}

    def tokens(self) -> Ids:
        """int32 [S, T], memory-mapped."""
        return self._root_array("tokens", (self.manifest.rows, self.manifest.context), "<i4")

    def document_starts(self) -> npt.NDArray[np.int64]:
        """int64 [documents]: flat positions in tokens at which documents begin, ascending."""
        return self._root_array("document_starts", (self.manifest.documents,), "<i8")

    def _root_array(self, name: str, shape: tuple[int, ...], dtype: str) -> arrays.Array:
        try:
            folder = self.path / name
            if isinstance(folder, RemoteFolder):
                return _open_remote(folder, shape, dtype, compress=False).map()
            _require_inside(self.folder, arrays.data_file(folder, len(shape)))
            arrays.check_array(folder, shape, dtype)
        except arrays.BadArray as bad:
            raise WrongInput(
                f"{self.path / name} is damaged: {bad}. Without it the cache must be harvested anew"
            ) from bad
        return arrays.map_array(folder, shape, dtype)


def place(path: Place | str) -> Place:
    """A folder on disk, or in an object store where it is a URL. Raises WrongInput where that cannot be used."""
    if isinstance(path, RemoteFolder):
        return path
    return RemoteFolder.at(str(path)) if is_url(path) else Path(path)


def _on_disk(path: Place) -> Path:
    if isinstance(path, RemoteFolder):
        raise WrongInput(f"{path} is in an object store, and this needs a folder; `routesae cache copy` makes one")
    return path


def _listing_of(path: Place) -> RemoteShards | None:
    if not isinstance(path, RemoteFolder):
        return None
    from routesae.harvest.cache.store.shards import RemoteShards

    return RemoteShards(path)


def _open_remote(folder: RemoteFolder, shape: tuple[int, ...], dtype: str, *, compress: bool) -> RemoteArray:
    from routesae.harvest.cache.store.arrays import open_array

    if compress:
        raise WrongInput(f"{folder} is compressed, which is read from a disk only; `routesae cache copy` it to one")
    return open_array(folder, shape, dtype)


def damaged(path: Place, bad: arrays.BadArray) -> WrongInput:
    """What to tell a user whose cache has a bad array at `path`."""
    return WrongInput(
        f"{path} is damaged: {bad}. `routesae cache verify` lists every bad shard, `routesae cache repair` removes "
        "them, and the same routesae harvest then writes just those"
    )


def _require_inside(cache: Path, path: Path) -> None:
    """Raises BadArray where a link leads out of the cache: what is there is no part of it."""
    if leads_out_of(cache, path):
        raise arrays.BadArray("a symbolic link leads out of the cache; put the file itself there")


def _group_attributes(folder: Place) -> dict[str, Any] | None:
    """The attributes of the Zarr group in `folder`; None where there is none.

    Plain JSON rather than zarr: a cache of 3,000 shards opens in the time of 3,000 small reads.
    """
    if isinstance(folder, RemoteFolder):
        try:
            return _attributes(folder.read("zarr.json", LARGEST_BYTES))
        except (FileNotFoundError, arrays.BadArray):
            return None
    try:
        return _group_of(read_json(f"{folder}/zarr.json"))
    except (OSError, ValueError):
        return None


def _attributes(data: bytes) -> dict[str, Any] | None:
    try:
        return _group_of(parse_json(data))
    except ValueError:
        return None


def _group_of(metadata: Any) -> dict[str, Any] | None:
    try:
        attributes, kind = metadata["attributes"], metadata.get("node_type")
    except (KeyError, TypeError, AttributeError):
        return None
    return attributes if kind == "group" and isinstance(attributes, dict) else None
