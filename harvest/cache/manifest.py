"""What a cache says of itself: its manifest, a shard's record, and the names on disk. Reads and writes no file.

Dimension letters: S rows of tokens, T context, s rows of a shard, n kept positions of a shard, L layers, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Self, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from routesae.harvest.corpus.tokens import Ids, kept_positions
from routesae.reporting import WrongInput

FORMAT_VERSION = 2  # 1 had no token_mean and token_std
VAL_FRACTION = 0.05  # the last rows of tokens: never trained on, read by analyze
DTYPES = {"float16": "<f2", "float32": "<f4", "int8": "|i1"}
STATISTICS = ("token_mean", "token_std")
SCALE, CHANNEL_ARRAYS = "token_scale", ("channel_mean", "channel_std")  # of int8 (routesae.harvest.cache.quantise)
CHUNK_HASHES = "chunk_hashes"
LATER_FIELDS = frozenset({"chunk_hashes"})  # of a manifest: caches of the same format written before have them not
OVERFLOWS = ("error", "clip")
COMPRESSIONS = ("none", "zstd")
MOST_SHARDS = 100_000  # their names have five digits; 6.5 billion tokens at the default size
# The least and the most that a manifest's counts may be: whoever reads them makes memory of them.
RANGES = {
    "model_layers": (1, 1 << 16),
    "width": (1, 1 << 24),
    "context": (1, 1 << 24),
    "rows": (1, 1 << 40),
    "shard_rows": (1, 1 << 31),
    "kept_tokens": (0, 1 << 60),
    "documents": (0, 1 << 50),
    "documents_short": (0, 1 << 60),
    "documents_malformed": (0, 1 << 60),
    "tokens_asked": (0, 1 << 60),
    "min_chars": (0, 1 << 60),
    "skip_positions": (0, 1 << 60),
    "seed": (0, 1 << 128),
}


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
    chunk_hashes: bool = False
    """Whether every shard has an array of that name: a checksum of each chunk, for whoever reads some of them."""

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise WrongInput(
                f"the cache has format {self.format_version}, and this routesae reads format {FORMAT_VERSION}; "
                "harvest it again, into a new folder"
            )
        _require_types(self)
        for name, (least, most) in RANGES.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise WrongInput(
                    f"the cache's manifest says {name} = {value}; it must be a whole number from {least} to {most}"
                )
        for name, known in (("dtype", DTYPES), ("overflow", OVERFLOWS), ("compress", COMPRESSIONS)):
            if getattr(self, name) not in known:
                raise WrongInput(
                    f"the cache's manifest says {name} = {getattr(self, name)!r}; not one of {', '.join(known)}"
                )
        ascending = list(self.layers) == sorted(set(self.layers))
        if not self.layers or not ascending or self.layers[0] < 1 or self.layers[-1] > self.model_layers:
            raise WrongInput(
                f"the cache's manifest says layers = {_short(self.layers)}, of a model of {self.model_layers}"
            )
        if not all(0 <= token < 2**31 for token in self.special_ids):
            raise WrongInput(f"the cache's manifest says special_ids = {_short(self.special_ids)}; not token ids")
        if self.shard_rows * self.context >= 2**31:  # `order` counts a shard's positions in int32
            raise WrongInput(
                f"shards of {self.shard_rows} rows of {self.context} tokens have 2^31 positions or more; "
                "give fewer --shard-tokens"
            )
        if self.shard_count > MOST_SHARDS:
            raise WrongInput(
                f"{self.rows} rows in shards of {self.shard_rows} are more than {MOST_SHARDS:,} shards; "
                "give more --shard-tokens"
            )

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
        """Without what only later caches have, where this one has it not: it goes on as it was begun."""
        return {name: value for name, value in asdict(self).items() if value or name not in LATER_FIELDS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises WrongInput where a field is unknown, missing or impossible."""
        names = {field.name for field in fields(cls)}
        if wrong := sorted((names ^ set(data)) - LATER_FIELDS):
            raise WrongInput(f"not the manifest of a routesae cache: {', '.join(wrong[:5])[:80]} unknown or missing")
        lists = {name: tuple(data[name]) for name in ("layers", "special_ids") if isinstance(data[name], list)}
        return cls(**{**data, **lists})


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
    int8_fvu: float | None = None
    """What int8 lost, as a fraction of the variance, and as NormMSE counts it (routesae.harvest.cache.quantise.Lost);
    None in other dtypes."""
    int8_norm_mse: float | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "mean_square", "max_abs", "int8_fvu", "int8_norm_mse"):
            value = getattr(self, name)
            if type(value) not in (float, int) and not (value is None and name.startswith("int8")):
                raise ValueError(f"{name} is no number")
        if type(self.clipped) is not int or type(self.non_finite) is not int:
            raise ValueError("clipped or non_finite is no whole number")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError where `data` is no such statistics, or one of them is not finite."""
        try:
            found = cls(**data)
            numbers = (found.mean, found.mean_square, found.max_abs, found.int8_fvu or 0, found.int8_norm_mse or 0)
            finite = all(map(math.isfinite, numbers))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"its statistics are none: {_short(str(error))}") from error
        if not finite:
            raise ValueError("its statistics are not finite")
        return found


class _StoredStatistics(Mapping[str, LayerStatistics]):
    """Of a shard on disk, each made when it is looked at: 3,000 shards of 16 layers have 48,000, and training reads
    none. Raises ValueError for one that is none."""

    def __init__(self, stored: Mapping[str, Any]):
        if not isinstance(stored, dict):
            raise ValueError("statistics is no table")
        self._stored = stored

    def __getitem__(self, layer: str) -> LayerStatistics:
        return LayerStatistics.from_dict(self._stored[layer])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """The attributes of a shard's group."""

    index: int
    rows: tuple[int, int]
    """First row of tokens, and the one after the last."""
    kept: int
    """n, positions kept."""
    weights_hash: str
    """Of the LM that wrote it (routesae.harvest.lm.model.weights_hash)."""
    batch_sequences: int
    """Rows a forward pass: part of the rounding, so recorded, but no reason to refuse a resume."""
    statistics: Mapping[str, LayerStatistics]
    hashes: Mapping[str, str]
    """xxh3-64 of each array's values, by array name."""

    def __post_init__(self) -> None:
        counts = (self.index, *self.rows, self.kept, self.batch_sequences)
        if len(self.rows) != 2 or not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("index, rows, kept or batch_sequences is no count")
        if type(self.weights_hash) is not str or not all(type(one) is str for one in self.hashes.values()):
            raise ValueError("a hash is no text")

    def to_dict(self) -> dict[str, Any]:
        """Without what is None, so that a record has fields that are new only where they say something."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        found = {layer: asdict(one).items() for layer, one in self.statistics.items()}
        known = {layer: {name: value for name, value in one if value is not None} for layer, one in found.items()}
        return {**data, "statistics": known}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError, AttributeError or ValueError where `data` is not such a record, and later where
        a statistic is looked at that is none."""
        statistics = _StoredStatistics(data["statistics"])
        return cls(**{**data, "rows": tuple(data["rows"]), "statistics": statistics})

    def require_of(self, manifest: Manifest, index: int) -> None:
        """Raises ValueError where it is not the record of shard `index` of that cache."""
        first, after = manifest.shard_range(index)
        if self.index != index or self.rows != (first, after):
            raise ValueError(f"its record is of shard {self.index}, rows {self.rows}")
        if self.kept > (after - first) * manifest.context:
            raise ValueError(f"{self.kept} positions kept of {after - first} rows of {manifest.context}")
        if self.hashes.keys() != set(shard_arrays(manifest)):
            raise ValueError("its layers are not the cache's")


def _require_types(manifest: Manifest) -> None:
    """Raises WrongInput where a value is not of its field's type: a file may say anything."""
    for name, (kinds, inner_kinds) in _manifest_types().items():
        value = getattr(manifest, name)
        inner = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else ()
        if type(value) not in kinds or not all(type(one) in inner_kinds for one in inner):
            raise WrongInput(f"the cache's manifest says {name} = {_short(value)}; that is of the wrong type")


@lru_cache
def _manifest_types() -> dict[str, tuple[tuple[type, ...], tuple[type, ...]]]:
    """Of each field: the types its value may have, and those of what is inside it."""
    found: dict[str, tuple[tuple[type, ...], tuple[type, ...]]] = {}
    for name, hint in get_type_hints(Manifest).items():
        outer, inner = get_origin(hint), tuple(kind for kind in get_args(hint) if kind is not Ellipsis)
        if outer in (tuple, Mapping):
            found[name] = ((tuple if outer is tuple else dict,), inner)
        else:
            found[name] = (inner or (hint,), ())
    return found


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}…"


def token_bytes(layers: int, width: int, dtype: str) -> int:
    """Of hidden states and what float32 numbers each has, over all `layers` of them."""
    return layers * (width * np.dtype(DTYPES[dtype]).itemsize + 4 * len(row_arrays(dtype)))


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def layer_name(layer: int) -> str:
    return f"layer_{layer:02d}"


def shard_arrays(manifest: Manifest) -> tuple[str, ...]:
    """The names of a shard's arrays."""
    hashes = (CHUNK_HASHES,) if manifest.chunk_hashes else ()
    return ("token_ids", "order", *hashed_arrays(manifest), *_channel_arrays(manifest.dtype), *hashes)


def hashed_arrays(manifest: Manifest) -> tuple[str, ...]:
    """Of those the ones that have a row for each kept position and are read by rows: the columns of chunk_hashes."""
    return _hashed_arrays(manifest.layers, manifest.dtype)


@lru_cache
def _hashed_arrays(layers: tuple[int, ...], dtype: str) -> tuple[str, ...]:
    return (*map(layer_name, layers), *row_arrays(dtype))


def _channel_arrays(dtype: str) -> tuple[str, ...]:
    return CHANNEL_ARRAYS if dtype == "int8" else ()


def row_arrays(dtype: str) -> tuple[str, ...]:
    """The names of the float32 arrays [n, L] of a shard."""
    return (*STATISTICS, SCALE) if dtype == "int8" else STATISTICS


def shard_order(token_ids_sT: Ids, manifest: Manifest, index: int) -> npt.NDArray[np.int32]:
    """int32 [n]: the seeded permutation of the shard's kept flat positions in which its rows are stored."""
    generator = np.random.Generator(np.random.PCG64([manifest.seed, index]))
    return generator.permutation(kept_flat(token_ids_sT, manifest))


def kept_flat(token_ids_sT: Ids, manifest: Manifest) -> npt.NDArray[np.int32]:
    """int32 [n]: the shard's kept flat positions, ascending."""
    kept = kept_positions(token_ids_sT, dropped_ids=manifest.dropped_ids, skip_positions=manifest.skip_positions)
    return np.flatnonzero(kept).astype(np.int32)
