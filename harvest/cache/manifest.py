"""What a cache says about itself: its manifest, a shard's record, and the names of its arrays.

Nothing here reads or writes a file, but what is validated here may come out of a stranger's: every count is bounded.

Dimension letters: S rows of tokens, T context, s rows of a shard, n kept positions of a shard, L layers, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from routesae.harvest.cache.arrays import BadArray
from routesae.machine.files import problem_of
from routesae.reporting import WrongInput, shortened

Ids = npt.NDArray[np.int32]
Roles = npt.NDArray[np.uint8]
FORMAT_VERSION: Final = 5  # 1 to 3 lacked statistics or hashes; 4 did not say where documents are from, nor roles
TOKENS, ROLES, STARTS, DOCUMENTS = "tokens", "roles", "document_starts", "document_starts/documents.parquet"
DTYPES = {"float16": "<f2", "float32": "<f4", "int8": "|i1"}
STATISTICS = ("token_mean", "token_std")
SCALE, CHANNEL_ARRAYS = "token_scale", ("channel_mean", "channel_std")  # of int8 (routesae.harvest.cache.quantise)
FORMULA = "channel_mean[l] + channel_std[l] * (token_scale[:, l, None] * q), for the l-th of the cache's layers"
CHUNK_HASHES = "chunk_hashes"
FOLLOWERS = "followers"  # the group of a ring, beside the shards (routesae.harvest.cache.ring)
DISK_RESERVE = 1.01  # indexes, metadata and the file system's own rounding
Overflow = Literal["error", "clip"]
MOST_SHARDS = 100_000  # their names have five digits; 6.5 billion tokens at the default size
# The manifest's fields that are settings of harvest, and which: a resumed run must agree on them.
SAME = (
    *("corpus", "data_config", "split", "text_field", "token_field", "min_chars", "context", "seed", "held_out"),
    *("dtype", "overflow", "keep_fields", "keep_roles", "keep_special", "skip_positions"),
)
SETTINGS = {"tokens_asked": "tokens"} | {name: name for name in SAME}

Count = Annotated[int, Field(ge=0, le=1 << 60)]


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Manifest(_Stored):
    """What a cache holds and how it was made: the attributes of its root group.

    Raises WrongInput for a value that is impossible. Whoever reads the counts makes memory of them, hence the bounds.
    """

    format_version: Literal[5] = FORMAT_VERSION
    model: str
    """Hub id, path or "demo", as given to harvest."""
    revision: str | None
    """Commit of the model on the hub; None for a local one."""
    config_hash: str
    tokenizer_hash: str
    weights_hash: str
    """Of the LM that writes every shard (routesae.harvest.lm.model.weights_hash)."""
    exact_weights_hash: str
    """The same in the precision that the LM ran in."""
    lm_dtype: str
    """Precision the LM ran in: float32 or bfloat16."""
    model_layers: int = Field(ge=1, le=1 << 16)
    """Decoder blocks of the whole model."""
    layers: tuple[int, ...] = Field(strict=False, min_length=1)
    """Harvested layers, ascending; layer ℓ is the output of the ℓ-th decoder block, from 1."""
    hidden_states_offset: int | None = Field(default=0, ge=-1, le=1)
    """Layer ℓ is hidden_states[ℓ + this] of transformers, as measured; None if it is none of them."""
    width: int = Field(ge=1, le=1 << 24)
    """D, numbers a hidden state."""
    context: int = Field(ge=1, le=1 << 24)
    """T, tokens a row."""
    rows: int = Field(ge=1, le=1 << 40)
    """S, rows of tokens."""
    shard_rows: int = Field(ge=1, le=1 << 31)
    """Rows of tokens a shard."""
    kept_tokens: Count
    """Positions harvested, over all shards."""
    tokens_hash: str
    roles_hash: str
    document_starts_hash: str
    """The hashes of those arrays (routesae.harvest.cache.arrays.array_hash)."""
    documents_hash: str
    """xxh3-64 of the bytes of documents.parquet."""
    dtype: Literal["float16", "float32", "int8"]
    overflow: Overflow
    seed: int = Field(ge=0, le=1 << 128)
    corpus: str
    """--data as given to harvest; of several with their shares."""
    held_out: float = Field(ge=0, le=1)
    """Share of the rows, the last ones, that are never trained on."""
    data_config: str | None = None
    split: str
    text_field: str
    token_field: str | None = None
    keep_fields: tuple[str, ...] = Field(strict=False)
    """Columns of documents.parquet beside data and place."""
    roles: tuple[str, ...] = Field(strict=False, max_length=255)
    """Of the messages of conversations; the array roles counts them from 1."""
    keep_roles: tuple[str, ...] = Field(strict=False)
    min_chars: Count
    corpus_fingerprint: str
    documents: int = Field(ge=0, le=1 << 50)
    documents_short: Count
    documents_malformed: Count
    tokens_asked: Count
    special_ids: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = Field(strict=False)
    keep_special: bool
    skip_positions: Count
    versions: dict[str, str]

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise WrongInput(f"the cache's manifest is not one: {problem_of(error)}") from None
        ascending = list(self.layers) == sorted(set(self.layers))
        if not ascending or self.layers[0] < 1 or self.layers[-1] > self.model_layers:
            raise WrongInput(
                f"the cache's manifest says layers = {_short(self.layers)}, of a model of {self.model_layers}"
            )
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
        """Rows 0 … train_rows-1 are for training; the rest, the share held out (at least one row of two, unless that
        is 0), are held out."""
        return self.rows - (-int(-self.rows * self.held_out // 1) if self.rows > 1 or self.held_out == 1 else 0)

    @property
    def first_held_out_shard(self) -> int:
        """Index of the first shard with held-out rows; the number of shards if no row is held out."""
        return self.train_rows // self.shard_rows if self.train_rows < self.rows else self.shard_count

    @property
    def dropped_ids(self) -> tuple[int, ...]:
        """Token ids whose positions were not harvested."""
        return () if self.keep_special else self.special_ids

    def kept(self, token_ids_sT: Ids, roles_sT: Roles) -> npt.NDArray[np.bool_]:
        """bool [s, T]: which positions of some rows were harvested."""
        which: dict[str, Any] = {"roles": self.roles, "keep_roles": self.keep_roles, "roles_ST": roles_sT}
        dropped, skipped = self.dropped_ids, self.skip_positions
        return kept_positions(token_ids_sT, dropped_ids=dropped, skip_positions=skipped, **which)

    @property
    def root_hashes(self) -> dict[str, str]:
        """By name of the array."""
        return {TOKENS: self.tokens_hash, ROLES: self.roles_hash, STARTS: self.document_starts_hash}

    @property
    def token_bytes(self) -> int:
        """Bytes a kept token takes in its shard."""
        return token_bytes(len(self.layers), self.width, self.dtype)

    @property
    def shard_bytes(self) -> int:
        """Bytes a shard takes on the disk, on the average."""
        return int(self.kept_tokens * self.token_bytes * DISK_RESERVE / self.shard_count)

    def shard_range(self, index: int) -> tuple[int, int]:
        """First row of tokens in shard `index`, and the one after its last."""
        return index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises WrongInput where a field is unknown, missing or impossible, or the format is another one."""
        version = data.get("format_version")
        if type(version) is int and version != FORMAT_VERSION:
            raise WrongInput(
                f"the cache has format {_short(version)}, and this routesae reads format {FORMAT_VERSION}; "
                "harvest it again, into a new folder"
            )
        if wrong := sorted(cls.model_fields.keys() ^ data.keys()):
            raise WrongInput(f"not the manifest of a routesae cache: {', '.join(wrong[:5])[:80]} unknown or missing")
        return cls(**data)


class LayerStatistics(_Stored):
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
    """What int8 lost, as a fraction of the variance, and as NormMSE counts it (cache.quantise.Encoding);
    None in other dtypes."""
    int8_norm_mse: float | None = None


class ShardRecord(_Stored):
    """The attributes of a shard's group."""

    index: Count
    rows: tuple[Count, Count] = Field(strict=False)
    """First row of tokens, and the one after the last."""
    kept: Count
    """n, positions kept."""
    weights_hash: str
    """Of the LM that wrote it: the manifest's exact one."""
    batch_sequences: Count
    """Rows a forward pass: part of the rounding, so recorded, but no reason to refuse a resume."""
    statistics: dict[str, LayerStatistics]
    """By layer."""
    hashes: dict[str, str]
    """By name of the array (routesae.harvest.cache.arrays.array_hash)."""

    def to_dict(self) -> dict[str, Any]:
        """Without what is None."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], manifest: Manifest, index: int) -> Self:
        """Raises BadArray where `data` is not the record of shard `index` of that cache."""
        try:
            record = cls(**data)
        except (ValidationError, TypeError) as error:
            raise BadArray(f"its attributes are not a shard's record: {problem_of(error)}") from None
        if record.weights_hash != manifest.exact_weights_hash:
            raise BadArray("it was written by an LM of other weights than the rest of the cache")
        first, after = manifest.shard_range(index)
        if record.index != index or record.rows != (first, after):
            raise BadArray(f"its record is of shard {record.index}, rows {record.rows}")
        if record.kept > (after - first) * manifest.context:
            raise BadArray(f"{record.kept} positions kept of {after - first} rows of {manifest.context}")
        if record.hashes.keys() != set(shard_arrays(manifest)):
            raise BadArray("its record's layers are not the cache's")
        if absent := {str(layer) for layer in manifest.layers} ^ record.statistics.keys():
            raise BadArray(f"its record has no statistics of layer {_short(min(absent))}, or some too many")
        return record


class RingState(_Stored):
    """The attributes of the group `followers`, which a cache has that is a ring (routesae.harvest.cache.ring)."""

    keep: int = Field(ge=1, le=1 << 60)
    """Bytes that its shards may take at a time."""
    used: Count = 0
    """Shards 0 … used-1 were deleted, because every trainer had used them."""


def _short(value: object) -> str:
    return shortened(repr(value), 80)


def token_bytes(layers: int, width: int, dtype: str) -> int:
    """Of hidden states and of what float32 numbers each has, over all `layers` of them."""
    return layers * (width * np.dtype(DTYPES[dtype]).itemsize + 4 * len(row_arrays(dtype)))


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def layer_name(layer: int) -> str:
    return f"layer_{layer:02d}"


def shard_arrays(manifest: Manifest) -> tuple[str, ...]:
    """The names of a shard's arrays."""
    channels = CHANNEL_ARRAYS if manifest.dtype == "int8" else ()
    return ("token_ids", "order", *hashed_arrays(manifest), *channels, CHUNK_HASHES)


def hashed_arrays(manifest: Manifest) -> tuple[str, ...]:
    """The columns of chunk_hashes: the arrays that have a row for each kept position and are read by rows."""
    return (*map(layer_name, manifest.layers), *row_arrays(manifest.dtype))


def row_arrays(dtype: str) -> tuple[str, ...]:
    """The names of the float32 arrays [n, L] of a shard."""
    return (*STATISTICS, SCALE) if dtype == "int8" else STATISTICS


def kept_positions(
    token_ids_ST: Ids,
    *,
    dropped_ids: Sequence[int],
    skip_positions: int,
    roles_ST: Roles | None = None,
    roles: Sequence[str] = (),
    keep_roles: Sequence[str] = (),
) -> npt.NDArray[np.bool_]:
    """bool [S, T]: the positions whose hidden states are harvested, trained on and spliced.

    Not kept: the first `skip_positions` of every row (the attention sink), every id in `dropped_ids` and, where some
    roles are kept, every token of another or none. roles: all of them, which roles_ST numbers from 1.
    """
    kept = ~np.isin(token_ids_ST, np.array(dropped_ids, np.int32))
    kept[:, :skip_positions] = False
    if keep_roles and roles_ST is not None:
        kept &= np.isin(roles_ST, [number for number, role in enumerate(roles, 1) if role in keep_roles])
    return kept


def shard_order(kept_sT: npt.NDArray[np.bool_], manifest: Manifest, index: int) -> npt.NDArray[np.int32]:
    """int32 [n]: the seeded permutation of the shard's kept flat positions in which its rows are stored."""
    generator = np.random.Generator(np.random.PCG64([manifest.seed, index]))
    return generator.permutation(np.flatnonzero(kept_sT).astype(np.int32))
