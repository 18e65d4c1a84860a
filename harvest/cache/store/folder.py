"""A folder in an object store: an s3://, gs:// or az:// URL in; its small objects, and ranges of its large ones, out.

    s3://bucket/shards/shard-00000/zarr.json       put last: without it the shard does not exist
    s3://bucket/shards/shard-00000/layer_12/c/0/0  the same bytes as the file of that name in a cache on disk

Retries, signatures and multipart uploads are obstore's. Credentials, region and endpoint come from the environment
(AWS_*, GOOGLE_*, AZURE_*) and are written nowhere. Every read of a data object names the ETag that its checks saw, so
an object that changed under the reader is an error and never a mixture of two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from routesae.harvest.cache.arrays import BadArray
from routesae.reporting import FailedRun, WrongInput

if TYPE_CHECKING:
    from obstore import Bytes

    Data = bytes | Bytes  # what a read gives

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
IN_FLIGHT = 64  # requests at a time: at 50 ms each and 0.3 to 1 MB a block, 400 MB/s and more
PIECE_BYTES = 8 << 20  # of a large object, read or written at a time
REQUEST_TIMEOUT = timedelta(seconds=30)
RETRIES = 8  # of one request, with backoff, within RETRY_TIMEOUT
RETRY_TIMEOUT = timedelta(seconds=90)


T = TypeVar("T", bound="Data")


class Stored(NamedTuple):
    """size in bytes, and the store's tag of this version of an object."""

    size: int
    etag: str | None


def is_url(text: object) -> bool:
    """Whether it names a place in an object store, or tries to, rather than a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(text)) is not None


class RemoteFolder:
    """What lies below `url`. Nothing is asked of the store before the first read.

    Raises, from every request: FileNotFoundError where there is no such object, WrongInput where the bucket is
    missing or closed, BadArray where an object changed or is short, FailedRun where the store does not answer.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    @classmethod
    def at(cls, url: str) -> RemoteFolder:
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
        return self.url

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def _store(self) -> Any:
        parts = urlsplit(self.url)
        return _bucket(f"{parts.scheme}://{parts.netloc}", _environment())

    def _key(self, name: str) -> str:
        return f"{urlsplit(self.url).path}/{name}".strip("/")

    # ------------------------------------------------------------------------------------------------- reading

    def folders(self) -> set[str]:
        """The names of the folders right below, whatever is in them."""
        import obstore

        with self._asking(""):
            found = obstore.list_with_delimiter(self._store(), self._key("") or None)
        return {prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]}

    def sizes(self) -> dict[str, int]:
        """Bytes of every object below, by its name counted from here."""
        import obstore

        key = self._key("")
        with self._asking(""):
            batches = obstore.list(self._store(), key or None)
            return {found["path"][len(key) :].lstrip("/"): found["size"] for batch in batches for found in batch}

    def stat(self, name: str) -> Stored:
        import obstore

        with self._asking(name):
            found = obstore.head(self._store(), self._key(name))
        return Stored(found["size"], found["e_tag"])

    def exists(self, name: str) -> bool:
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, largest: int) -> bytes:
        """All of a small object. Raises BadArray where it has more than `largest` bytes."""
        import obstore

        with self._asking(name):
            found = obstore.get(self._store(), self._key(name))
            if found.meta["size"] > largest:
                raise BadArray(f"{found.meta['size']:,} bytes, more than the {largest:,} that are read")
            data = found.bytes().to_bytes()
        return _whole(data, found.meta["size"])

    def tail(self, name: str, length: int) -> tuple[Stored, bytes]:
        """The object's size and tag, and its last `length` bytes, or all where it has fewer."""
        import obstore

        with self._asking(name):
            found = obstore.get(self._store(), self._key(name), options={"range": {"suffix": length}})
            data = found.bytes().to_bytes()
        stored = Stored(found.meta["size"], found.meta["e_tag"])
        return stored, _whole(data, min(length, stored.size))

    def range(self, name: str, first: int, after: int, stored: Stored) -> Data:
        """Bytes first … after-1 of an object that is still the one `stored` describes."""
        import obstore

        options: Any = {"range": (first, after)}
        if stored.etag is not None:
            options["if_match"] = stored.etag
        with self._asking(name):
            data = obstore.get(self._store(), self._key(name), options=options).bytes()
        return _whole(data, after - first)

    def pieces(self, name: str, stored: Stored, size: int | None = None) -> Iterator[Data]:
        """The first `size` bytes of an object (None: all of it) in order, PIECE_BYTES at a time, a few read ahead."""
        end = stored.size if size is None else size
        ranges = [(first, min(first + PIECE_BYTES, end)) for first in range(0, end, PIECE_BYTES)]
        with ThreadPoolExecutor(4, thread_name_prefix="object-pieces") as pool:
            waiting = [pool.submit(self.range, name, *one, stored) for one in ranges[:6]]
            for ahead in range(6, len(ranges) + 6):
                if not waiting:
                    return
                yield waiting.pop(0).result()
                if ahead < len(ranges):
                    waiting.append(pool.submit(self.range, name, *ranges[ahead], stored))

    def download(self, name: str, path: Path) -> None:
        """Copy an object into the new file `path`."""
        stored = self.stat(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for piece in self.pieces(name, stored):
                file.write(piece)

    # ------------------------------------------------------------------------------------------------- writing

    def put(self, name: str, data: bytes) -> None:
        """Make or replace a small object."""
        import obstore

        with self._asking(name):
            obstore.put(self._store(), self._key(name), data, use_multipart=False)

    def upload(self, path: Path, name: str) -> None:
        """Copy a file, a large one in parts that are sent side by side."""
        import obstore

        size = path.stat().st_size
        with self._asking(name):
            # A store takes 10,000 parts.
            obstore.put(self._store(), self._key(name), path, chunk_size=max(PIECE_BYTES, size // 9_000))

    # -------------------------------------------------------------------------------------------------- faults

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Say of a store's refusal what to do."""
        from obstore import exceptions

        what = f"{self}/{name}" if name else str(self)
        refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError)
        try:
            yield
        except (FileNotFoundError, exceptions.BaseError, PermissionError) as error:
            said = str(error)
            if "NoSuchBucket" in said or "ContainerNotFound" in said or "bucket does not exist" in said:
                bucket = urlsplit(self.url).netloc
                raise WrongInput(f"{what}: there is no bucket {bucket}; make it, or mend the URL") from None
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{what} is not there") from None
            if isinstance(error, refused) or re.search(
                r"status code: 40[13]|169\.254\.169\.254|metadata\.google", said
            ):
                raise WrongInput(
                    f"{what}: the store refuses access; set the credentials of one who may use it in the environment "
                    "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION for s3://)"
                ) from None
            if isinstance(error, exceptions.PreconditionError):
                raise BadArray("the object was changed while it was read") from None
            if "status code: 416" in said:
                raise BadArray("the object ends before the bytes asked for") from None
            raise FailedRun(
                f"{what}: the store does not answer as it should ({_reason(said)}); when it does, the same command "
                "goes on"
            ) from None


def _whole(data: T, length: int) -> T:
    if (found := len(memoryview(data))) != length:
        raise BadArray(f"the store gave {found:,} bytes where {length:,} were asked for")
    return data


def _reason(said: str) -> str:
    """The last clause of obstore's first line: without addresses, which may carry signatures."""
    return said.partition("\n")[0].rpartition(" - ")[2].strip()[:160]


def _environment() -> tuple[str, ...]:
    """What a store is set up by besides its URL: another endpoint is another store."""
    return tuple(os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ACCESS_KEY_ID"))


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
