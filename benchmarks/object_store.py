"""Training out of an object store beside training from disk: the weights, the memory, and the disk that it takes.

    python benchmarks/object_store.py --cache CACHE --layer 9 --layer 15 --layer 22

`routesae cache copy` sends CACHE to an S3 server on loopback (moto's, a process of its own). `routesae train` then
trains a topk of each layer from disk, and from s3:// with --cache-dir an empty folder and --cache-bytes the limit,
each a process of its own: its peak memory is the kernel's ru_maxrss, what of it is not mapped files is polled. The
folder of blocks is looked at ten times a second. What counts is what was there in two looks running, so all at once.

Exit code 1 where a byte of the weights differs, the folder passed its limit, all that was fetched would have fitted
into it, or the run from the store held more than MEMORY_RATIO times the memory of the one from disk.

The server reads a whole object for every range of it, on the same cores: the seconds say little of a real store.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import record
from processes import measure

SAMPLE_SECONDS = 0.1
CHECKSUM_BYTES = 8  # after each block; --cache-bytes counts the blocks
MEMORY_RATIO = 1.5
ROUTESAE = [sys.executable, "-m", "routesae"]
WEIGHTS = "sae_weights.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", required=True, help="a folder; its copy in the store takes as much room in --folder"
    )
    parser.add_argument("--layer", type=int, action="append", help="once a topk; the cache's middle one if absent")
    parser.add_argument("--latents", type=int, default=2304)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--cache-bytes", type=int, default=200_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", help="for all that is written; the system's temporary one if absent")
    parser.add_argument("--json", type=Path, help="append a raw line a round to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # be the server's process
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    here = record.where()
    setup = {name: value for name, value in vars(args).items() if name not in ("cache", "folder", "json", "serve")}
    failures: list[str] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, store(args.cache, folder) as url:
        copied = measure([*ROUTESAE, "cache", "copy", args.cache, url])
        print(f"cache copy: {copied.seconds:.0f} s, peak {copied.peak_mb:.0f} MB\n\n{HEADINGS}", flush=True)
        for at in range(args.rounds):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                found = compared(args, url, Path(scratch))
            for place, row in found.items():
                print(table_row(place, row), flush=True)
            failures += what_failed(found, args.cache_bytes)
            if args.json:
                record.append(args.json, [{**here, "round": at, "setup": setup, **found}])
    if failures:
        sys.exit("\n".join(failures))
    print("\nthe weights are the same, bit for bit")


# ---------------------------------------------------------------------------------------------------- the store


def serve() -> None:
    """Prints address and bucket once the server answers, and ends when its input does."""
    from routesae.tests.object_store import BUCKET, s3_server

    with s3_server() as (host, port):
        print(f"http://{host}:{port} {BUCKET}", flush=True)
        sys.stdin.read()


@contextmanager
def store(cache: str, folder: str) -> Iterator[str]:
    """A URL in a store of its own that this process's environment names. folder: for its objects."""
    environment = {**os.environ, "TMPDIR": folder}  # the server keeps all but small objects in temporary files
    this = [sys.executable, __file__, "--serve", f"--cache={cache}"]
    with subprocess.Popen(this, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        endpoint, bucket = server.stdout.readline().split()
        os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        try:
            yield f"s3://{bucket}/shards"
        finally:
            server.stdin.close()


# ---------------------------------------------------------------------------------------------------- the runs


class Block(NamedTuple):
    """A file that holds a block, or will. number: the inode's; a block that was let go of comes back with another."""

    name: str
    number: int


@dataclass
class Watched:
    """A folder of blocks over a run, in bytes. fetched: of all that came and stayed for a look."""

    folder: Path
    largest: int = 0
    looks: int = 0
    _seen: dict[Block, int] = field(default_factory=dict)
    _before: dict[Block, int] = field(default_factory=dict)

    @property
    def fetched(self) -> int:
        return sum(self._seen.values())

    def look(self) -> None:
        now = sizes(self.folder)
        stayed = sum(min(size, self._before[block]) for block, size in now.items() if block in self._before)
        self.largest = max(self.largest, stayed)
        self.looks += 1
        self._seen |= now
        self._before = now


def sizes(folder: Path) -> dict[Block, int]:
    """Of the blocks in it, those being written among them, without their checksums."""
    found = {}
    for path in folder.glob("blocks/*/??/*"):
        with suppress(FileNotFoundError):  # let go of meanwhile, or whole by now and counted at the next look
            status = path.stat()
            found[Block(path.name.removesuffix(".partial"), status.st_ino)] = max(0, status.st_size - CHECKSUM_BYTES)
    return found


@contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    of_folder, over = Watched(folder), threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            of_folder.look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield of_folder
    finally:
        over.set()
        watcher.join()


def compared(args: argparse.Namespace, url: str, scratch: Path) -> dict[str, dict[str, Any]]:
    """Both runs, by where they read; each with its figures, and the store's with whether the weights are the same."""
    flags = [f"--layer={layer}" for layer in args.layer or ()]
    flags += ["--sae=topk", f"--latents={args.latents}", f"--k={args.k}", f"--epochs={args.epochs}", "--device=cpu"]
    kept = [f"--cache-dir={scratch / 'kept'}", f"--cache-bytes={args.cache_bytes}"]
    found: dict[str, dict[str, Any]] = {}
    for place, source, more in (("disk", args.cache, []), ("store", url, kept)):
        command = [*ROUTESAE, "train", "--quiet", f"--cache={source}", f"--out={scratch / place}", *flags, *more]
        with watched(scratch / "kept") as folder:
            ran = measure(command)
        found[place] = {"seconds": ran.seconds, "peak_mb": ran.peak_mb, "anonymous_mb": ran.anonymous_mb}
    saes = {place: {path.parent.name: path for path in (scratch / place).glob(f"*/{WEIGHTS}")} for place in found}
    assert saes["disk"]
    same = saes["disk"].keys() == saes["store"].keys() and all(
        path.read_bytes() == saes["store"][name].read_bytes() for name, path in saes["disk"].items()
    )
    folder_facts = {"kept_mb": folder.largest / 1e6, "fetched_mb": folder.fetched / 1e6, "looks": folder.looks}
    found["store"] |= {**folder_facts, "saes": len(saes["store"]), "same_weights": same}
    return found


def what_failed(found: dict[str, dict[str, Any]], limit: int) -> list[str]:
    disk, remote = found["disk"], found["store"]
    ratio = remote["peak_mb"] / disk["peak_mb"]
    told = {
        "the weights differ": not remote["same_weights"],
        f"the folder held {remote['kept_mb']:.1f} MB": remote["kept_mb"] * 1e6 > limit,
        f"{remote['fetched_mb']:.0f} MB were fetched, all of which fits: the limit was not tried": (
            remote["fetched_mb"] * 1e6 <= limit
        ),
        f"the store's run held {ratio:.2f} times the memory": ratio > MEMORY_RATIO,
    }
    return [text for text, is_so in told.items() if is_so]


HEADINGS = """\
| read from | seconds | peak MB | without mapped files | blocks kept, largest MB | blocks fetched, MB | weights |
|---|---|---|---|---|---|---|"""


def table_row(place: str, row: dict[str, Any]) -> str:
    text = f"| {place} | {row['seconds']:.1f} | {row['peak_mb']:.0f} | {row['anonymous_mb']:.0f} | "
    if place == "disk":
        return text + "– | – | – |"
    weights = f"{row['saes']} SAEs, bitwise the same" if row["same_weights"] else "differ"
    return text + f"{row['kept_mb']:.1f} | {row['fetched_mb']:.0f} | {weights} |"


if __name__ == "__main__":
    main()
