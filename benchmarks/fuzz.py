"""Files that a stranger could have written in; what reading them did out: refused, read, or a crash.

    python benchmarks/fuzz.py --seconds 15          every reader, so long each

A crash is anything but success or an error that says in a line what is wrong (WrongInput, FailedRun, BadArray); more
than 100 MB allocated; or a file made, changed or deleted, wherever in the scratch folder. tests/test_fuzz.py runs the
same readers for a few examples each.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import shutil
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from routesae.analyze.contexts.file import (
    CONTEXTS,
    FORMAT,
    LATENTS,
    context_schema,
    latent_schema,
    read_contexts,
    write_contexts,
)
from routesae.harvest.cache import storage
from routesae.harvest.cache.arrays import BadArray, chunk_hashes, data_file, hash_of, write_array
from routesae.harvest.cache.inspect import describe
from routesae.harvest.cache.manifest import CHUNK_HASHES, SCALE, hashed_arrays, shard_arrays
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.verify import verify, verify_shard
from routesae.reporting import FailedRun, WrongInput
from routesae.tests.shards import change_attributes
from routesae.train.folder.checkpoint import load_sae, save_sae
from routesae.train.loading.batches import Selection, read_sample
from routesae.train.saes import Recipe, build
from routesae.train.settings import settings_of
from routesae.train.sparse.policy import arithmetic
from routesae.train.state import checkpoint_file, load_checkpoint, save_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import synthetic_cache

ALLOCATED_BYTES = 100_000_000
EXPECTED = (WrongInput, FailedRun, BadArray)
NUMBERS = [0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**18, -(10**18), 10**30, 0.5, -0.0, 1e308]
TEXTS = ["", "..", "../../x", "/etc/passwd", "/dev/zero", "\0", "a" * 5000, "\ud800", "float16", "zstd", "topk"]
PLAIN = st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.none() | st.booleans() | st.integers() | st.text()
VALUES = st.recursive(
    PLAIN | st.floats(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


@dataclass
class Reader:
    """read: what is done with the scratch folder once `file` in it holds other bytes. valid: what it held.

    change: gives bytes for the file, out of the valid ones.
    """

    name: str
    file: Path
    read: Callable[[], object]
    change: Callable[[bytes], st.SearchStrategy[bytes]]
    executions: int = 0
    refused: int = 0
    crashes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.valid = self.file.read_bytes()
        self.read()  # the valid file is read


def mutated_json(valid: bytes) -> st.SearchStrategy[bytes]:
    """The document with a few values altered, left out, added or repeated; or its bytes changed."""
    return st.one_of(_altered(json.loads(valid)).map(_dumps), _repeated(valid), _nested(valid), mutated_bytes(valid))


def _dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def _altered(document: Any) -> st.SearchStrategy[Any]:
    paths = list(_paths(document))

    @st.composite
    def draw_one(draw: Callable[[Any], Any]) -> Any:
        found = copy.deepcopy(document)
        for _ in range(draw(st.integers(1, 3))):
            path = draw(st.sampled_from(paths))
            with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took it away
                holder = found
                for step in path[:-1]:
                    holder = holder[step]
                what = draw(st.sampled_from(["set", "set", "set", "drop", "add", "retype"]))
                if what == "set":
                    holder[path[-1]] = draw(VALUES)
                elif what == "drop":
                    del holder[path[-1]]
                elif what == "add" and isinstance(holder, dict):
                    holder[draw(st.text(max_size=10))] = draw(VALUES)
                elif what == "retype":
                    value = holder[path[-1]]
                    holder[path[-1]] = draw(st.sampled_from([[value], {"x": value}, str(value), [value] * 3]))
        return found

    return draw_one()


def _paths(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = {dict: dict.items, list: enumerate}.get(type(document))
    for key, value in inside(document) if inside else ():
        yield (*here, key)
        yield from _paths(value, (*here, key))


def _repeated(valid: bytes) -> st.SearchStrategy[bytes]:
    """A key said twice."""
    return st.sampled_from(sorted(json.loads(valid))).flatmap(
        lambda key: VALUES.map(lambda value: b"{" + _dumps(key) + b":" + _dumps(value) + b"," + valid.strip()[1:])
    )


def _nested(valid: bytes) -> st.SearchStrategy[bytes]:
    """Deeper than a parser's stack, or wider than it should read."""
    deep = st.sampled_from([50, 64, 65, 900, 1100, 100_000]).flatmap(
        lambda n: st.sampled_from([b"[" * n, b'{"a":' * n, b"[" * n + b"]" * n])
    )
    inside = deep.map(lambda bad: valid.strip()[:-1] + b',"x":' + bad + b"}")
    wide = st.sampled_from([100, 1_000, 20_000, 300_000, 1_000_000]).map(lambda n: b"[" + b"0," * n + b"0]")
    return deep | inside | wide


def mutated_bytes(valid: bytes) -> st.SearchStrategy[bytes]:
    """A few bytes set, cut, added or repeated; the last 100 as likely as all others."""

    @st.composite
    def draw_one(draw: Callable[[Any], Any]) -> bytes:
        data = bytearray(valid)
        for _ in range(draw(st.integers(1, 4))):
            last = max(0, len(data) - 1)
            at = draw(st.integers(0, last) | st.integers(max(0, last - 99), last))
            what = draw(st.sampled_from(["set", "set", "cut", "insert", "repeat"]))
            if what == "set" and data:
                data[at] = draw(st.integers(0, 255))
            elif what == "cut":
                del data[at:]
            elif what == "insert":
                data[at:at] = draw(st.binary(max_size=20))
            elif what == "repeat":
                data += data[at:]
        return bytes(data)

    return draw_one()


def resealed_index(valid: bytes) -> st.SearchStrategy[bytes]:
    """A chunk index that points anywhere, under a checksum that fits."""
    entries = (len(valid) - 4) // 16
    number = st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, len(valid), len(valid) - 4]) | st.integers(0, len(valid))

    def sealed(numbers: list[int]) -> bytes:
        index = struct.pack(f"<{len(numbers)}Q", *numbers)
        return valid[: -len(index) - 4] + index + struct.pack("<I", google_crc32c.value(index))

    few = min(entries, 2)
    return st.lists(number, min_size=2 * few, max_size=2 * few).map(sealed) | mutated_bytes(valid)


def mutated_floats(valid: bytes) -> st.SearchStrategy[bytes]:
    """An array of float32 in which some values are others, of no row's or channel's; or its index altered."""
    values = len(valid) // 4
    number = st.sampled_from([0.0, -1.0, 1e-45, 1e38, -1e38, float("inf"), float("-inf"), float("nan")])

    def replaced(found: list[tuple[int, float]]) -> bytes:
        data = bytearray(valid)
        for at, value in found:
            struct.pack_into("<f", data, 4 * at, value)
        return bytes(data)

    some = st.lists(st.tuples(st.integers(0, values - 1), number), min_size=1, max_size=20)
    return some.map(replaced) | resealed_index(valid)


def mutated_header(valid: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file whose header says something else of the same data."""
    size = struct.unpack("<Q", valid[:8])[0]
    header, data = json.loads(valid[8 : 8 + size]), valid[8 + size :]

    def with_header(other: Any) -> bytes:
        written = _dumps(other)
        return struct.pack("<Q", len(written)) + written + data

    lengths = st.sampled_from([0, 1, 2**20, 2**32, 2**62, 2**64 - 1]).map(lambda n: struct.pack("<Q", n) + valid[8:])
    return _altered(header).map(with_header) | lengths | mutated_bytes(valid)


def mutated_toml(valid: bytes) -> st.SearchStrategy[bytes]:
    known = [line.split(b" = ")[0] for line in valid.splitlines() if b" = " in line]
    key = st.sampled_from(known) | st.binary(max_size=8)
    value = (
        VALUES.map(_dumps) | st.sampled_from([50, 900, 1100, 50_000]).map(lambda n: b"[" * n) | st.binary(max_size=20)
    )
    lines = st.lists(st.tuples(key, value), min_size=1, max_size=3)
    added = lines.map(lambda found: b"".join(b"%s = %s\n" % line for line in found))
    return added | added.map(lambda more: valid + more) | mutated_bytes(valid)


def readers(scratch: Path) -> list[Reader]:
    """All of them, each on its own files below `scratch`."""
    plain = synthetic_cache(scratch / "plain", layers=2, tokens=1024, shard_tokens=512, width=4).path
    small = {"layers": 2, "tokens": 1024, "shard_tokens": 512, "width": 4}
    int8 = synthetic_cache(scratch / "int8", **small, dtype="int8").path
    recipe = Recipe(sae="routesae", layers=(1, 2), width=4, latents=8, k=2)
    sae = scratch / "sae"
    sae.mkdir()
    save_sae(sae, build(recipe, torch.Generator().manual_seed(0)), {"model": "x"})
    partial = scratch / "run"
    partial.mkdir()
    tensors = {"scale": torch.ones(()), "counts": torch.arange(3)}
    save_checkpoint(partial, 3, tensors, {"run": {"k": 2}}, arithmetic("cpu"))
    config = scratch / "config.toml"
    config.write_text('k = 4\nlr = 1e-3\nname = "x"\nout = "saes"\nseed = 1\n[[run]]\nsae = "topk"\nlatents = 8\n')

    def read_cache() -> None:
        cache = Cache(plain)
        cache.missing()
        cache.tokens()
        cache.document_starts()
        for shard in cache.shards():
            shard.positions()

    def read_shard() -> None:
        verify_shard(Cache(plain), 1)
        shard = Cache(plain).shard(1)
        for name in ("order", "layer_01", "token_mean"):
            shard.read(name)

    def read_checked() -> None:
        cache = Cache(plain)
        read_sample(Selection(cache, 0, cache.manifest.rows, (1, 2)), seed=0, tokens=1024)
        verify_shard(cache, 1)

    def read_int8() -> None:
        with tempfile.TemporaryDirectory() as elsewhere:
            copied = Path(elsewhere, "shards")
            shutil.copytree(int8, copied)
            reseal(copied, 1)
            cache = Cache(copied)
            verify_shard(cache, 1)
            batch = read_sample(Selection(cache, 0, cache.manifest.rows, (1, 2)), seed=0, tokens=1024)
        assert batch.hidden_LND.shape == (2, 1024, 4)

    def read_sae() -> None:
        load_sae(sae, torch.device("cpu"))

    def described() -> None:
        read_cache()
        verify(str(plain))
        describe(str(plain))

    contexts = write_tiny_contexts(scratch / "contexts")

    def read_contexts_whole() -> None:
        found = read_contexts(contexts)
        list(found.latents())
        list(found.latents([1]))

    shard, int8_shard = plain / "shard-00001", int8 / "shard-00001"
    return [
        Reader("manifest", plain / "zarr.json", described, mutated_json),
        Reader("shard record", shard / "zarr.json", read_shard, mutated_json),
        Reader("array metadata", shard / "layer_01" / "zarr.json", read_shard, mutated_json),
        Reader("shard index", data_file(shard / "layer_01", 2), read_shard, resealed_index),
        Reader("order", data_file(shard / "order", 1), read_shard, resealed_index),
        Reader("chunk hashes", data_file(shard / CHUNK_HASHES, 2), read_checked, resealed_index),
        Reader("chunk hashes' metadata", shard / CHUNK_HASHES / "zarr.json", read_checked, mutated_json),
        Reader("int8 scales", data_file(int8_shard / SCALE, 2), read_int8, mutated_floats),
        Reader("int8 channels' means", data_file(int8_shard / "channel_mean", 2), read_int8, mutated_floats),
        Reader("int8 channels' deviations", data_file(int8_shard / "channel_std", 2), read_int8, mutated_floats),
        Reader("int8 array metadata", int8_shard / SCALE / "zarr.json", read_int8, mutated_json),
        Reader("cfg.json", sae / "cfg.json", read_sae, mutated_json),
        Reader("safetensors", sae / "sae_weights.safetensors", read_sae, mutated_header),
        Reader("checkpoint", checkpoint_file(partial, 3), lambda: load_checkpoint(partial, 3), mutated_header),
        Reader("TOML config", config, lambda: settings_of({}, str(config)), mutated_toml),
        Reader("contexts.parquet", contexts / "contexts" / "corpus-0" / CONTEXTS, read_contexts_whole, mutated_bytes),
        Reader("latents.parquet", contexts / "contexts" / "corpus-0" / LATENTS, read_contexts_whole, mutated_bytes),
    ]


def reseal(folder: Path, index: int) -> None:
    """Make the checksums of a shard those of what it holds, as a stranger who knows how to hash does."""
    shard = Cache(folder).shard(index)
    chunks = {
        name: storage.chunk_hashes(shard.array(name)) for name in shard_arrays(shard.manifest) if name != CHUNK_HASHES
    }
    columns = hashed_arrays(shard.manifest)
    hashes_CA = np.stack([chunks[name] for name in columns], axis=1)
    shutil.rmtree(shard.path / CHUNK_HASHES)
    write_array(shard.path / CHUNK_HASHES, hashes_CA, chunk_rows=len(hashes_CA), attributes={"columns": columns})
    chunks[CHUNK_HASHES] = chunk_hashes(hashes_CA)
    change_attributes(shard.storage.folder(), hashes={name: hash_of(of) for name, of in chunks.items()})


def write_tiny_contexts(folder: Path) -> Path:
    """Two latents with three contexts, as `routesae contexts` writes them."""
    folder.mkdir()
    window = {"token_ids": [[1, 2]] * 3, "tokens": [["a", "b"]] * 3, "activations": [[0.0, 1.0]] * 3}
    numbers = {name: [0, 1, 1] for name in ("latent", "rank", "layer", "row", "position", "document", "at")}
    row = {**numbers, **window, "kind": ["chosen"] * 3, "token_class": ["a"] * 3, "activation": [1.0] * 3}
    schema = context_schema()
    batch = pa.RecordBatch.from_pydict({name: row.get(name, [None] * 3) for name in schema.names}, schema=schema)
    numbers = {name: [1, 1] for name in latent_schema().names} | {"latent": [0, 1], "histogram": [[1], [1]]}
    latents = pa.table([pa.array(numbers[one.name]).cast(one.type) for one in latent_schema()], latent_schema())
    asked = {**dict.fromkeys(("threshold", "window", "per_class", "min_contexts"), 2), "choose": "rule"}
    facts = {"format": FORMAT, "chosen": 2, "features": 2, "readings": 9, "settings": asked}
    facts |= {"cache": {"path": "", "corpus": "", "tokens_hash": "0"}, "sae": {"folder": "", "weights": {}}}
    write_contexts(folder, facts, latents, iter([batch]))
    return folder


def snapshot(scratch: Path, besides: Path) -> dict[str, int]:
    """Every file there and when it was changed, but the one that is fuzzed."""
    return {str(path): path.lstat().st_mtime_ns for path in scratch.rglob("*") if path.is_file() and path != besides}


@functools.cache
def build_character_table() -> None:
    """Have hypothesis build its table of characters: it takes two seconds here, and a minute with memory traced."""
    quick = settings(max_examples=1, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    quick(given(st.text())(lambda text: None))()


def fuzz(reader: Reader, scratch: Path, *, examples: int, number: int = 0) -> None:
    """Read so many altered files; crashes are noted, once shrunk. number: another seed, other examples."""
    before = snapshot(scratch, reader.file)

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        verbosity=Verbosity.quiet,
    )
    @given(reader.change(reader.valid))
    def one(data: bytes) -> None:
        reader.file.write_bytes(data)
        reader.executions += 1
        tracemalloc.reset_peak()
        at_start = tracemalloc.get_traced_memory()[0]
        try:
            reader.read()
            said = ""
        except EXPECTED as refusal:
            reader.refused += 1
            said = str(refusal)
        assert "\n" not in said, f"more than one line: {said}"
        allocated = tracemalloc.get_traced_memory()[1] - at_start
        allocated = max(allocated, pa.default_memory_pool().max_memory())  # Arrow's own, over the whole process
        assert allocated < ALLOCATED_BYTES, f"{allocated:,} bytes allocated"

    build_character_table()
    tracemalloc.start()
    try:
        one()
        assert snapshot(scratch, reader.file) == before, "a file was made, changed or deleted"
    except Exception as found:  # whatever it was is what is looked for
        crashes = found.exceptions if isinstance(found, ExceptionGroup) else [found]
        reader.crashes += [
            f"{type(crash).__name__}: {str(crash)[:200]} {getattr(crash, '__notes__', '')}" for crash in crashes
        ]
    finally:
        tracemalloc.stop()
        reader.file.write_bytes(reader.valid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="for each reader")
    parser.add_argument("--only", help="name of one reader")
    options = parser.parse_args()
    print("| reader | executions | refused | crashes | seconds |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for reader in readers(Path(scratch)):
            if options.only not in (None, reader.name):
                continue
            began, number = time.perf_counter(), 0
            while time.perf_counter() - began < options.seconds:
                fuzz(reader, Path(scratch), examples=100, number=number)
                number += 1
            seconds = time.perf_counter() - began
            counts = f"{reader.executions:,} | {reader.refused:,} | {len(reader.crashes)}"
            print(f"| {reader.name} | {counts} | {seconds:.0f} |", flush=True)
            for crash in sorted(set(reader.crashes)):
                print(crash, file=sys.stderr)


if __name__ == "__main__":
    main()
