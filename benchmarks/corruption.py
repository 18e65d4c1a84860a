"""Damage to shards in; whether `cache verify` named just that shard and `cache repair` took just that away, out.

    python benchmarks/corruption.py --trials 50

Each trial damages one file of one shard at random: a bit of an array's data or index flipped, a file cut, a file or a
folder deleted. Then verify must name that shard and no other, the digest must differ, repair must remove it and touch
nothing else, and with the shard put back (in real life: harvested again) the digest must be the one of before.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from routesae.harvest.arrays import array_hash
from routesae.harvest.cache import Cache
from routesae.harvest.verify import examine, repair

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import synthetic_cache


def flip_a_bit(shard: Path, rng: random.Random) -> None:
    file = rng.choice([path for path in shard.rglob("c/**/*") if path.is_file()])
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(shard: Path, rng: random.Random) -> None:
    file = rng.choice(files_of(shard))
    os.truncate(file, rng.randrange(file.stat().st_size))


def delete_a_file(shard: Path, rng: random.Random) -> None:
    rng.choice(files_of(shard)).unlink()


def delete_an_array(shard: Path, rng: random.Random) -> None:
    shutil.rmtree(rng.choice([path for path in shard.iterdir() if path.is_dir()]))


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "a bit flipped": flip_a_bit,
    "a file cut": cut,
    "a file deleted": delete_a_file,
    "an array deleted": delete_an_array,
}


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in files_of(folder)}


def make_cache(folder: Path) -> Path:
    """A cache of 6 shards and 3 layers whose tokens have the checksum recorded."""
    cache = synthetic_cache(folder / "shards", layers=3, tokens=6 * 512, shard_tokens=512, width=16)
    metadata = json.loads((folder / "shards" / "zarr.json").read_text())
    metadata["attributes"]["tokens_hash"] = array_hash(cache.tokens())
    (folder / "shards" / "zarr.json").write_text(json.dumps(metadata))
    return folder / "shards"


def trial(whole: Path, folder: Path, damage: Callable[[Path, random.Random], None], rng: random.Random) -> str | None:
    """What went wrong; None where all was as it should be."""
    shutil.copytree(whole, folder)
    name = f"shard-{rng.randrange(Cache(whole).manifest.shard_count):05d}"
    damage(folder / name, rng)
    found, digest = examine(str(folder)), examine(str(whole)).digest
    if not found.problems or {problem[: len(name)] for problem in found.problems} != {name}:
        return f"verify said {found.problems} of damage to {name}"
    if found.digest == digest:
        return f"the digest did not change with {name}"
    before = {path: data for path, data in contents(folder).items() if path.parts[0] != name}
    if repair(str(folder)).removed != [name] or contents(folder) != before:
        return f"repair did not remove {name} alone"
    shutil.copytree(whole / name, folder / name)
    return None if examine(str(folder)) == ([], digest) else f"{name} put back is not the cache of before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="of each damage")
    options = parser.parse_args()
    logging.getLogger("routesae").setLevel(logging.ERROR)
    print("| fault | trials | faults injected | data lost | found and mended |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        whole = make_cache(Path(scratch))
        for number, (name, damage) in enumerate(DAMAGES.items()):
            rng = random.Random(number)
            wrong = []
            for _ in range(options.trials):
                wrong += [trial(whole, Path(scratch) / "damaged", damage, rng)]
                shutil.rmtree(Path(scratch) / "damaged")
            failures = [one for one in wrong if one is not None]
            mended = options.trials - len(failures)
            print(f"| {name} | {options.trials} | {options.trials} | {len(failures)} | {mended} |", flush=True)
            for one in failures:
                print(one, file=sys.stderr)


if __name__ == "__main__":
    main()
