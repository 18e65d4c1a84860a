"""The cache on disk: its manifest, its writer, its reader. Knows nothing of language models.

    shards/
      zarr.json             a Zarr v3 group; its attributes are the Manifest
      tokens/               int32 [S, T]: the whole packed corpus
      document_starts/      int64 [documents]: flat positions in tokens at which documents begin
      shard-00000/          a group: rows 0 … s-1 of tokens; its attributes are a ShardRecord
        token_ids/          int32 [s, T], natural order
        order/              int32 [n]: stored row r is flat position order[r] of token_ids
        layer_04/ …         float16 [n, D]: one array a layer, rows in that same order
        token_mean/         float32 [n, L]: the mean of each of those rows, one column a layer
        token_std/          float32 [n, L]: and its standard deviation (routesae.harvest.statistics)

Every array is one raw file (routesae.harvest.arrays). A folder named shard-NNNNN is whole or does not exist: it
is written under a dot-name, fsynced and renamed. `order` is one seeded permutation of the shard's kept
positions, so that a trainer gets shuffled rows out of contiguous reads.

Dimension letters: S rows of tokens, T context, s rows of a shard, n kept positions of a shard, L layers, D width.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from routesae.harvest import arrays
from routesae.harvest.tokens import Ids, kept_positions
from routesae.reporting import WrongInput

if TYPE_CHECKING:  # statistics brings torch, which `cache info` and `--help` can do without
    from routesae.harvest.statistics import TokenStatistics

FORMAT_VERSION = 2  # 1 had no token_mean and token_std
VAL_FRACTION = 0.05  # the last rows of tokens: never trained on, read by analyze
DTYPES = {"float16": "<f2", "float32": "<f4"}
OVERFLOWS = ("error", "clip")
COMPRESSIONS = ("none", "zstd")
_HASH_PIECE_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache holds and how it was made: the attributes of its root group."""

    format_version: int = FORMAT_VERSION
    model: str
    """Hub id, path or "demo", as given to harvest."""
    revision: str | None
    """Commit of the model on the hub; None for a local one."""
    config_hash: str
    tokenizer_hash: str
    lm_dtype: str
    """Precision the LM ran in: float32 or bfloat16."""
    model_layers: int
    """Decoder blocks of the whole model."""
    layers: tuple[int, ...]
    """Harvested layers, ascending; layer ℓ is the output of the ℓ-th decoder block, from 1."""
    width: int
    """D, numbers a hidden state."""
    context: int
    """T, tokens a row."""
    rows: int
    """S, rows of tokens."""
    shard_rows: int
    """Rows of tokens a shard."""
    kept_tokens: int
    """Positions harvested, over all shards."""
    tokens_hash: str
    """xxh3-64 of the array tokens."""
    dtype: str
    overflow: str
    compress: str
    seed: int
    corpus: str
    split: str
    text_field: str
    min_chars: int
    corpus_fingerprint: str
    documents: int
    documents_short: int
    documents_malformed: int
    tokens_asked: int
    special_ids: tuple[int, ...]
    keep_special: bool
    skip_positions: int
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise WrongInput(
                f"the cache has format {self.format_version}, and this routesae reads format {FORMAT_VERSION}; "
                "harvest it again, into a new folder"
            )
        for name in ("model_layers", "width", "context", "rows", "shard_rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise WrongInput(f"the cache's manifest says {name} = {value!r}; it must be a whole number above 0")
        for name, known in (("dtype", DTYPES), ("overflow", OVERFLOWS), ("compress", COMPRESSIONS)):
            if getattr(self, name) not in known:
                raise WrongInput(
                    f"the cache's manifest says {name} = {getattr(self, name)!r}; not one of {', '.join(known)}"
                )
        ascending = list(self.layers) == sorted(set(self.layers))
        if not self.layers or not ascending or self.layers[0] < 1 or self.layers[-1] > self.model_layers:
            raise WrongInput(f"the cache's manifest says layers = {self.layers}, of a model of {self.model_layers}")

    @property
    def shard_count(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def train_rows(self) -> int:
        """Rows 0 … train_rows-1 are for training; the rest, the last 5 % (at least one of two), are held out."""
        return self.rows - (-int(-self.rows * VAL_FRACTION // 1) if self.rows > 1 else 0)

    @property
    def dropped_ids(self) -> tuple[int, ...]:
        """Token ids whose positions were not harvested."""
        return () if self.keep_special else self.special_ids

    @property
    def token_bytes(self) -> int:
        """Bytes a kept token takes in its shard, uncompressed."""
        return token_bytes(len(self.layers), self.width, self.dtype)

    def shard_range(self, index: int) -> tuple[int, int]:
        """First row of tokens in shard `index`, and the one after its last."""
        return index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises WrongInput where a field is unknown, missing or impossible."""
        names = {field.name for field in fields(cls)}
        if wrong := sorted(names ^ set(data)):
            raise WrongInput(f"not the manifest of a routesae cache: {', '.join(wrong[:5])} unknown or missing")
        try:
            return cls(**{**data, "layers": tuple(data["layers"]), "special_ids": tuple(data["special_ids"])})
        except TypeError as error:
            raise WrongInput(f"not the manifest of a routesae cache: {error}") from error


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Over one shard's kept values of one layer, as stored."""

    mean: float
    mean_square: float
    max_abs: float
    """Before the cast to the cache's dtype, in the LM's precision."""
    clipped: int
    """Values cut to the dtype's largest (`--overflow clip`)."""
    non_finite: int = 0
    """NaN or infinite values; a run that meets one stops, so a shard that has one was not written here."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """The attributes of a shard's group."""

    index: int
    rows: tuple[int, int]
    """First row of tokens, and the one after the last."""
    kept: int
    """n, positions kept."""
    weights_hash: str
    """Of the LM that wrote it (routesae.harvest.lm.weights_hash)."""
    batch_sequences: int
    """Rows a forward pass: part of the rounding, so recorded, but no reason to refuse a resume."""
    statistics: Mapping[str, LayerStatistics]
    hashes: Mapping[str, str]
    """xxh3-64 of each array's values, by array name."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises KeyError or TypeError where `data` is not such a record."""
        statistics = {layer: LayerStatistics(**values) for layer, values in data["statistics"].items()}
        return cls(**{**data, "rows": tuple(data["rows"]), "statistics": statistics})


def token_bytes(layers: int, width: int, dtype: str) -> int:
    """Of hidden states and their two float32 statistics, over all `layers` of them."""
    return layers * (width * np.dtype(DTYPES[dtype]).itemsize + 8)


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def layer_name(layer: int) -> str:
    return f"layer_{layer:02d}"


def shard_arrays(manifest: Manifest) -> tuple[str, ...]:
    """The names of a shard's arrays."""
    return ("token_ids", "order", *map(layer_name, manifest.layers), "token_mean", "token_std")


def array_hash(array: arrays.Array) -> str:
    """xxh3-64 over the little-endian bytes of `array`, read in pieces so that a memmap stays one."""
    hasher = xxhash.xxh3_64()
    rows = max(1, _HASH_PIECE_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        hasher.update(np.ascontiguousarray(array[start : start + rows]).data.cast("B"))
    return hasher.hexdigest()


def shard_order(token_ids_sT: Ids, manifest: Manifest, index: int) -> npt.NDArray[np.int32]:
    """int32 [n]: the seeded permutation of the shard's kept flat positions in which its rows are stored."""
    generator = np.random.Generator(np.random.PCG64([manifest.seed, index]))
    return generator.permutation(kept_flat(token_ids_sT, manifest))


def kept_flat(token_ids_sT: Ids, manifest: Manifest) -> npt.NDArray[np.int32]:
    """int32 [n]: the shard's kept flat positions, ascending."""
    kept = kept_positions(token_ids_sT, dropped_ids=manifest.dropped_ids, skip_positions=manifest.skip_positions)
    return np.flatnonzero(kept).astype(np.int32)


# --------------------------------------------------------------------------------------------------- writing


STAGED_MANIFEST, STAGED_TOKENS = ".manifest", ".tokens.partial"


def begin_cache(path: Path, manifest: Manifest, prepared: Path) -> None:
    """Make `path` a cache: move the arrays below `prepared` into it, then the manifest, last.

    The manifest is staged first, so that what a kill leaves behind can be told from a stranger's folder.
    """
    import zarr

    staging = path / STAGED_MANIFEST
    shutil.rmtree(staging, ignore_errors=True)
    zarr.open_group(str(staging), mode="w", zarr_format=3, attributes=_plain(manifest.to_dict())).store.close()
    for array in sorted(prepared.iterdir()):
        shutil.rmtree(path / array.name, ignore_errors=True)
        array.rename(path / array.name)
    prepared.rmdir()
    arrays.fsync_tree(path)
    (staging / "zarr.json").rename(path / "zarr.json")
    staging.rmdir()
    arrays.fsync(path)


def is_uncommitted(path: Path) -> bool:
    """Whether the folder holds nothing but what a run killed before its manifest was in place can leave."""
    names = {entry.name for entry in path.iterdir()}
    moved = {"tokens", "document_starts"} if STAGED_MANIFEST in names else set[str]()
    return names <= {STAGED_MANIFEST, STAGED_TOKENS} | moved


def write_shard(
    path: Path,
    manifest: Manifest,
    token_ids_sT: Ids,
    order: npt.NDArray[np.int32],
    hidden: Iterable[tuple[int, arrays.Array]],
    record: Callable[[Mapping[str, str]], ShardRecord],
    index: int,
    token_statistics: TokenStatistics | None = None,
) -> ShardRecord:
    """Write one shard and commit it by a rename; a kill at any moment leaves a whole shard or none.

    hidden: (layer, [n, D] in the cache's dtype, rows in `order`), each taken when it is its turn.
    record: makes the shard's attributes once the hashes are known.
    token_statistics: of those rows; None has them worked out here.
    """
    import zarr

    partial = path / f".{shard_name(index)}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    compress = manifest.compress != "none"
    written = record(_write_arrays(partial, token_ids_sT, order, hidden, token_statistics, compress=compress))
    # The group's own zarr.json comes last: until then no zarr reader takes the dot-folder for a group.
    zarr.open_group(str(partial), mode="a", zarr_format=3, attributes=_plain(asdict(written))).store.close()
    arrays.fsync_tree(partial)
    partial.rename(path / shard_name(index))
    arrays.fsync(path)
    return written


def _write_arrays(
    partial: Path,
    token_ids_sT: Ids,
    order: npt.NDArray[np.int32],
    hidden: Iterable[tuple[int, arrays.Array]],
    token_statistics: TokenStatistics | None,
    *,
    compress: bool,
) -> dict[str, str]:
    """All arrays of a shard into its dot-folder; their hashes. One reaches the disk while the next is written."""
    from routesae.harvest.statistics import TokenStatistics, stored_statistics

    hashes = {}
    with arrays.syncing() as sync:

        def write(name: str, array: arrays.Array, chunk_rows: int, compress: bool = False) -> None:
            arrays.write_array(partial / name, array, chunk_rows=chunk_rows, compress=compress)
            sync(arrays.data_file(partial / name, array.ndim))
            hashes[name] = array_hash(array)

        write("token_ids", token_ids_sT, len(token_ids_sT))
        write("order", order, max(1, len(order)))  # read at once, so it is one chunk
        found = []
        for layer, hidden_nD in hidden:
            write(layer_name(layer), hidden_nD, arrays.CHUNK_ROWS, compress)
            if token_statistics is None:
                found.append(stored_statistics(hidden_nD))
        if token_statistics is None:
            means, stds = zip(*found, strict=True)
            token_statistics = TokenStatistics(np.stack(means, axis=1), np.stack(stds, axis=1))
        write("token_mean", token_statistics.mean_nL, arrays.CHUNK_ROWS)
        write("token_std", token_statistics.std_nL, arrays.CHUNK_ROWS)
    return hashes


def remove_partial_shards(path: Path) -> None:
    """Delete what a killed run left under dot-names."""
    for partial in path.glob(".shard-*.partial"):
        shutil.rmtree(partial)


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(data))
    return plain


# --------------------------------------------------------------------------------------------------- reading


class Shard:
    """One shard on disk. Arrays are checked (size, index) before the first read of each.

    Raises BadArray (routesae.harvest.arrays) from every read where the file is not what the record says.
    """

    def __init__(self, path: Path, manifest: Manifest, record: ShardRecord):
        self.path = path
        self.manifest = manifest
        self.record = record
        self._checked: set[str] = set()

    def _array(self, name: str) -> tuple[Path, tuple[int, ...], str, bool]:
        first, after = self.record.rows
        n = self.record.kept
        if name == "token_ids":
            return self.path / name, (after - first, self.manifest.context), "<i4", False
        if name == "order":
            return self.path / name, (n,), "<i4", False
        if name in ("token_mean", "token_std"):
            return self.path / name, (n, len(self.manifest.layers)), "<f4", False
        compress = self.manifest.compress != "none"
        return self.path / name, (n, self.manifest.width), DTYPES[self.manifest.dtype], compress

    def check(self, name: str) -> None:
        """Size, index and metadata of array `name`; remembered, so only the first call reads."""
        if name not in self._checked:
            folder, shape, dtype, compress = self._array(name)
            arrays.check_array(folder, shape, dtype, compress=compress)
            self._checked.add(name)

    def read(self, name: str) -> arrays.Array:
        """Array `name` whole: memory-mapped, or decompressed where the cache is compressed."""
        self.check(name)
        folder, shape, dtype, compress = self._array(name)
        return arrays.map_array(folder, shape, dtype, compress=compress)

    def read_rows(self, layer: int, first: int, after: int) -> arrays.Array:
        """Stored rows first … after-1 of a layer [after-first, D], decompressed; for compressed caches."""
        self.check(layer_name(layer))
        return arrays.read_compressed(self.path / layer_name(layer), first, after)

    def layer_file(self, layer: int) -> Path:
        """The raw file of a layer, rows from byte 0; only where the cache is not compressed."""
        self.check(layer_name(layer))
        return arrays.data_file(self.path / layer_name(layer), 2)

    def positions(self, first_row: int, after_row: int) -> npt.NDArray[np.int64] | None:
        """Stored rows whose token stands in rows [first_row, after_row) of tokens; None where all do."""
        first, after = self.record.rows
        if first_row <= first and after <= after_row:
            return None
        row = self.read("order") // self.manifest.context + first
        return np.flatnonzero((first_row <= row) & (row < after_row))


class Cache:
    """A cache opened for reading. Shards are looked at when they are asked for.

    Raises WrongInput where `path` is not a cache.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        attributes = _group_attributes(self.path)
        if attributes is None:
            raise WrongInput(
                f"{path} is not a cache folder (no readable zarr.json); make one with routesae harvest --out {path}"
            )
        self.manifest = Manifest.from_dict(attributes)

    def has_shard(self, index: int) -> bool:
        return (self.path / shard_name(index)).is_dir()

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
        attributes = _group_attributes(path)
        if attributes is None:
            raise arrays.BadArray("zarr.json missing or unreadable")
        try:
            record = ShardRecord.from_dict(attributes)
        except (KeyError, TypeError, AttributeError) as error:
            raise arrays.BadArray(f"its attributes are not a shard record: {error!r}") from error
        if record.index != index or record.rows != self.manifest.shard_range(index):
            raise arrays.BadArray(f"its record is of shard {record.index}, rows {record.rows}")
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
        with os.scandir(self.path) as entries:  # one listing, not a look for each of thousands
            return {entry.name for entry in entries if entry.name.startswith("shard-") and entry.is_dir()}

    def tokens(self) -> Ids:
        """int32 [S, T], memory-mapped."""
        return self._root_array("tokens", (self.manifest.rows, self.manifest.context), "<i4")

    def document_starts(self) -> npt.NDArray[np.int64]:
        """int64 [documents]: flat positions in tokens at which documents begin, ascending."""
        return self._root_array("document_starts", (self.manifest.documents,), "<i8")

    def _root_array(self, name: str, shape: tuple[int, ...], dtype: str) -> arrays.Array:
        try:
            arrays.check_array(self.path / name, shape, dtype)
        except arrays.BadArray as bad:
            raise WrongInput(
                f"{self.path / name} is damaged: {bad}. Without it the cache must be harvested anew"
            ) from bad
        return arrays.map_array(self.path / name, shape, dtype)


def damaged(path: Path, bad: arrays.BadArray) -> WrongInput:
    """What to tell a user whose cache has a bad array at `path`."""
    return WrongInput(
        f"{path} is damaged: {bad}. `routesae cache verify` lists every bad shard; delete them and run the same "
        "routesae harvest again"
    )


def _group_attributes(folder: Path) -> dict[str, Any] | None:
    """The attributes of the Zarr group in `folder`; None where there is none.

    Plain JSON rather than zarr: a cache of 3,000 shards opens in the time of 3,000 small reads.
    """
    try:
        with open(f"{folder}/zarr.json", "rb") as file:
            metadata = json.loads(file.read())
        attributes = metadata["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_group = metadata.get("node_type") == "group" and isinstance(attributes, dict)
    return attributes if is_group else None
