"""Damage to shards in; whether `cache verify` named just that shard, `cache repair` took just that away, and training
refused to read it, out.

    python benchmarks/corruption.py --trials 50

Each trial damages one file of one shard at random: a bit of an array's data or index flipped, a file cut, a file or a
folder deleted. Then verify must name that shard and no other, the digest must differ, repair must remove it and touch
nothing else, and with the shard put back (in real life: harvested again) the digest must be the one of before. Before
that all rows are read as training reads them, which must fail, naming the shard, where the damage is in an array that
training reads (all but token_ids and order), and must not where it is not. The digest is not of chunk_hashes, which
hashes what is hashed already.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch

from routesae.harvest.cache.manifest import CHUNK_HASHES
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.verify import repair, verify
from routesae.reporting import FailedRun, WrongInput
from routesae.train.loading.batches import Selection, epoch_plans, load

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import synthetic_cache

Damage = Callable[[Path, random.Random], Path]  # of a shard; gives what was damaged


def flip_a_bit(shard: Path, rng: random.Random) -> Path:
    file = rng.choice(sorted(path for path in shard.rglob("c/**/*") if path.is_file()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return file


def cut(shard: Path, rng: random.Random) -> Path:
    file = rng.choice(files_of(shard))
    os.truncate(file, rng.randrange(file.stat().st_size))
    return file


def delete_a_file(shard: Path, rng: random.Random) -> Path:
    file = rng.choice(files_of(shard))
    file.unlink()
    return file


def delete_an_array(shard: Path, rng: random.Random) -> Path:
    array = rng.choice(sorted(path for path in shard.iterdir() if path.is_dir()))
    shutil.rmtree(array)
    return array


DAMAGES: dict[str, Damage] = {
    "a bit flipped": flip_a_bit,
    "a file cut": cut,
    "a file deleted": delete_a_file,
    "an array deleted": delete_an_array,
}
NOT_READ = {"token_ids", "order"}  # by training, of a shard that is not cut in two by the held-out rows


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in files_of(folder)}


def make_cache(folder: Path) -> Path:
    """A cache of 6 shards and 3 layers whose tokens have the checksum recorded."""
    synthetic_cache(folder / "shards", layers=3, tokens=6 * 512, shard_tokens=512, width=16)
    return folder / "shards"


class Trial(NamedTuple):
    """wrong: what went wrong; None where all was as it should be. read: whether training reads what was damaged."""

    wrong: str | None
    read: bool


def trial(whole: Path, folder: Path, damage: Damage, rng: random.Random) -> Trial:
    shutil.copytree(whole, folder)
    name = f"shard-{rng.randrange(Cache(whole).manifest.shard_count):05d}"
    damaged = damage(folder / name, rng).relative_to(folder / name).parts[0]
    refused = refusal(folder)
    if (refused is None) != (damaged in NOT_READ) or (refused and name not in refused):
        return Trial(f"training said {refused} of damage to {name}/{damaged}", damaged not in NOT_READ)
    return Trial(mending(whole, folder, name, damaged), damaged not in NOT_READ)


def refusal(folder: Path) -> str | None:
    """What training says when it reads all of the cache; None: it read it."""
    try:
        cache = Cache(folder)
        selection = Selection(cache, 0, cache.manifest.rows, cache.manifest.layers)
        plans = epoch_plans(selection, seed=0, epoch=0, batch_tokens=500)
        with closing(load(selection, plans, 500, torch.device("cpu"))) as batches:
            for _ in batches:
                pass
    except (WrongInput, FailedRun) as refused:
        return str(refused)
    return None


def mending(whole: Path, folder: Path, name: str, damaged: str) -> str | None:
    """What verify and repair did wrong; None: nothing."""
    found, digest = verify(str(folder)), verify(str(whole)).digest
    if not found.problems or {problem[: len(name)] for problem in found.problems} != {name}:
        return f"verify said {found.problems} of damage to {name}"
    if (found.digest == digest) != (damaged == CHUNK_HASHES):
        return f"the digest did not change with {name}/{damaged}, or did"
    before = {path: data for path, data in contents(folder).items() if path.parts[0] != name}
    if repair(str(folder)).removed != [name] or contents(folder) != before:
        return f"repair did not remove {name} alone"
    shutil.copytree(whole / name, folder / name)
    return None if verify(str(folder)) == ([], digest) else f"{name} put back is not the cache of before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="of each damage")
    options = parser.parse_args()
    logging.getLogger("routesae").setLevel(logging.ERROR)
    print("| fault | trials | faults injected | data lost | found and mended | in what training reads, and refused |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        whole = make_cache(Path(scratch))
        for number, (name, damage) in enumerate(DAMAGES.items()):
            rng = random.Random(number)
            trials = []
            for _ in range(options.trials):
                trials += [trial(whole, Path(scratch) / "damaged", damage, rng)]
                shutil.rmtree(Path(scratch) / "damaged")
            failures = [one.wrong for one in trials if one.wrong is not None]
            mended, read = options.trials - len(failures), sum(one.read for one in trials if one.wrong is None)
            counts = f"{options.trials} | {options.trials} | {len(failures)} | {mended} | {read}"
            print(f"| {name} | {counts} |", flush=True)
            for one in failures:
                print(one, file=sys.stderr)


if __name__ == "__main__":
    main()
