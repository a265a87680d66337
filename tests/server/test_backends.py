"""Caches outside of the process: files, a real redis-server, an S3 server."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from redis.asyncio import SSLConnection
from redis.exceptions import NoPermissionError, OutOfMemoryError

from tests.conftest import no_thread
from tests.live import free_port, wait_until
from ugicm.server.backends import FileCache, RedisCache, S3Cache, open_cache, threads_hang
from ugicm.server.cache import BitstreamCache, MemoryCache, bitstream_id
from ugicm.server.settings import Settings

pytestmark = pytest.mark.anyio
BLOCK = FileCache.BLOCK


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class RedisServer:
    """A real redis-server on a free port."""

    def __init__(self, folder: Path) -> None:
        self.port, self._folder = free_port(), folder
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: listening(self.port))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        pytest.skip("needs the redis-server binary (apt-get install redis-server)")
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def s3_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="pictures")
    yield "s3://pictures/some/prefix"
    server.stop()


@pytest.fixture(params=["memory", "file", "redis", "s3"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> BitstreamCache:
    match request.param:
        case "redis":
            url = request.getfixturevalue("redis_server").url
        case "s3":
            url = request.getfixturevalue("s3_url")
        case "file":
            url = f"file://{tmp_path}/made/on/demand"
        case other:
            url = f"{other}:"
    return open_cache(Settings(cache_url=url))


async def test_every_cache_keeps_and_forgets(cache: BitstreamCache) -> None:
    await cache.check()
    bitstream = os.urandom(100_000)
    id = bitstream_id(bitstream)
    assert await cache.get(id) is None
    assert await cache.delete(id) is False
    assert await cache.put(id, bitstream) is False
    assert await cache.put(id, bitstream) is True
    assert await cache.get(id) == bitstream
    assert await cache.delete(id) is True
    assert await cache.get(id) is None
    await cache.close()


@pytest.mark.parametrize("store", ["redis", "s3"])
async def test_what_is_not_what_its_id_says_is_stored_anew(
    store: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("redis_server" if store == "redis" else "s3_url")
    cache = open_cache(Settings(cache_url=server.url if store == "redis" else server))
    id = bitstream_id(b"bits")
    assert await cache.put(id, b"other bits") is False
    assert await cache.get(id) is None
    for damaged in (b"bit", b"more bits"):
        assert await cache.put(id, damaged) is False
        assert await cache.put(id, b"bits") is False
        assert await cache.get(id) == b"bits"
    await cache.close()


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("memory:", MemoryCache),
        ("file:///var/cache/ugicm", FileCache),
        ("redis://:secret@cache:6379/1", RedisCache),
        ("rediss://cache", RedisCache),
        ("valkey://cache:6379", RedisCache),
        ("VALKEY://cache:6379", RedisCache),
        ("s3://bucket", S3Cache),
    ],
)
def test_the_url_decides(url: str, kind: type[object]) -> None:
    assert isinstance(open_cache(Settings(cache_url=url)), kind)


async def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "with space").mkdir()
    await store(open_cache(Settings(cache_url=(tmp_path / "with space").as_uri())), b"bits")
    assert len(files(tmp_path / "with space")) == 1


@pytest.mark.parametrize(
    "url",
    [
        "",
        "cache",
        "ftp://x",
        "file://",
        "file://host/path",
        "file:relative",
        "redis:",
        "redis://h:abc",
        "redis://[h",
        "s3:x",
        "redis://user:hunter2#x@cache:6379/0",
        "redis://user:hunter2/x@cache:6379/0",
        "redis://user:hunter2?x@cache:6379/0",
        "rediss://user:hunter2@cache:hunter2",
        "hunter2",
    ],
)
def test_other_urls_are_refused_without_their_secrets(url: str) -> None:
    with pytest.raises(ValueError, match="UGICM_CACHE_URL") as caught:
        open_cache(Settings.model_construct(cache_url=url))
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "host", "password", "encrypted"),
    [
        ("redis://valkey:6379/0", "valkey", None, False),
        ("redis://:valkey-pw@h", "h", "valkey-pw", False),
        ("valkey://:valkey-pw@valkey", "valkey", "valkey-pw", False),
        ("valkeys://valkey", "valkey", None, True),
        ("rediss://h", "h", None, True),
    ],
)
def test_only_the_scheme_is_translated(url: str, host: str, password: str | None, encrypted: bool) -> None:
    pool = RedisCache(url, ttl_s=1)._redis.connection_pool
    assert pool.connection_kwargs["host"] == host
    assert pool.connection_kwargs.get("password") == password
    assert issubclass(pool.connection_class, SSLConnection) is encrypted


@pytest.mark.parametrize(("options", "limit"), [("", None), ("?socket_timeout=7", 7)])
def test_redis_has_no_limit_of_its_own(options: str, limit: float | None) -> None:
    """That is `UGICM_CACHE_TIMEOUT_S`; the library's would end what that allows."""
    pool = RedisCache(f"redis://h{options}", ttl_s=1)._redis.connection_pool
    assert pool.connection_kwargs["socket_timeout"] == limit
    assert pool.connection_kwargs["socket_connect_timeout"] is None


# Files


def umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


async def store(cache: BitstreamCache, *bitstreams: bytes) -> list[str]:
    ids = [bitstream_id(bitstream) for bitstream in bitstreams]
    for id, bitstream in zip(ids, bitstreams, strict=True):
        await cache.put(id, bitstream)
    return ids


def room_taken(folder: Path) -> int:
    """Bytes of the disk, by whole blocks."""
    return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in files(folder))


async def swept(cache: FileCache) -> None:
    await asyncio.wrap_future(cache._sweeper.submit(lambda: None))


async def test_files_survive_the_process(tmp_path: Path) -> None:
    (id,) = await store(FileCache(tmp_path, 10 * BLOCK), b"bits")
    assert await FileCache(tmp_path, 10 * BLOCK).get(id) == b"bits"


async def test_the_longest_unused_files_go_first(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10 * BLOCK)
    ids = await store(cache, *(bytes([i]) * 2 * BLOCK for i in range(4)))
    await swept(cache)
    for age, id in enumerate(reversed(ids)):
        os.utime(tmp_path / id[:2] / id, (1000 - age, 1000 - age))
    await cache.get(ids[0])  # used again
    ids += await store(cache, b"x" * 3 * BLOCK)
    await swept(cache)
    kept = {path.name for path in files(tmp_path)}
    assert kept == {ids[0], ids[2], ids[3], ids[4]}


async def test_an_entry_that_a_sweep_would_delete_is_not_written(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10 * BLOCK)
    (id,) = await store(cache, b"x" * 3 * BLOCK)
    for size in (9 * BLOCK + 1, 10 * BLOCK + 1):
        assert await cache.put(bitstream_id(bytes(size)), bytes(size)) is None
    assert [path.name for path in files(tmp_path)] == [id]
    await swept(cache)
    largest = bytes(9 * BLOCK)
    assert await cache.put(bitstream_id(largest), largest) is False
    await swept(cache)
    assert [path.name for path in files(tmp_path)] == [bitstream_id(largest)]


async def test_the_limit_holds_over_files_of_an_earlier_process(tmp_path: Path) -> None:
    await store(FileCache(tmp_path, 100 * BLOCK), *(bytes([i]) * 9 * BLOCK for i in range(5)))
    cache = FileCache(tmp_path, 10 * BLOCK)
    await store(cache, b"new")
    await swept(cache)
    assert room_taken(tmp_path) <= 10 * BLOCK


async def test_small_files_count_as_what_they_take(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10 * BLOCK)
    for i in range(40):
        await store(cache, bytes([i]))
        await swept(cache)
    assert 9 <= len(files(tmp_path)) <= 10
    assert cache.size == len(files(tmp_path)) * BLOCK


async def test_what_is_deleted_makes_room(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 100 * BLOCK)
    await store(cache, b"first")
    await swept(cache)
    (id,) = await store(cache, bytes(2 * BLOCK))
    assert cache.size == 3 * BLOCK
    await cache.delete(id)
    assert cache.size == room_taken(tmp_path) == BLOCK


async def test_nothing_waits_for_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = threading.Event()
    slow = FileCache._delete_oldest
    monkeypatch.setattr(FileCache, "_delete_oldest", lambda cache: there.wait(60) and slow(cache))
    cache = FileCache(tmp_path, 10 * BLOCK)
    ids = await asyncio.wait_for(store(cache, *(bytes([i]) for i in range(20))), 30)
    assert await asyncio.wait_for(cache.get(ids[0]), 30) == bytes([0])
    assert len(files(tmp_path)) == 16  # the rest is not kept, or the folder might grow for ever
    there.set()
    await swept(cache)
    assert len(files(tmp_path)) == 9
    await store(cache, b"next")
    await swept(cache)
    assert cache.size == 10 * BLOCK


async def test_files_that_cannot_be_deleted_stay_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, owned_by_others = Path.unlink, set[str]()

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name in owned_by_others:
            raise PermissionError(1, "not yours", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    cache = FileCache(tmp_path, 10 * BLOCK)
    owned_by_others |= set(await store(cache, b"oldest"))
    await swept(cache)
    for path in files(tmp_path):
        os.utime(path, (0, 0))
    with structlog.testing.capture_logs() as logs:
        ids = []
        for i in range(10):
            ids += await store(cache, bytes([i]))
            await swept(cache)
    assert len(files(tmp_path)) == 9
    assert owned_by_others < {path.name for path in files(tmp_path)}
    (line,) = logs
    assert (line["count"], "not yours" in line["first"]) == (1, True)
    owned_by_others |= set(ids) | {bitstream_id(bytes([i])) for i in range(10, 40)}
    for i in range(10, 40):
        await store(cache, bytes([i]))
        await swept(cache)
    assert len(files(tmp_path)) == 15


async def test_a_folder_that_cannot_be_read_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "00":
            raise PermissionError(13, "not yours", str(path))
        return scandir(path)

    (tmp_path / "00").mkdir()
    cache = FileCache(tmp_path, 10 * BLOCK)
    monkeypatch.setattr("ugicm.server.backends.os.scandir", refuse)
    for i in range(20):
        await store(cache, bytes([i]))
        await swept(cache)
    assert 9 <= len(files(tmp_path)) <= 11


async def test_processes_that_share_a_folder_keep_its_limit(tmp_path: Path) -> None:
    caches = [FileCache(tmp_path, 20 * BLOCK) for _ in range(4)]
    peak = 0
    for i in range(60):
        await store(caches[i % 4], bytes([i]) * BLOCK)
        await swept(caches[i % 4])
        peak = max(peak, room_taken(tmp_path))
    assert peak <= 1.5 * 20 * BLOCK


async def test_files_that_others_own_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(path)

    cache = FileCache(tmp_path, 10 * BLOCK)
    (id,) = await store(cache, b"bits")
    assert files(tmp_path)[0].stat().st_mode & 0o777 == 0o666 & ~umask()
    monkeypatch.setattr(os, "utime", refuse)
    assert await cache.get(id) == b"bits"
    assert await cache.put(id, b"bits") is True


async def test_a_full_disk_fails_the_check(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            await FileCache(tmp_path, 10 * BLOCK).check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path) == []


async def test_a_full_disk_keeps_no_part_of_a_bitstream(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 100 * BLOCK)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            await store(cache, bytes(BLOCK))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path) == []


async def test_a_sweep_that_failed_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cache: FileCache) -> None:
        raise OSError(5, "Input/output error")

    cache = FileCache(tmp_path, 10 * BLOCK)
    with monkeypatch.context() as patch:
        patch.setattr(FileCache, "_delete_oldest", fail)
        await store(cache, b"first")
        await swept(cache)
    for i in range(20):
        await store(cache, bytes([i]))
        await swept(cache)
    assert len(files(tmp_path)) <= 10


async def test_files_that_hang_hold_up_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = threading.Event()
    monkeypatch.setattr(Path, "read_bytes", lambda path: there.wait(60) and b"")
    cache = FileCache(tmp_path, 10 * BLOCK)
    hanging = [asyncio.create_task(cache.get("0" * 64)) for _ in range(64)]
    try:
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "answer"), 30) == "answer"
    finally:
        there.set()
        await asyncio.gather(*hanging, return_exceptions=True)


async def test_a_torn_file_is_a_miss(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10 * BLOCK)
    (id,) = await store(cache, b"whole bitstream")
    (tmp_path / id[:2] / id).write_bytes(b"whole")
    assert await cache.get(id) is None
    assert files(tmp_path) == []
    assert await cache.put(id, b"whole bitstream") is False
    assert await cache.get(id) == b"whole bitstream"


async def test_a_torn_file_of_others_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "not yours", str(path))

    cache = FileCache(tmp_path, 10 * BLOCK)
    (id,) = await store(cache, b"whole bitstream")
    (tmp_path / id[:2] / id).write_bytes(b"whole")
    monkeypatch.setattr(Path, "unlink", refuse)
    assert await cache.get(id) is None


async def test_storing_again_is_a_use(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10 * BLOCK)
    (id,) = await store(cache, b"bits")
    os.utime(tmp_path / id[:2] / id, (0, 0))
    await store(cache, b"bits")
    assert (tmp_path / id[:2] / id).stat().st_mtime > 0


@pytest.mark.parametrize("left", [b"whole", b"whole" + bytes(10)])
async def test_a_torn_file_is_written_anew(tmp_path: Path, left: bytes) -> None:
    cache = FileCache(tmp_path, 10 * BLOCK)
    (id,) = await store(cache, b"whole bitstream")
    (tmp_path / id[:2] / id).write_bytes(left)
    assert await cache.put(id, b"whole bitstream") is False
    assert await cache.get(id) == b"whole bitstream"


async def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    old, new = (tmp_path / "ab" / f".part-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache = FileCache(tmp_path, 10 * BLOCK)
    await store(cache, b"bits")
    await swept(cache)
    assert not old.exists()
    assert new.exists()  # another process may be writing it


async def test_what_a_killed_check_leaves_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FileCache(tmp_path, 10 * BLOCK)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # as if it had been killed before
        await cache.check()
    (left,) = files(tmp_path)
    os.utime(left, (0, 0))
    await store(cache, b"bits")
    await swept(cache)
    assert not left.exists()


async def test_one_entry_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 100 * BLOCK)
    id, *_ = await store(cache, b"bits")
    path = tmp_path / id[:2] / id
    path.unlink()
    path.mkdir()
    assert await cache.get(id) is None


async def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for folder in ("photos", "ab"):
        (tmp_path / folder / "more").mkdir(parents=True)
        (tmp_path / folder / "wedding.jpg").write_bytes(bytes(20 * BLOCK))
    cache = FileCache(tmp_path, 10 * BLOCK)
    ids = []
    for i in range(4):
        ids += await store(cache, bytes([i]) * 4 * BLOCK)
        await swept(cache)
    assert {path.name for path in files(tmp_path)} == {"wedding.jpg", *ids[2:]}


async def test_a_kill_while_writing_leaves_whole_files_only(tmp_path: Path) -> None:
    code = f"""
import asyncio, os, sys
from pathlib import Path
from ugicm.server.backends import FileCache
from ugicm.server.cache import bitstream_id
async def main():
    cache = FileCache(Path({str(tmp_path)!r}), 1 << 40)
    while True:
        bitstream = os.urandom(1 << 20)
        await cache.put(bitstream_id(bitstream), bitstream)
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: len(files(tmp_path)) > 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = [path for path in files(tmp_path) if not path.name.startswith(".part-")]
    assert whole
    for path in whole:
        assert bitstream_id(path.read_bytes()) == path.name


async def test_a_folder_that_cannot_be_written_fails_the_check(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        await FileCache(tmp_path / "file", 1000).check()


def test_threads_that_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ugicm.server.backends.HANGING_S", 0.01)
    # Caches of other tests may not be collected yet.
    monkeypatch.setattr(FileCache, "THREAD_NAME", "file-cache-that-no-other-test-has")
    free = threading.Event()
    thread = threading.Thread(target=free.wait, name="ugicm-pool_0", daemon=True)
    thread.start()
    assert threads_hang("ugicm-pool")
    assert not threads_hang()
    free.set()
    thread.join()
    assert not threads_hang("ugicm-pool")


# Redis and S3


async def test_requests_wait_for_a_connection_to_redis(redis_server: RedisServer) -> None:
    cache = open_cache(Settings(cache_url=redis_server.url))
    assert await asyncio.gather(*(cache.get("a" * 64) for _ in range(300))) == [None] * 300
    await cache.close()


async def test_connections_that_redis_closed_are_made_again(redis_server: RedisServer) -> None:
    cache = RedisCache(redis_server.url, ttl_s=100)
    await asyncio.gather(*(cache.get("a" * 64) for _ in range(10)))
    redis_server.stop()
    redis_server.start()
    assert await asyncio.gather(*(cache.get("a" * 64) for _ in range(10))) == [None] * 10
    await cache.close()


async def as_user(redis_server: RedisServer, rights: str) -> RedisCache:
    """The cache of a user who may do less."""
    cache = RedisCache(redis_server.url, ttl_s=60)
    await cache._redis.execute_command("ACL", "SETUSER", "user", "on", ">word", "~*", *rights.split())
    await cache.close()
    return RedisCache(redis_server.url.replace("//", "//user:word@"), ttl_s=60)


async def test_an_entry_that_cannot_be_deleted_is_no_failure_of_redis(redis_server: RedisServer) -> None:
    cache = await as_user(redis_server, "+get +set +client")
    id = bitstream_id(b"bits")
    await cache.put(id, b"other bits")
    assert await cache.get(id) is None
    assert await cache.put(id, b"bits") is False
    assert await cache.get(id) == b"bits"
    await cache.close()


async def test_a_redis_that_takes_nothing_fails_the_check(redis_server: RedisServer) -> None:
    reader = await as_user(redis_server, "+get +ping +client")
    with pytest.raises(NoPermissionError):
        await reader.check()
    await reader.close()
    full = RedisCache(redis_server.url, ttl_s=60)
    await full.check()
    assert 0 < await full._redis.ttl(RedisCache.PREFIX + "check") <= RedisCache.CHECK_S
    await full._redis.config_set("maxmemory", 1)
    with pytest.raises(OutOfMemoryError):
        await full.check()
    await full.close()


async def test_redis_entries_expire(redis_server: RedisServer) -> None:
    cache = RedisCache(redis_server.url, ttl_s=100)
    (id,) = await store(cache, b"bits")
    key = RedisCache.PREFIX + id
    assert 90 < await cache._redis.ttl(key) <= 100
    await cache._redis.expire(key, 10)
    await store(cache, b"bits")  # again
    assert 90 < await cache._redis.ttl(key) <= 100
    await cache.close()


def test_variables_of_s3_that_make_no_sense_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ALLOW_HTTP", "perhaps")
    with pytest.raises(ValueError, match=r'^UGICM_CACHE_URL: .*"perhaps" as boolean$'):
        open_cache(Settings(cache_url="s3://bucket"))


async def test_a_missing_bucket_fails_the_check(s3_url: str) -> None:
    with pytest.raises(Exception, match=r"(?i)bucket|not.?found|404"):
        await S3Cache("s3://other").check()


async def test_the_check_writes_to_the_bucket(s3_url: str) -> None:
    """One that may be listed only keeps nothing."""
    cache = S3Cache(s3_url)
    await cache.check()
    await cache.check()
    found = [entry["path"] async for part in cache._store.list() for entry in part]
    assert found.count("check") == 1  # the server keeps what other tests put there


def test_the_service_outlives_its_redis(make_client: Any, image_file: Any, redis_server: RedisServer) -> None:
    client = make_client(cache_url=redis_server.url)
    id = client.post("/encode", content=image_file()).json()["id"]
    assert client.get(f"/bitstreams/{id}").status_code == 200
    redis_server.stop()
    response = client.post("/encode", content=image_file())
    assert (response.status_code, response.json()["stored"]) == (200, False)
    assert client.get(f"/bitstreams/{id}").json()["code"] == "cache-unavailable"
    assert client.get("/readyz").json() == {"status": "ready", "cache": "down"}
    redis_server.start()
    assert client.get("/readyz").json() == {"status": "ready", "cache": "up"}
    assert client.post("/encode", content=image_file()).json()["stored"] is True


def test_two_services_share_one_redis(make_client: Any, image_file: Any, redis_server: RedisServer) -> None:
    first, second = (make_client(cache_url=redis_server.url) for _ in range(2))
    id = first.post("/encode", content=image_file()).json()["id"]
    assert second.post("/decode", json={"id": id}).status_code == 200


async def test_a_sweep_that_found_no_thread_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FileCache(tmp_path, 10 * FileCache.BLOCK)
    monkeypatch.setattr(cache._sweeper, "submit", no_thread)
    with pytest.raises(RuntimeError, match="new thread"):
        await cache.put(bitstream_id(b"first"), b"first")
    monkeypatch.undo()
    kept = []
    for number in range(60):
        kept.append(await cache.put(bitstream_id(b"%d" % number), b"%d" % number))
        await asyncio.sleep(0.01)
    assert kept.count(False) > 40
    await cache.close()
