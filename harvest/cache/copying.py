"""Caches in, or parts of one; a cache that holds their shards, each verified where it arrived, out.

A shard is copied as a harvest writes one: under a dot-name, its checksums compared with those recorded, fsynced and
renamed. So a copy that was stopped goes on with the same command, and what is there is whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from routesae.harvest.cache import arrays
from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import Manifest, shard_arrays, shard_name
from routesae.harvest.cache.reader import Cache, Place, Shard, damaged, place
from routesae.harvest.cache.store.arrays import object_name, open_array
from routesae.harvest.cache.store.folder import RemoteFolder
from routesae.harvest.cache.verify import hash_shard, verify_root
from routesae.harvest.cache.writer import (
    TOKENS,
    begin_cache,
    commit_shard,
    is_uncommitted,
    partial_folder,
    remove_partial_shards,
)
from routesae.machine.faults import disk_faults
from routesae.machine.files import LARGEST_BYTES
from routesae.reporting import FailedRun, Progress, Report, WrongInput, human_bytes, silent

ROOT_ARRAYS = ("tokens", "document_starts")
VECTORS = ("document_starts", "order")  # arrays of one dimension; all others have two


class Merged(NamedTuple):
    """copied: shards that came from the sources now. missing: shards that no source had."""

    cache: Cache
    copied: int
    missing: int


def merge(sources: Sequence[Path | str], target: Path, *, link: bool = False, report: Report = silent) -> Merged:
    """Make `target` a cache of all shards of the sources, parts of one that were harvested apart; or go on with it.

    link: hard links instead of copies, where both are on one file system. A shard that several have must be the
    same. Raises WrongInput where sources differ in anything but versions, naming it, where one is damaged, or where
    there is no room.
    """
    caches = [Cache(source) for source in sources]
    if not caches:
        raise WrongInput("no cache to merge; name one or more, then the folder to make")
    there = Cache(target) if (target / "zarr.json").exists() else None
    for cache in caches:
        if cache.address == str(target.resolve()):
            raise WrongInput(f"{cache.path} is both read and written; leave it out of the sources, its shards stay")
    whole = [*caches, there] if there is not None else caches
    for cache in whole[1:]:
        require_same_cache(whole[0], cache)
    shards = _one_of_each(whole)
    wanted = {index: shard for index, shard in shards.items() if there is None or not there.has_shard(index)}
    _require_room(target, wanted, link=link)
    with disk_faults(target, lambda: "what was copied stays"):
        there = there or begin_copy(caches[0], target)
        with Claims(target) as claims:
            remove_partial_shards(target, claims.is_live)
            for done, (index, shard) in enumerate(wanted.items(), 1):
                if (claim := claims.take(shard_name(index))) is not None:  # else another writes it just now
                    copy_shard(shard, target, link=link)
                    claim.release()
                report(Progress("merge", done, len(wanted), "shards", {}))
    return Merged(there, len(wanted), len(there.missing()))


def copy(source: str, target: str, report: Report = silent) -> Merged:
    """Make `target`, a folder or a URL, the copy of the cache `source`, a folder or a URL; or go on with it.

    What arrived is read again and compared with the checksums recorded before a shard comes to exist. Raises as
    `merge` does, and as requests to a store (routesae.harvest.cache.store).
    """
    there = place(target)
    if isinstance(there, Path):
        return merge([source], there, report=report)
    cache = Cache(source)
    if cache.address == str(there):
        raise WrongInput(f"{source} is both read and written; give another place to copy it to")
    with tempfile.TemporaryDirectory(prefix="routesae-copy-") as scratch:
        begun = _begun_in_store(cache, there, Path(scratch))
        missing = set(begun.missing())
        wanted = [shard for shard in cache.shards() if shard.record.index in missing]
        for done, shard in enumerate(wanted, 1):
            _send_shard(shard, there, Path(scratch))
            report(Progress("copy", done, len(wanted), "shards", {}))
    return Merged(begun, len(wanted), len(begun.missing()))


def _begun_in_store(cache: Cache, target: RemoteFolder, scratch: Path) -> Cache:
    """The cache at `target`, with the manifest and tokens of `cache`. Raises WrongInput where it has others."""
    if not target.exists("zarr.json"):
        require_unused(target)
        local = cache if isinstance(cache.path, Path) else begin_copy(cache, scratch / "root")
        if problems := verify_root(local)[0]:
            raise WrongInput(f"{cache.path}: {problems[0]}")
        send_arrays(local.folder, target, ROOT_ARRAYS)
        tokens = open_array(target / TOKENS, (cache.manifest.rows, cache.manifest.context), "<i4")
        if tokens.hashes().whole != cache.manifest.tokens_hash:
            raise FailedRun(f"{target}/{TOKENS} is not what was sent; the same command sends it again")
        target.put("zarr.json", (local.folder / "zarr.json").read_bytes())
    begun = Cache(target)
    require_same_cache(cache, begun)
    return begun


def _send_shard(shard: Shard, target: RemoteFolder, scratch: Path) -> None:
    """Put a shard into the store, and its zarr.json once the rest of it is right there."""
    arrived = Shard(target / shard_name(shard.record.index), shard.manifest, shard.record)
    assert isinstance(arrived.path, RemoteFolder)
    if isinstance(shard.path, RemoteFolder):
        copy_shard(shard, scratch)
        shard = Shard(scratch / arrived.path.name, shard.manifest, shard.record)
    elif problems := hash_shard(shard)[0]:
        raise damaged(shard.path, arrays.BadArray(problems[0]))
    assert isinstance(shard.path, Path)
    send_arrays(shard.path, arrived.path, shard_arrays(shard.manifest))
    # Compressed arrays are not read out of a store: their sizes were compared, and the bytes sent have checksums.
    if shard.manifest.compress == "none" and (problems := hash_shard(arrived)[0]):
        raise FailedRun(f"{arrived.path}: {problems[0]} after it was sent; the same command sends it again")
    arrived.path.put("zarr.json", (shard.path / "zarr.json").read_bytes())
    if shard.path.is_relative_to(scratch):
        shutil.rmtree(shard.path)


def require_unused(target: RemoteFolder) -> None:
    """Raises WrongInput where the place, which has no manifest, holds anything but what a cache begins with."""
    if strange := sorted(target.folders() - set(ROOT_ARRAYS)):
        raise WrongInput(f"{target} holds {strange[0]} and is not a routesae cache; give a new place")


def send_arrays(folder: Path, target: RemoteFolder, names: Sequence[str]) -> None:
    """Send the arrays `names` below a group's folder; without its zarr.json the group does not exist there yet.

    Raises FailedRun where an object has not the size of its file afterwards.
    """
    sent = {}
    for name in names:
        data = arrays.data_file(folder / name, 1 if name in VECTORS else 2)
        for path in (data, folder / name / "zarr.json"):
            sent[path.relative_to(folder).as_posix()] = path.stat().st_size
            target.upload(path, path.relative_to(folder).as_posix())
    arrived = target.sizes()
    for name, size in sent.items():
        if arrived.get(name) != size:
            raise FailedRun(
                f"{target}/{name} has not the {size:,} bytes that were sent; the same command sends it again"
            )


def require_same_cache(one: Cache, other: Cache) -> None:
    """Raises WrongInput naming the first field, versions apart, in which two manifests differ."""
    for name in (field.name for field in fields(Manifest) if field.name != "versions"):
        ours, theirs = getattr(one.manifest, name), getattr(other.manifest, name)
        if ours != theirs:
            raise WrongInput(
                f"{one.path} and {other.path} are not parts of one cache: {name} is {str(ours)[:60]} in the first, "
                f"{str(theirs)[:60]} in the second"
            )


def _one_of_each(caches: Sequence[Cache]) -> dict[int, Shard]:
    """Every shard that a cache has, by index. Raises WrongInput where two have it and it is not the same, or was
    written by another LM than the others."""
    found: dict[int, Shard] = {}
    for cache in caches:
        for shard in cache.shards():
            first = found.setdefault(shard.record.index, shard)
            if first.record.hashes != shard.record.hashes:
                raise WrongInput(
                    f"{first.path} and {shard.path} differ, though they are the same shard; delete the wrong one"
                )
            some = next(iter(found.values()))
            if some.record.weights_hash != shard.record.weights_hash:
                raise WrongInput(f"{some.path} and {shard.path} were written by LMs of different weights")
    return dict(sorted(found.items()))


def _bytes_of(shard: Place) -> int:
    if isinstance(shard, RemoteFolder):
        return sum(shard.sizes().values())
    return sum(file.stat().st_size for file in shard.rglob("*"))


def _require_room(target: Path, wanted: dict[int, Shard], *, link: bool) -> None:
    if link or not wanted:
        return
    folder = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    needed = sum(_bytes_of(shard.path) for shard in wanted.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WrongInput(
            f"{len(wanted)} shards to copy take {human_bytes(needed)}, but {folder} has {human_bytes(free)} free; "
            "make room, or make hard links with --link, on the same file system"
        )


def begin_copy(source: Cache, target: Path) -> Cache:
    """Make `target` a cache without shards: the manifest and tokens of `source`. Raises WrongInput where those are
    damaged, or the folder is something else."""
    if target.exists() and not (target.is_dir() and is_uncommitted(target)):
        raise WrongInput(f"{target} exists and is not a routesae cache; give a new folder")
    if isinstance(source.path, Path) and (problems := verify_root(source)[0]):  # else judged once it is here
        raise WrongInput(f"{source.path}: {problems[0]}")
    target.mkdir(parents=True, exist_ok=True)
    prepared = partial_folder(target, TOKENS)
    try:
        for name in ROOT_ARRAYS:
            _copy_array(source.path / name, prepared / name, link=False)
        begin_cache(target, source.manifest, prepared)
    finally:
        shutil.rmtree(prepared, ignore_errors=True)
    copied = Cache(target)
    if problems := verify_root(copied)[0]:
        raise WrongInput(f"{target}: {problems[0]}; delete it and copy again")
    return copied


def copy_shard(shard: Shard, target: Path, *, link: bool = False) -> None:
    """Put a shard into the cache folder `target`, where it does not exist until it is whole and its hashes are right.

    Raises WrongInput where what arrived is not what its record says.
    """
    partial = partial_folder(target, shard.path.name)
    try:
        for name in shard_arrays(shard.manifest):
            _copy_array_of(shard, name, partial / name, link=link)
        problems, _ = hash_shard(Shard(partial, shard.manifest, shard.record))
        if problems:
            raise damaged(shard.path, arrays.BadArray(problems[0]))
        if isinstance(shard.path, RemoteFolder):
            (partial / "zarr.json").write_bytes(shard.path.read("zarr.json", LARGEST_BYTES))
        else:
            shutil.copyfile(shard.path / "zarr.json", partial / "zarr.json")
        arrays.fsync_tree(partial)
        commit_shard(partial, target / shard_name(shard.record.index))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    arrays.fsync(target)


def _copy_array_of(shard: Shard, name: str, target: Path, *, link: bool) -> None:
    try:
        if not (
            isinstance(shard.path, RemoteFolder) and shard.manifest.compress != "none"
        ):  # checked when it is here
            shard.check(name)  # which also finds links that lead out of the cache
        _copy_array(shard.path / name, target, link=link)
    except arrays.BadArray as bad:
        raise damaged(shard.path / name, bad) from bad


def _copy_array(source: Place, target: Path, *, link: bool) -> None:
    """The array's metadata and its one data file, and whatever else is in the folder not."""
    if isinstance(source, RemoteFolder):
        for name in ("zarr.json", object_name(1 if source.name in VECTORS else 2)):
            try:
                source.download(name, target / name)
            except FileNotFoundError:
                raise arrays.BadArray(f"{name} missing") from None
        return
    data = arrays.data_file(source, 1 if source.name in VECTORS else 2)
    for path in (source / "zarr.json", data):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if link:
            with suppress(OSError):  # another file system, or one without hard links
                os.link(path, copy, follow_symlinks=True)
                continue
        shutil.copyfile(path, copy)
