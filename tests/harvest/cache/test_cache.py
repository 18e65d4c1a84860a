"""The cache on disk: its manifest, its shards against zarr and the LM itself, its reader."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash
import zarr

from routesae.harvest.cache.arrays import BadArray, array_hash, read_group, write_array, write_group
from routesae.harvest.cache.manifest import Manifest, layer_name, shard_name, shard_order
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.writer import write_shard
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import WrongInput
from routesae.tests.shards import float_shard, stored_statistics

Array = npt.NDArray[Any]


@pytest.fixture
def cache(tiny_cache: Cache, tmp_path: Path) -> Cache:
    """A copy of the finished cache, to do with as one likes."""
    shutil.copytree(tiny_cache.path, tmp_path / "shards")
    return Cache(tmp_path / "shards")


@pytest.fixture(scope="module")
def reference(tiny_cache: Cache, tiny_model: Path) -> dict[tuple[int, int], Array]:
    """float32 [s·T, D] of every (shard, layer): the whole LM, output_hidden_states=True, 8 rows at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.float32).eval()
    tokens = zarr.open_group(str(tiny_cache.path), mode="r")["tokens"][:]
    found = {}
    with torch.no_grad():
        for index in range(tiny_cache.manifest.shard_count):
            rows = torch.from_numpy(tokens[index * 128 : (index + 1) * 128]).long()
            outputs = [
                model(rows[i : i + 8], output_hidden_states=True).hidden_states for i in range(0, len(rows), 8)
            ]
            for layer in (2, 3, 4, 5):
                found[index, layer] = torch.cat([output[layer].flatten(0, 1) for output in outputs]).numpy()
    return found


def naive_kept(tokens: Array, special_ids: tuple[int, ...]) -> list[int]:
    """Flat positions that are neither special nor the first of their row."""
    context = tokens.shape[1]
    return [i for i, t in enumerate(tokens.ravel().tolist()) if t not in special_ids and i % context > 0]


# ------------------------------------------------------------------------------------------------- manifest


def test_manifest_survives_a_trip_through_json(tiny_cache: Cache) -> None:
    data = json.loads(json.dumps(tiny_cache.manifest.to_dict()))
    assert Manifest.from_dict(data) == tiny_cache.manifest
    assert set(Manifest.model_fields) == set(data)


def test_manifest_is_the_attributes_of_the_zarr_group(tiny_cache: Cache) -> None:
    group = zarr.open_group(str(tiny_cache.path), mode="r")
    manifest = tiny_cache.manifest.to_dict()
    checksum = xxhash.xxh3_64_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    assert dict(group.attrs) == json.loads(json.dumps({**manifest, "checksum": checksum}))
    assert group.metadata.consolidated_metadata is None


def test_manifest_says_what_was_harvested(tiny_cache: Cache, tiny_model: Path, tiny_corpus: Path) -> None:
    manifest = tiny_cache.manifest
    assert (manifest.model, manifest.corpus) == (str(tiny_model), str(tiny_corpus))
    assert (manifest.model_layers, manifest.layers, manifest.width) == (6, (2, 3, 4, 5), 32)
    assert (manifest.rows, manifest.context, manifest.shard_rows, manifest.shard_count) == (562, 16, 128, 5)
    assert (manifest.special_ids, manifest.dtype, manifest.lm_dtype) == ((0, 1), "float16", "float32")
    assert set(manifest.versions) >= {"routesae", "torch", "transformers"}
    assert manifest.kept_tokens == len(naive_kept(tiny_cache.tokens(), (0, 1)))
    assert manifest.token_bytes == 4 * (32 * 2 + 8)


def changed(manifest: Manifest, **values: Any) -> Manifest:
    return Manifest(**{**manifest.to_dict(), **values})


@pytest.mark.parametrize("name", Manifest.model_fields)
def test_a_manifest_that_lacks_a_field_is_refused(name: str, tiny_cache: Cache) -> None:
    data = tiny_cache.manifest.to_dict()
    del data[name]
    with pytest.raises(WrongInput, match=name):
        Manifest.from_dict(data)


IMPOSSIBLE = [
    ("format_version", 1),
    ("format_version", 3),
    ("format_version", True),
    ("width", 0),
    ("width", "32"),
    ("rows", True),
    ("rows", -1),
    ("context", 16.0),
    ("shard_rows", 0),
    ("model_layers", None),
    ("dtype", "bfloat16"),
    ("layers", []),
    ("layers", [3, 2]),
    ("layers", [2, 2]),
    ("layers", [0, 1]),
    ("layers", [2, 7]),
    ("layers", 3),
    ("layers", ["2"]),
    ("special_ids", None),
    ("compress", "zstd"),
    ("chunk_hashes", True),
]


@pytest.mark.parametrize(("name", "value"), [*IMPOSSIBLE, ("surprise", 1)])
def test_a_manifest_with_an_unknown_field_or_impossible_value_is_refused(
    name: str, value: object, tiny_cache: Cache
) -> None:
    with pytest.raises(WrongInput):
        Manifest.from_dict({**tiny_cache.manifest.to_dict(), name: value})


def test_training_rows_are_all_but_the_last_five_percent_rounded_up(tiny_cache: Cache) -> None:
    assert changed(tiny_cache.manifest, rows=1).train_rows == 1
    for rows in [*range(2, 500), 562, 19_531, 20_000, 999_999]:
        held_out = math.ceil(rows * 5 / 100)
        assert changed(tiny_cache.manifest, rows=rows).train_rows == rows - held_out, rows


# ----------------------------------------------------------------------------------- shards against the truth


def test_zarr_equals_memmap_equals_hidden_states_of_the_lm_bit_for_bit(
    tiny_cache: Cache, reference: dict[tuple[int, int], Array]
) -> None:
    group = zarr.open_group(str(tiny_cache.path), mode="r")
    assert len(reference) == 5 * 4
    for (index, layer), hidden in reference.items():
        shard, name = group[f"shard-{index:05d}"], f"layer_{layer:02d}"
        read = shard[name][:]
        expected = hidden.astype(np.float16)[shard["order"][:]]
        assert read.dtype == np.float16
        assert np.array_equal(read.view(np.uint16), expected.view(np.uint16)), (index, layer)
        file = tiny_cache.path / f"shard-{index:05d}" / name / "c" / "0" / "0"
        memmap = np.memmap(file, "<f2", "r", shape=read.shape)
        assert np.array_equal(memmap.view(np.uint16), read.view(np.uint16)), (index, layer)
        assert np.array_equal(tiny_cache.shard(index).read(name).view(np.uint16), read.view(np.uint16))


def test_token_ids_of_the_shards_are_the_rows_of_tokens(tiny_cache: Cache) -> None:
    group = zarr.open_group(str(tiny_cache.path), mode="r")
    shards = [group[f"shard-{index:05d}"]["token_ids"][:] for index in range(5)]
    assert [len(rows) for rows in shards] == [128, 128, 128, 128, 50]
    assert np.array_equal(np.concatenate(shards), group["tokens"][:])
    assert np.array_equal(tiny_cache.tokens(), group["tokens"][:])


def test_order_is_a_shuffle_of_exactly_the_kept_positions(tiny_cache: Cache) -> None:
    group = zarr.open_group(str(tiny_cache.path), mode="r")
    for index in range(5):
        shard = group[f"shard-{index:05d}"]
        order, kept = shard["order"][:], naive_kept(shard["token_ids"][:], (0, 1))
        assert order.dtype == np.int32
        assert sorted(order.tolist()) == kept
        assert shard["layer_02"].shape == (len(kept), 32)
        moved = np.abs(np.argsort(order) - np.arange(len(kept))).mean() / len(kept)
        assert 0.25 < moved < 0.42  # a third of the length for a random permutation


def test_order_is_fixed_by_the_seed_and_the_shard(tiny_cache: Cache) -> None:
    kept_sT = tiny_cache.kept(0, 128)
    first = shard_order(kept_sT, tiny_cache.manifest, 0)
    assert np.array_equal(first, tiny_cache.shard(0).read("order"))
    assert np.array_equal(first, shard_order(kept_sT, tiny_cache.manifest, 0))
    assert not np.array_equal(first, shard_order(kept_sT, tiny_cache.manifest, 1))
    reseeded = changed(tiny_cache.manifest, seed=1)
    assert not np.array_equal(first, shard_order(kept_sT, reseeded, 0))


def test_statistics_are_those_of_the_stored_values_and_the_largest_before_the_cast(
    tiny_cache: Cache, reference: dict[tuple[int, int], Array]
) -> None:
    for (index, layer), hidden in reference.items():
        kept = hidden[naive_kept(tiny_cache.shard(index).read("token_ids"), (0, 1))].astype(np.float64)
        stored = kept.astype(np.float16).astype(np.float64)
        found = tiny_cache.shard(index).record.statistics[str(layer)]
        assert found.mean == pytest.approx(stored.mean(), abs=1e-6 * stored.std())
        assert found.mean_square == pytest.approx((stored**2).mean(), rel=1e-6)
        assert found.max_abs == np.abs(kept).max()
        assert (found.clipped, found.non_finite) == (0, 0)


def test_records_say_rows_kept_and_the_hash_of_every_array(tiny_cache: Cache) -> None:
    group = zarr.open_group(str(tiny_cache.path), mode="r")
    for index in range(5):
        record, shard = tiny_cache.shard(index).record, group[f"shard-{index:05d}"]
        assert record.rows == (index * 128, min(562, (index + 1) * 128))
        assert (record.kept, record.batch_sequences) == (shard["order"].shape[0], 8)
        arrays = ["token_ids", "order", "layer_02", "layer_03", "layer_04", "layer_05", "token_mean", "token_std"]
        arrays += ["chunk_hashes"]
        assert sorted(arrays) == sorted(shard.array_keys())
        assert record.hashes == {name: naive_hash(shard[name][:]) for name in arrays}
    assert tiny_cache.manifest.tokens_hash == naive_hash(group["tokens"][:])
    assert tiny_cache.manifest.document_starts_hash == naive_hash(group["document_starts"][:])


def naive_hash(array: Array) -> str:
    """xxh3-64 of the xxh3-64 of every 256 rows, as little-endian uint64."""
    chunks = [xxhash.xxh3_64_intdigest(array[at : at + 256].tobytes()) for at in range(0, len(array), 256)]
    return xxhash.xxh3_64_hexdigest(b"".join(chunk.to_bytes(8, "little") for chunk in chunks))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_chunk_hashes_are_the_xxh3_of_every_256_rows_of_every_array_that_has_a_row_a_token(
    dtype: str, tiny_cache: Cache, int8_cache: Cache
) -> None:
    group = zarr.open_group(str((tiny_cache if dtype == "float16" else int8_cache).path), mode="r")
    expected = ["layer_02", "layer_03", "layer_04", "layer_05", "token_mean", "token_std"]
    expected += ["token_scale"] if dtype == "int8" else []
    for index in range(5):
        shard = group[f"shard-{index:05d}"]
        hashes = shard["chunk_hashes"]
        assert list(hashes.attrs["columns"]) == expected
        chunks = -(-len(shard["order"][:]) // 256)
        assert (hashes.dtype, hashes.shape) == (np.uint64, (chunks, len(expected)))
        for column, name in enumerate(expected):
            rows = shard[name][:]
            for chunk in range(chunks):
                of_rows = xxhash.xxh3_64_intdigest(rows[chunk * 256 : (chunk + 1) * 256].tobytes())
                assert hashes[chunk, column] == of_rows


def flip(array: Path, at: int) -> None:
    (file,) = (path for path in (array / "c").rglob("*") if path.is_file())
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["order", "token_ids", "chunk_hashes"])
def test_a_flipped_bit_of_a_small_array_is_found_where_it_is_read(name: str, cache: Cache) -> None:
    flip(cache.folder / "shard-00001" / name, 9)
    with pytest.raises(BadArray, match="checksum differs"):
        cache.shard(1).read(name)
    assert len(cache.shard(2).read(name))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_token_statistics_are_those_of_the_stored_rows_in_float32(
    dtype: str, tiny_cache: Cache, tiny_settings: Callable[..., HarvestSettings], tmp_path: Path
) -> None:
    if dtype == "float32":
        tiny_cache = harvest(tiny_settings(out=str(tmp_path / "shards"), dtype=dtype, tokens=2560))
    group = zarr.open_group(str(tiny_cache.path), mode="r")
    for index in range(tiny_cache.manifest.shard_count):
        mean_nL, std_nL = (group[shard_name(index)][name] for name in ("token_mean", "token_std"))
        assert (mean_nL.dtype, std_nL.dtype) == (np.float32, np.float32)
        assert mean_nL.shape == std_nL.shape == (tiny_cache.shard(index).record.kept, 4)
        for column, layer in enumerate((2, 3, 4, 5)):
            stored_nD = group[shard_name(index)][layer_name(layer)][:].astype(np.float64)
            scale = 1e-6 * np.abs(stored_nD).max()
            assert np.allclose(mean_nL[:, column], stored_nD.mean(1), rtol=0, atol=scale)
            assert np.allclose(std_nL[:, column], stored_nD.std(1, ddof=1), rtol=1e-6, atol=0)
        assert np.array_equal(tiny_cache.shard(index).read("token_mean"), mean_nL[:])
        assert np.array_equal(tiny_cache.shard(index).read("token_std"), std_nL[:])


def test_a_row_of_one_number_and_a_constant_row_have_a_finite_deviation() -> None:
    for hidden_nD in (np.full((3, 1), 7, np.float16), np.full((600, 8), -2, np.float16)):
        mean_n, std_n = stored_statistics(hidden_nD)
        assert np.array_equal(mean_n, hidden_nD[:, 0].astype(np.float32))
        assert np.array_equal(std_n, np.zeros(len(hidden_nD), np.float32))


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_cache_of_another_format_is_refused_with_what_to_do(version: int, cache: Cache) -> None:
    path = cache.path / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"] |= {"format_version": version, "compress": "none"}
    del metadata["attributes"]["checksum"], metadata["attributes"]["document_starts_hash"]
    path.write_text(json.dumps(metadata))
    if version == 4:
        write_group(cache.path, metadata["attributes"])
    said = rf"has format {version}, and this routesae reads format 5; harvest it again, into a new folder"
    with pytest.raises(WrongInput, match=said) as error:
        Cache(cache.path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 2000])
def test_the_hash_of_an_array_is_that_of_its_chunks_hashes(rows: int) -> None:
    array = np.arange(3 * rows, dtype=np.int32).reshape(-1, 3)
    assert array_hash(array) == naive_hash(array)
    assert array_hash(np.repeat(array, 2, axis=0)[::2]) == naive_hash(array)


def test_document_starts_are_the_first_position_and_those_after_an_eos(tiny_cache: Cache) -> None:
    flat = tiny_cache.tokens().ravel().tolist()
    expected = [0] + [i + 1 for i, token in enumerate(flat) if token == 1 and i + 1 < len(flat)]
    assert tiny_cache.document_starts().tolist() == expected
    assert tiny_cache.manifest.documents == len(expected)


# ------------------------------------------------------------------------------------------------- writing


def test_a_shard_whose_writing_broke_off_does_not_exist_and_can_be_written_again(cache: Cache) -> None:
    record, folder = cache.shard(2).record, cache.path / "shard-00002"
    tokens, order = np.array(cache.shard(2).read("token_ids")), np.array(cache.shard(2).read("order"))
    layers = [(layer, np.array(cache.shard(2).read(layer_name(layer)))) for layer in (2, 3, 4, 5)]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder)

    def broken() -> Iterator[tuple[str, Array]]:
        yield from islice(float_shard(tokens, order, layers), 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(cache.path, cache.manifest, 2, broken(), lambda hashes: record)
    assert cache.missing() == [2]
    assert sorted(zarr.open_group(str(cache.path), mode="r").group_keys()) == [shard_name(i) for i in (0, 1, 3, 4)]
    write_shard(cache.path, cache.manifest, 2, float_shard(tokens, order, layers), lambda hashes: record)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not list(cache.path.glob(".*"))


# ------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("attributes", [None, {}, {"node_type": "array"}, []])
def test_a_folder_that_is_no_cache_is_wrong_input(attributes: object, tmp_path: Path) -> None:
    if attributes is not None:
        (tmp_path / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(WrongInput, match="not a cache folder"):
        Cache(tmp_path)


def test_another_zarr_group_is_wrong_input(tmp_path: Path) -> None:
    zarr.open_group(str(tmp_path), mode="w", attributes={"colour": "red"})
    with pytest.raises(WrongInput, match="not the manifest of a routesae cache"):
        Cache(tmp_path)


def test_missing_shards_are_named_with_the_remedy(cache: Cache) -> None:
    cache.require_whole()
    shutil.rmtree(cache.path / "shard-00001")
    shutil.rmtree(cache.path / "shard-00003")
    assert cache.missing() == [1, 3]
    assert [shard.record.index for shard in cache.shards()] == [0, 2, 4]
    with pytest.raises(WrongInput, match=r"lacks 2 of its 5 shards \(first shard-00001\).*routesae harvest"):
        cache.require_whole()


def test_a_damaged_array_is_found_before_its_first_read(cache: Cache) -> None:
    file = cache.path / "shard-00001" / "layer_03" / "c" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-1000])
    for read in (lambda shard: shard.read("layer_03"), lambda shard: shard.array("layer_03")):
        with pytest.raises(BadArray):
            read(cache.shard(1))
    assert len(cache.shard(1).read("layer_04")) == cache.shard(1).record.kept


def change_record(cache: Cache, index: int, change: Callable[[dict[str, Any]], object]) -> None:
    folder = cache.folder / shard_name(index)
    attributes = read_group((folder / "zarr.json").read_bytes())
    change(attributes)
    write_group(folder, attributes)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("kept"),
        lambda record: record.update(surprise=1),
        lambda record: record.update(index=0),
        lambda record: record.update(rows=[0, 128]),
        lambda record: record.update(statistics=3),
    ],
)
def test_a_shard_with_another_record_is_damaged(change: Callable[[dict[str, Any]], object], cache: Cache) -> None:
    change_record(cache, 1, change)
    with pytest.raises(BadArray):
        cache.shard(1)
    with pytest.raises(WrongInput, match=r"shard-00001 is damaged.*routesae cache verify"):
        list(cache.shards())


@pytest.mark.parametrize("name", ["tokens", "document_starts"])
def test_damaged_tokens_are_wrong_input(name: str, cache: Cache) -> None:
    read = {"tokens": cache.tokens, "document_starts": cache.document_starts}[name]
    (file,) = [path for path in (cache.path / name / "c").rglob("*") if path.is_file()]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WrongInput, match=f"{name} is damaged"):
        read()
    shutil.rmtree(cache.path / name)
    with pytest.raises(WrongInput, match=f"{name} is damaged"):
        read()


@pytest.mark.parametrize("name", ["tokens", "document_starts"])
def test_a_flipped_bit_of_the_tokens_or_document_starts_is_found_where_they_are_read(name: str, cache: Cache) -> None:
    flip(cache.folder / name, 9)
    with pytest.raises(WrongInput, match=f"{name} is damaged: checksum differs") as error:
        {"tokens": cache.tokens, "document_starts": cache.document_starts}[name]()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("group", ["", "shard-00001"])
def test_a_changed_digit_of_any_attribute_is_found_where_the_group_is_read(group: str, cache: Cache) -> None:
    """A mean square, the positions skipped, the number kept: whatever a number may depend on."""
    file = cache.folder / group / "zarr.json"
    text = file.read_text()
    begins = text.index('"attributes"')
    digits = [at for at in range(begins, len(text)) if text[at] in "123456789" and not text[at - 1].isdigit()]
    for at in [*digits[::7], digits[-1]]:  # the last is zarr_format's
        file.write_text(text[:at] + str(int(text[at]) % 9 + 1) + text[at + 1 :])
        with pytest.raises((WrongInput, BadArray), match=r"checksum differs|has format|unknown|zarr.json"):
            Cache(cache.folder).shard(1)
    file.write_text(text)
    Cache(cache.folder).shard(1)


def test_a_manifest_without_its_checksum_is_damaged(cache: Cache) -> None:
    metadata = json.loads((cache.folder / "zarr.json").read_text())
    del metadata["attributes"]["checksum"]
    (cache.folder / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(WrongInput, match=r"zarr.json is damaged: .*checksum differs.*harvest it again"):
        Cache(cache.folder)


def test_a_shard_by_an_lm_of_other_weights_is_damaged(cache: Cache) -> None:
    change_record(cache, 1, lambda record: record.update(weights_hash="other"))
    with pytest.raises(WrongInput, match="shard-00001 is damaged: it was written by an LM of other weights"):
        list(cache.shards())


def test_an_order_of_positions_that_are_not_there_is_damaged(cache: Cache) -> None:
    shard = cache.shard(1)
    order = np.array(shard.read("order"))
    order[5] = 128 * 16
    shutil.rmtree(cache.folder / "shard-00001" / "order")
    write_array(cache.folder / "shard-00001" / "order", order, chunk_rows=len(order))
    change_record(cache, 1, lambda record: record["hashes"].update(order=array_hash(order)))
    with pytest.raises(BadArray, match="order: names positions that the shard does not have"):
        cache.shard(1).positions()


def test_positions_are_where_the_stored_rows_stand_in_tokens(tiny_cache: Cache) -> None:
    for shard in tiny_cache.shards():
        order = shard.read("order").tolist()
        assert shard.positions().tolist() == [shard.record.rows[0] * 16 + flat for flat in order]
