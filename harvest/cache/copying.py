"""Copies caches: one from place to place, or the parts of one into a whole, each shard verified where it arrives.

A shard is copied as a harvest writes one: under a dot-name, its checksums compared with those recorded, fsynced and
renamed; into an object store, its zarr.json is put last. So the same command goes on with a copy that was stopped.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from routesae.harvest.cache import arrays
from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import DOCUMENTS, STARTS, TOKENS, Manifest, shard_arrays, shard_name
from routesae.harvest.cache.reader import Cache, Shard, damaged, root_array
from routesae.harvest.cache.storage import Storage, open_storage
from routesae.harvest.cache.store.bucket import BucketFolder
from routesae.harvest.cache.store.disk import DiskFolder
from routesae.harvest.cache.verify import Hashes, hash_shard, verify_root
from routesae.harvest.cache.writer import (
    ROOT_ARRAYS,
    begin_cache,
    is_uncommitted,
    remove_partial_shards,
    staging,
    writing_shard,
)
from routesae.machine.files import disk_faults, is_url
from routesae.reporting import FailedRun, Progress, Report, WrongInput, human_bytes, silent

VECTORS = (STARTS, "order")  # arrays of one dimension; all others have two


class Merged(NamedTuple):
    """copied: shards that came from the sources now. missing: shards that no source had."""

    copied: int
    missing: int


def copy(sources: Sequence[Path | str], target: Path | str, *, link: bool = False, report: Report = silent) -> Merged:
    """Make `target`, a folder or a URL, a cache of all shards of the sources, or go on with it.

    The sources are one cache, or parts of one that were harvested apart; a shard that several have must be the same.
    link: hard links instead of copies, where both are on one file system. Raises WrongInput where sources differ in
    anything but versions, naming it, where one is damaged, or where there is no room, and as requests to a store do.
    """
    destination = open_storage(target)
    caches = [Cache(source) for source in sources]
    if not caches:
        raise WrongInput("no cache to merge; name one or more, then the folder to make")
    try:
        destination.read("zarr.json")
        whole = [*caches, Cache(destination)]
    except FileNotFoundError:
        whole = caches
    for cache in caches:
        if cache.storage.address == destination.address:
            raise WrongInput(f"{cache.path} is both read and written; give another target, or other sources")
        require_same_cache(whole[0], cache)
    require_same_cache(whole[0], whole[-1])
    shards = _one_of_each(whole)
    present = destination.shard_names() if len(whole) > len(caches) else set()
    wanted = [shard for index, shard in shards.items() if shard_name(index) not in present]
    if isinstance(destination, BucketFolder):
        _copy_to_store(caches[0], wanted, destination, report)
    else:
        _copy_to_disk(caches[0], wanted, destination.folder(), report, link=link)
    return Merged(len(wanted), len(Cache(destination).missing()))


def _copy_to_disk(source: Cache, wanted: list[Shard], target: Path, report: Report, *, link: bool) -> None:
    if not link:
        _require_room(target, wanted)
    with disk_faults(target, lambda: "what was copied stays"):
        if not (target / "zarr.json").exists():
            begin_copy(source, target)
        with Claims(target) as claims:
            remove_partial_shards(target, claims)
            for done, shard in enumerate(wanted, 1):
                if (claim := claims.take(shard_name(shard.record.index))) is not None:  # else another writes it now
                    copy_shard(shard, target, link=link)
                    claim.release()
                report(Progress("copy", done, len(wanted), "shards", {}))


def begin_copy(source: Cache, target: Path) -> Cache:
    """Make `target` a cache without shards: the manifest and tokens of `source`. Raises WrongInput where those are
    damaged, or the folder is something else."""
    if target.exists() and not (target.is_dir() and is_uncommitted(target)):
        raise WrongInput(f"{target} exists and is not a routesae cache; give a new folder")
    target.mkdir(parents=True, exist_ok=True)
    with staging(target, TOKENS) as prepared:
        _fetch(source.storage, partial(root_array, source.storage, source.manifest), ROOT_ARRAYS, prepared)
        if problems := verify_root(DiskFolder(prepared, target), source.manifest)[0]:
            raise WrongInput(f"{source.path}: {problems[0]}")
        begin_cache(target, source.manifest, prepared)
    return Cache(target)


def copy_shard(shard: Shard, target: Path, *, link: bool = False) -> None:
    """Put a shard into the folder `target`, where it does not exist until it is whole and its hashes are right.

    Raises WrongInput where what arrived is not what its record says.
    """
    with writing_shard(target, shard_name(shard.record.index)) as folder:
        _fetch(shard.storage, shard.array, shard_arrays(shard.manifest), folder, link=link)
        if problems := hash_shard(Shard(DiskFolder(folder, target), shard.manifest, shard.record))[0]:
            raise damaged(shard.path, arrays.BadArray(problems[0]))
        arrays.write_group(folder, shard.record.to_dict())


def _fetch(
    source: Storage, array: Callable[[str], object], names: Iterable[str], target: Path, *, link: bool = False
) -> None:
    """Copy arrays into a new folder. array: checks one of the source, and finds links that lead out of its cache."""
    for name in names:
        try:
            array(name)
            for file in _files(name):
                source.fetch(file, target / file, link=link)
        except (arrays.BadArray, FileNotFoundError) as bad:
            raise damaged(f"{source.path}/{name}", arrays.BadArray(str(bad))) from bad


def _copy_to_store(source: Cache, wanted: list[Shard], target: BucketFolder, report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="routesae-copy-") as folder:
        scratch = Path(folder)
        if not target.exists("zarr.json"):
            begin_in_store(begin_copy(source, scratch / "root") if is_url(source.path) else source, target)
        for done, shard in enumerate(wanted, 1):
            name = shard_name(shard.record.index)
            arrived = Shard(target / name, shard.manifest, shard.record)
            if is_url(shard.path):
                copy_shard(shard, scratch)
                shard = Shard(DiskFolder(scratch) / name, shard.manifest, shard.record)
            elif problems := hash_shard(shard)[0]:
                raise damaged(shard.path, arrays.BadArray(problems[0]))
            names = shard_arrays(shard.manifest)
            send(shard.storage.folder(), target / name, names, partial(hash_shard, arrived))
            shutil.rmtree(scratch / name, ignore_errors=True)
            report(Progress("copy", done, len(wanted), "shards", {}))


def begin_in_store(source: Cache, target: BucketFolder) -> None:
    """Put the tokens of the cache folder `source` into a place of the store that holds nothing else, then its
    manifest. Raises WrongInput where the tokens are damaged or something is there."""
    require_unused(target)
    if problems := verify_root(source.storage, source.manifest)[0]:
        raise WrongInput(f"{source.path}: {problems[0]}")
    send(source.folder, target, ROOT_ARRAYS, partial(verify_root, target, source.manifest))


def require_unused(target: BucketFolder) -> None:
    """Raises WrongInput where the place, which has no manifest, holds anything but what a cache begins with."""
    if strange := sorted(target.folders() - set(ROOT_ARRAYS)):
        raise WrongInput(f"{target} holds {strange[0]} and is not a routesae cache; give a new place")


def send(
    folder: Path,
    target: BucketFolder,
    names: Sequence[str],
    verify: Callable[[], tuple[list[str], Hashes]] | None = None,
) -> None:
    """Send the arrays `names` below a group's folder, then its zarr.json, without which it does not exist there.

    verify: reads what arrived again. Raises FailedRun where it finds a problem, or a size differs.
    """
    files = [file for name in names for file in _files(name)]
    for file in files:
        target.upload(folder / file, file)
    arrived = target.sizes()
    cut = [f"{file}: not all of it" for file in files if arrived.get(file) != (folder / file).stat().st_size]
    if problems := cut or (verify()[0] if verify is not None else []):
        raise FailedRun(f"{target}: {problems[0]} after it was sent; the same command sends it again")
    target.put("zarr.json", (folder / "zarr.json").read_bytes())


def _files(array: str) -> tuple[str, ...]:
    """Names of an array's files: its one data file, its metadata and the table that goes with document_starts.
    Whatever else is in its folder stays behind."""
    more = (DOCUMENTS,) if array == STARTS else ()
    return *more, f"{array}/{arrays.data_name(1 if array in VECTORS else 2)}", f"{array}/zarr.json"


def require_same_cache(one: Cache, other: Cache) -> None:
    """Raises WrongInput naming the first field, versions apart, in which two manifests differ."""
    for name in (name for name in Manifest.model_fields if name != "versions"):
        values = [getattr(cache.manifest, name) for cache in (one, other)]
        if values[0] != values[1]:
            raise WrongInput(
                f"{one.path} and {other.path} are not parts of one cache: {name} is {str(values[0])[:60]} in the "
                f"first, {str(values[1])[:60]} in the second"
            )


def _one_of_each(caches: Sequence[Cache]) -> dict[int, Shard]:
    """Every shard that a cache has, by index. Raises WrongInput where two have it and it is not the same."""
    shards: dict[int, Shard] = {}
    for cache in caches:
        for shard in cache.shards():
            first = shards.setdefault(shard.record.index, shard)
            if first.record.hashes != shard.record.hashes:
                raise WrongInput(
                    f"{first.path} and {shard.path} differ, though they are the same shard; delete the wrong one"
                )
    return dict(sorted(shards.items()))


def _require_room(target: Path, wanted: list[Shard]) -> None:
    folder = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    needed = sum(shard.storage.size() for shard in wanted)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WrongInput(
            f"{len(wanted)} shards to copy take {human_bytes(needed)}, but {folder} has {human_bytes(free)} free; "
            "make room, or make hard links with --link, on the same file system"
        )
