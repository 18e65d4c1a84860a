"""Caches in an object store: a folder is a prefix of an s3://, gs:// or az:// URL, a file is an object.

    s3://bucket/shards/shard-00000/layer_12/c/0/0  the same bytes as the file of that name in a cache on disk
    s3://bucket/shards/shard-00000/zarr.json       put last: without it the shard does not exist

Retries, signatures and multipart uploads are obstore's. Credentials, region and endpoint come from the environment
(AWS_*, GOOGLE_*, AZURE_*) and are written nowhere. An object that changed under the reader is not what its checksums
say, whether all of it or a part was read.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import xxhash

from routesae.harvest.cache import arrays
from routesae.harvest.cache.arrays import CHUNK_ROWS, Array, BadArray, array_hash, checked, data_name
from routesae.harvest.cache.store.blocks import IN_FLIGHT, PIECE_BYTES, Block, blocks
from routesae.machine.files import LARGEST_BYTES
from routesae.reporting import FailedRun, WrongInput

if TYPE_CHECKING:
    from routesae.harvest.cache.store.blocks import Data

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
FETCHED_BYTES = 1 << 16  # at least so much is fetched by one request, which takes as long for less
REQUEST_TIMEOUT = timedelta(seconds=30)
RETRIES = 8  # of one request, with backoff, within RETRY_TIMEOUT
RETRY_TIMEOUT = timedelta(seconds=90)

T = TypeVar("T", bound="Data")


class BucketFolder:
    """What lies below `url`, as a DiskFolder. Nothing is asked of the store before the first read."""

    def __init__(self, url: str):
        self.path = self.address = url.rstrip("/")
        self._records: dict[str, bytes] = {}  # of committed shards, which stay as they are

    @classmethod
    def at(cls, url: str) -> BucketFolder:
        """Raises WrongInput where `url` is not one that can be used."""
        parts = urlsplit(url)
        # abfs://container@account.dfs.core.windows.net/path names a container so.
        named = parts.username is not None and parts.scheme not in ("abfs", "abfss")
        if named or parts.password is not None or parts.query or parts.fragment:
            shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
            raise WrongInput(
                f"{shown} came with credentials or a query; give the plain URL, and credentials in the environment"
            )
        if parts.scheme not in SCHEMES or not parts.netloc:
            known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise WrongInput(
                f"{url} is not a place in an object store that is known; give a folder, or one of {known}"
            )
        if ".." in parts.path.split("/"):
            raise WrongInput(f"{url} has a .. in it; give the plain URL")
        folder = cls(url)
        folder._store()
        return folder

    def __str__(self) -> str:
        return self.path

    def __truediv__(self, name: str) -> BucketFolder:
        return BucketFolder(f"{self.path}/{name}")

    def folder(self) -> Path:
        raise WrongInput(
            f"{self} is in an object store, and this needs a folder on a disk; make one with routesae cache copy"
        )

    def _store(self) -> Any:
        parts = urlsplit(self.path)
        # Another endpoint or account is another store.
        names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ACCESS_KEY_ID")
        return _bucket(f"{parts.scheme}://{parts.netloc}", tuple(os.environ.get(name, "") for name in names))

    def _key(self, name: str) -> str:
        return f"{urlsplit(self.path).path}/{name}".strip("/")

    # ------------------------------------------------------------------------------------------------- reading

    def folders(self) -> set[str]:
        """The names of the folders right below, whatever is in them."""
        with self._asking("") as obstore:
            listed = obstore.list_with_delimiter(self._store(), self._key("") or None)
        return {prefix.rstrip("/").rpartition("/")[2] for prefix in listed["common_prefixes"]}

    def sizes(self) -> dict[str, int]:
        """Bytes of every object below, by its name counted from here."""
        key = self._key("")
        with self._asking("") as obstore:
            batches = obstore.list(self._store(), key or None)
            return {one["path"][len(key) :].lstrip("/"): one["size"] for batch in batches for one in batch}

    def size(self) -> int:
        return sum(self.sizes().values())

    def exists(self, name: str) -> bool:
        try:
            self.tail(name, 1)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, largest: int = LARGEST_BYTES) -> bytes:
        with self._asking(name) as obstore:
            answer = obstore.get(self._store(), self._key(name))
            if (size := answer.meta["size"]) > largest:
                raise BadArray(f"{size:,} bytes, more than the {largest:,} that are read")
            data: bytes = answer.bytes().to_bytes()
            return _whole(data, size)

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        with self._asking(name) as obstore:
            answer = obstore.get(self._store(), self._key(name), options={"range": {"suffix": length}})
            data: bytes = answer.bytes().to_bytes()
        size: int = answer.meta["size"]
        return size, _whole(data, min(length, size))

    def range(self, name: str, first: int, after: int) -> Data:
        """Bytes first … after-1 of an object."""
        with self._asking(name) as obstore:
            data: Data = obstore.get(self._store(), self._key(name), options={"range": (first, after)}).bytes()
        return _whole(data, after - first)

    def ranges(self, name: str, first: int, after: int, step: int) -> Iterator[Data]:
        """Bytes first … after-1 of an object in order, `step` at a time, a few read ahead."""
        bounds = [(start, min(start + step, after)) for start in range(first, after, step)]
        if len(bounds) == 1:
            yield self.range(name, *bounds[0])
            return
        with ThreadPoolExecutor(4, thread_name_prefix="object-pieces") as pool:
            waiting = [pool.submit(self.range, name, *one) for one in bounds[:6]]
            for following in [*bounds[6:], *[None] * min(6, len(bounds))]:
                yield waiting.pop(0).result()
                if following is not None:
                    waiting.append(pool.submit(self.range, name, *following))

    def fetch(self, name: str, target: Path, *, link: bool = False) -> None:
        size, _ = self.tail(name, 1)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            for piece in self.ranges(name, 0, size, PIECE_BYTES):
                file.write(piece)

    def shard_names(self) -> set[str]:
        def look(name: str) -> None:
            with suppress(FileNotFoundError):
                self.record(name)

        listed = {name for name in self.folders() if name.startswith("shard-")}
        if unknown := sorted(listed - self._records.keys()):
            with ThreadPoolExecutor(min(IN_FLIGHT, len(unknown)), thread_name_prefix="shard-records") as pool:
                list(pool.map(look, unknown))
        return listed & self._records.keys()

    def has_shard(self, name: str) -> bool:
        return (self / name).exists("zarr.json")

    def record(self, name: str) -> bytes:
        if name not in self._records:
            try:
                self._records[name] = (self / name).read("zarr.json")
            except BadArray as bad:
                self._records[name] = str(bad).encode()  # not JSON, so the shard is refused where it is opened
        return self._records[name]

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike, content: str) -> BucketArray:
        return BucketArray(self, shape, dtype, content)

    # ------------------------------------------------------------------------------------------------- writing

    def put(self, name: str, data: bytes) -> None:
        """Make or replace a small object."""
        with self._asking(name) as obstore:
            obstore.put(self._store(), self._key(name), data, use_multipart=False)

    def upload(self, path: Path, name: str) -> None:
        """Copy a file, a large one in parts that are sent side by side."""
        size = path.stat().st_size
        with self._asking(name) as obstore:
            # A store takes 10,000 parts.
            obstore.put(self._store(), self._key(name), path, chunk_size=max(PIECE_BYTES, size // 9_000))

    # -------------------------------------------------------------------------------------------------- faults

    @contextmanager
    def _asking(self, name: str) -> Iterator[Any]:
        """The package obstore, while open: its refusals become one line with the remedy."""
        import obstore
        from obstore import exceptions

        what = f"{self}/{name}" if name else str(self)
        refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError)
        try:
            yield obstore
        except (FileNotFoundError, exceptions.BaseError, PermissionError) as error:
            said = str(error)
            if "NoSuchBucket" in said or "ContainerNotFound" in said or "bucket does not exist" in said:
                bucket = urlsplit(self.path).netloc
                raise WrongInput(f"{what}: there is no bucket {bucket}; make it, or correct the URL") from None
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{what} is not there") from None
            if isinstance(error, refused) or re.search(
                r"status code: 40[13]|169\.254\.169\.254|metadata\.google", said
            ):
                raise WrongInput(
                    f"{what}: the store refuses access; set credentials that may read it in the environment "
                    "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION for s3://)"
                ) from None
            if "status code: 416" in said:
                raise BadArray("the object ends before the bytes asked for") from None
            raise FailedRun(
                f"{what}: the store does not answer as it should ({_reason(said)}); once it does, the same command "
                "goes on"
            ) from None


class BucketArray:
    """A DiskArray that the first read checks, by two requests.

    What is read, unless in pieces, goes through blocks of whole chunks that stay on this disk for a while (.blocks).
    """

    def __init__(self, folder: BucketFolder, shape: tuple[int, ...], dtype: npt.DTypeLike, content: str):
        self._folder, self._shape, self._content = folder, shape, content
        self._name = data_name(len(shape))
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._row_bytes = prod(shape[1:]) * self._dtype.itemsize
        self._chunk_bytes = CHUNK_ROWS * self._row_bytes
        self._block_rows = CHUNK_ROWS * max(1, FETCHED_BYTES // self._chunk_bytes)
        self._lock = threading.Lock()
        self._is_checked = False

    def _fetched(self, first: int, after: int) -> Iterator[Data]:
        """The bytes of rows first … after-1, some megabytes of whole chunks at a time."""
        folder = self._folder
        with self._lock:
            if not self._is_checked:
                checked(folder.read, folder.tail, self._shape, self._dtype)
            self._is_checked = True
        step = self._chunk_bytes * max(1, PIECE_BYTES // self._chunk_bytes)
        yield from folder.ranges(self._name, first * self._row_bytes, after * self._row_bytes, step)

    def pieces(self) -> Iterator[Array]:
        for piece in self._fetched(0, self._shape[0]):
            yield np.frombuffer(memoryview(piece), self._dtype).reshape(-1, *self._shape[1:])

    def whole(self) -> Array:
        block = self._block(0, self._shape[0])
        for _ in range(2):
            values = blocks().mapped(block, self._dtype, self._shape)
            if array_hash(values) == self._content:
                return values
            blocks().drop(block.key)  # a bit flipped on the way, or on this disk
        raise BadArray(arrays.CHECKSUM_DIFFERS)

    def open(self) -> BucketArray:
        return self

    def read(self, first: int, out_mW: npt.NDArray[np.generic]) -> None:
        after = first + len(out_mW)
        for begin, block in self._blocks(first, after):
            try:
                file = blocks().open(block)
            except WrongInput as refused:  # in the middle of a run it is not the command that is wrong
                raise FailedRun(str(refused)) from refused
            low, high = max(first, begin), min(after, begin + block.size // self._row_bytes)
            file.read((low - begin) * self._row_bytes, out_mW[low - first : high - first])

    def advise(self, first: int, after: int) -> None:
        for _, block in self._blocks(first, after):
            blocks().announce(block)

    def drop(self, first: int, after: int) -> bool:
        for _, block in self._blocks(first, after):
            blocks().drop(block.key)
        return True

    def _block(self, first: int, after: int) -> Block:
        """Rows first … after-1, to be fetched when they are needed, under a name that is found again."""
        content = f"{self._folder} {self._content} {first} {after} {self._row_bytes}"
        key = xxhash.xxh3_128_hexdigest(content.encode())
        return Block(key, (after - first) * self._row_bytes, lambda: self._fetched(first, after))

    def _blocks(self, first: int, after: int) -> Iterator[tuple[int, Block]]:
        """The blocks that hold the rows, each with its first row."""
        for begin in range(first // self._block_rows * self._block_rows, after, self._block_rows):
            yield begin, self._block(begin, min(begin + self._block_rows, self._shape[0]))


def _whole(data: T, length: int) -> T:
    if (received := len(memoryview(data))) != length:
        raise BadArray(f"the store gave {received:,} of the {length:,} bytes asked for")
    return data


def _reason(said: str) -> str:
    """The last clause of obstore's first line: without addresses, which may carry signatures."""
    return said.partition("\n")[0].rpartition(" - ")[2].strip()[:160]


@cache
def _bucket(url: str, environment: tuple[str, ...]) -> Any:
    """One client a bucket: it keeps its connections."""
    try:
        from obstore.store import from_url
    except ImportError:
        raise WrongInput(f"{url} needs the extra remote: pip install 'routesae[remote]'") from None
    from obstore.exceptions import BaseError

    plain = any(endpoint.startswith("http://") for endpoint in environment[:2])
    try:
        return from_url(
            url,
            client_options={"timeout": REQUEST_TIMEOUT, "allow_http": plain},
            retry_config={"max_retries": RETRIES, "retry_timeout": RETRY_TIMEOUT},
        )
    except BaseError as error:
        raise WrongInput(f"{url} cannot be opened: {_reason(str(error))}") from None
