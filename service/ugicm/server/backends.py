"""Bitstream caches outside of this process's memory, chosen by URL: files, Redis or Valkey, S3."""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import structlog

from ugicm.server.cache import ID_PATTERN, BitstreamCache, MemoryCache, bitstream_id, hash_of
from ugicm.server.settings import Settings, setting
from ugicm.server.threads import run_in

Result = TypeVar("Result")
_log = structlog.get_logger(__name__)


HANGING_S = 2.0
"""How long threads that may hang are waited for at the end."""
UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)
"""Errors that say something of one entry, not of the whole folder."""


class FileCache:
    """Files in a folder, written atomically; the least recently used go first when it grows too large.

    Several processes may share the folder; each notices what the others wrote at its next sweep. What else
    lies in the folder is left alone. Files count in whole blocks, as on the disk.
    """

    BLOCK = 4096
    """Bytes in which most file systems allot room."""
    THREAD_NAME = "file-cache"
    THREADS = 8
    """Of its own: on a file system that hangs they hang, and nothing else may wait for them."""
    KEEP = 0.9
    """A sweep deletes until this part of the limit is left."""
    LARGEST = 1.5
    """Nothing more is kept beyond this part of the limit: while a sweep runs, or where it may not delete."""
    REST_S = 60.0
    """After a sweep that could not bring the folder below its limit."""
    PROBE_BYTES = 64 << 10
    """What a check writes: an empty file has room on a full disk, too."""
    _STALE_S = 3600.0
    _TEMPORARY = ".part-"

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._size: int | None = None
        self._written = 0
        """Bytes since the last sweep began; others who share the folder may have written as many."""
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self.THREADS, thread_name_prefix=self.THREAD_NAME)
        # Sweeping takes seconds where there are many files: nobody waits for it.
        self._sweeper = ThreadPoolExecutor(1, thread_name_prefix=f"{self.THREAD_NAME}-sweep")
        self._sweeping = self._closed = False
        self._rest_until = -math.inf

    @property
    def size(self) -> int:
        """Bytes in the folder at the last sweep and of what this process did since; 0 before the first."""
        return self._size or 0

    async def get(self, id: str) -> bytes | None:
        return await self._in_thread(self._get, id)

    async def put(self, id: str, bitstream: bytes) -> bool | None:
        return await self._in_thread(self._put, id, bitstream)

    async def delete(self, id: str) -> bool:
        return await self._in_thread(self._delete, id)

    async def check(self) -> None:
        """Write and remove a file."""
        await self._in_thread(self._check)

    async def close(self) -> None:
        """Do not wait for what hangs; a sweep ends early."""
        with self._lock:
            self._closed = True
        for pool in (self._pool, self._sweeper):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[..., Result], *args: object) -> Result:
        return await run_in(self._pool, lambda: work(*args))

    def _path(self, id: str) -> Path:
        return self._folder / id[:2] / id

    def _get(self, id: str) -> bytes | None:
        path = self._path(id)
        try:
            bitstream = path.read_bytes()
            if bitstream_id(bitstream) != id:  # torn by a power failure, or edited
                with contextlib.suppress(OSError):  # others may own it
                    path.unlink()
                return None
        except UNREADABLE:
            return None
        self._touch(path)
        return bitstream

    def _temporary(self, folder: Path) -> Path:
        return folder / f"{self._TEMPORARY}{secrets.token_hex(8)}"

    def _put(self, id: str, bitstream: bytes) -> bool | None:
        path = self._path(id)
        try:
            if path.read_bytes() == bitstream:  # else it is torn, and written anew
                self._touch(path)
                return True
        except UNREADABLE:
            pass
        room = self._room(len(bitstream))
        if room > self.KEEP * self._max_bytes:  # a sweep would delete all the others, then this one
            return None
        with self._lock:
            busy = self._sweeping or time.monotonic() < self._rest_until
            if busy and (self._size or self._written) + room > self.LARGEST * self._max_bytes:
                return None
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._temporary(path.parent)
        try:
            with temporary.open("xb") as file:
                file.write(bitstream)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with self._lock:
            self._written += room
            if self._size is not None:
                self._size += room
            self._sweep_if_due()
        return False

    def _sweep_if_due(self) -> None:
        """With the lock held."""
        due = (
            self._size is None
            or self._size > self._max_bytes
            or self._written > (1 - self.KEEP) * self._max_bytes
        )
        if due and not (self._sweeping or self._closed) and time.monotonic() >= self._rest_until:
            self._sweeper.submit(self._sweep)  # first, as there may be no thread to be had
            self._sweeping, self._written = True, 0

    def _room(self, size: int) -> int:
        """Bytes that a file of this size takes on the disk."""
        return -(-size // self.BLOCK) * self.BLOCK

    def _touch(self, path: Path) -> None:
        """Note the use, where that can be noted: others may own the file, or the disk be read-only."""
        with contextlib.suppress(OSError):
            os.utime(path)

    def _delete(self, id: str) -> bool:
        path = self._path(id)
        try:
            room = self._room(path.stat().st_size)
            path.unlink()
        except FileNotFoundError:
            return False
        with self._lock:
            if self._size is not None:
                self._size = max(0, self._size - room)
        return True

    def _check(self) -> None:
        folder = self._folder / "00"  # a sweep takes away what a killed process leaves there
        folder.mkdir(parents=True, exist_ok=True)
        probe = self._temporary(folder)
        try:
            probe.write_bytes(bytes(self.PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete the longest unused files if all together are too large, and note what is left."""
        try:
            left, refused = self._delete_oldest()
            if refused:
                _log.warning(
                    "files of the bitstream cache cannot be read or deleted",
                    folder=str(self._folder),
                    count=len(refused),
                    first=str(refused[0]),
                )
            with self._lock:
                # Files written meanwhile may have been seen, too: counted twice until the next sweep.
                self._size = left + self._written
                if left > self._max_bytes:
                    self._rest_until = time.monotonic() + self.REST_S
        finally:
            with self._lock:
                self._sweeping = False

    def _delete_oldest(self) -> tuple[int, list[OSError]]:
        """What the files take that are left, in bytes, and what went wrong; others may own some of them."""
        files: list[tuple[int, int, str]] = []
        refused: list[OSError] = []
        for entry in self._entries(refused):
            try:
                status = entry.stat()
                if re.fullmatch(ID_PATTERN, entry.name):
                    files.append((status.st_mtime_ns, self._room(status.st_size), entry.path))
                elif entry.name.startswith(self._TEMPORARY) and time.time() - status.st_mtime > self._STALE_S:
                    Path(entry.path).unlink()  # left behind by a killed process
            except FileNotFoundError:
                continue
            except OSError as error:
                refused.append(error)
        size = sum(room for _, room, _ in files)
        if size > self._max_bytes:
            for _, room, path in sorted(files):
                if self._closed or size <= self.KEEP * self._max_bytes:
                    break
                try:
                    Path(path).unlink(missing_ok=True)
                    size -= room
                except OSError as error:
                    refused.append(error)
        return size, refused

    def _entries(self, refused: list[OSError]) -> Iterator[os.DirEntry[str]]:
        """Of the subfolders, until the cache is closed."""
        for folder in self._folder.glob("[0-9a-f][0-9a-f]/"):
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if self._closed:
                            return
                        yield entry
            except OSError as error:
                refused.append(error)


async def _whole(cache: BitstreamCache, id: str, found: bytes | None) -> bytes | None:
    """What is stored under an id, if it is what the id says; else it is deleted, to be stored anew."""
    if found is None or await hash_of(found) == id:
        return found
    _log.warning("an entry of the bitstream cache is not what its name says", id=id)
    with contextlib.suppress(Exception):  # it may be allowed to read only; the store does answer
        await cache.delete(id)
    return None


class RedisCache:
    """Redis or Valkey; entries expire `ttl_s` after they were last stored."""

    PREFIX = "ugicm:bitstream:"
    CHECK_S = 10
    """How long the entry of a check stays."""

    def __init__(self, url: str, *, ttl_s: int) -> None:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        # The scheme only: "valkey" may as well be part of a host's name or of a password.
        url = re.sub("(?i)^valkey", "redis", url)
        # Requests beyond its connections wait for one; other pools fail them, as if Redis were down.
        # A connection that the server has closed meanwhile (a restart, its idle timeout) is made once more.
        # How long an answer may take is the caller's business.
        pool = BlockingConnectionPool.from_url(
            url, timeout=None, socket_timeout=None, socket_connect_timeout=None, retry=Retry(NoBackoff(), 1)
        )
        self._redis: Any = Redis.from_pool(pool)
        self._ttl_s = ttl_s

    async def get(self, id: str) -> bytes | None:
        found: bytes | None = await self._redis.get(self.PREFIX + id)
        return await _whole(self, id, found)

    async def put(self, id: str, bitstream: bytes) -> bool:
        found: bytes | None = await self._redis.set(self.PREFIX + id, bitstream, ex=self._ttl_s, get=True)
        return found == bitstream

    async def delete(self, id: str) -> bool:
        return bool(await self._redis.delete(self.PREFIX + id))

    async def check(self) -> None:
        """Write an entry that soon expires: a full store or a replica answers, but takes nothing."""
        await self._redis.set(self.PREFIX + "check", b"", ex=self.CHECK_S)

    async def close(self) -> None:
        await self._redis.aclose()


class S3Cache:
    """An S3 bucket, or a prefix in one; expiry is the bucket's lifecycle rule.

    Endpoint, region and credentials come from the standard ``AWS_`` variables.
    """

    def __init__(self, url: str) -> None:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store

        try:
            self._store = S3Store.from_url(url)
        except BaseError as error:  # of the variables; its further lines are for programmers
            raise ValueError(str(error).partition("\n")[0]) from error

    async def get(self, id: str) -> bytes | None:
        try:
            found = await self._store.get_async(id)
        except FileNotFoundError:
            return None
        return await _whole(self, id, bytes(await found.bytes_async()))

    async def put(self, id: str, bitstream: bytes) -> bool:
        if await self._size(id) == len(bitstream):
            return True
        await self._store.put_async(id, bitstream)
        return False

    async def delete(self, id: str) -> bool:
        found = await self._size(id) is not None
        await self._store.delete_async(id)
        return found

    async def check(self) -> None:
        """Write an object, always the same: fails without the bucket or the right to write."""
        await self._store.put_async("check", b"")

    async def close(self) -> None:
        """Connections close with the process."""

    async def _size(self, id: str) -> int | None:
        """Bytes of the object, or None."""
        try:
            return (await self._store.head_async(id))["size"]
        except FileNotFoundError:
            return None


def threads_hang(*names: str) -> bool:
    """Whether threads go on that were told to end: of a `FileCache`, or whose names begin so.

    Python would wait for them before it exits.
    """
    names = (FileCache.THREAD_NAME, *names)
    hanging = [thread for thread in threading.enumerate() if thread.name.startswith(names)]
    until = time.monotonic() + HANGING_S
    for thread in hanging:
        thread.join(max(0, until - time.monotonic()))
    return any(thread.is_alive() for thread in hanging)


def open_cache(settings: Settings) -> BitstreamCache:
    """The cache that ``cache_url`` names; connects at first use.

    Raises:
        ValueError: the URL is not understood.
    """
    try:
        url = urlsplit(settings.cache_url)
        match url.scheme:
            case "memory":
                return MemoryCache(settings.cache_bytes)
            case "file" if re.match("/+[^/]", url.path) and url.netloc in ("", "localhost"):
                return FileCache(Path(unquote(url.path)), settings.cache_bytes)
            case "redis" | "rediss" | "valkey" | "valkeys" if url.hostname:
                return RedisCache(settings.cache_url, ttl_s=settings.cache_ttl_s)
            case "s3" if url.netloc:
                return S3Cache(settings.cache_url)
    except ValueError as error:
        if settings.cache_url.startswith("s3:"):
            raise ValueError(f"{setting('cache_url')}: {error}") from error
        # Its text may quote a part of a password.
        raise ValueError(
            f"{setting('cache_url')} is no URL: is its port a number, and are / # ? @ in its password "
            "written %2F %23 %3F %40?"
        ) from None
    raise ValueError(
        f"{setting('cache_url')} must be memory:, file:///path, redis://host:6379/0 (or rediss://, "
        f"valkey://) or s3://bucket/prefix, got the scheme {url.scheme!r}"
    )
