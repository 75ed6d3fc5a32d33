"""The store: one contract in a directory and in a bucket, and what is special to a directory.

Of a directory: whole objects or none, whatever fails while they are written. What is special to a
bucket is in test_s3.py.
"""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moto import mock_aws

from sbi_dist.errors import InputError, StageError
from sbi_dist.store import LocalStore, ObjectStore, S3Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of moto's, which answers boto3 inside this process."""
    import boto3

    with pytest.MonkeyPatch.context() as patched, mock_aws():
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION"):
            patched.delenv(name, raising=False)
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="contract")
        yield "contract"


_numbers = itertools.count()


@pytest.fixture(scope="module", params=["local", "s3"])
def new(request, tmp_path_factory) -> Any:
    """Make empty stores of each kind."""
    if request.param == "local":
        return lambda: LocalStore(tmp_path_factory.mktemp("store") / "root")
    name = request.getfixturevalue("bucket")
    return lambda: S3Store(name, f"run-{next(_numbers)}", patience_s=5.0)


@pytest.fixture
def any_store(new) -> ObjectStore:
    return new()


def files(store: LocalStore) -> list[str]:
    return sorted(
        p.relative_to(store.root).as_posix() for p in store.root.rglob("*") if p.is_file()
    )


# ---- the contract -------------------------------------------------------------------------------


def test_put_get_delete(any_store) -> None:
    store = any_store
    store.check()
    assert list(store.list()) == [] and not store.exists("a/b") and store.folders() == []
    with pytest.raises(KeyError, match="a/b"):
        store.get("a/b")
    store.put("a/b", b"one")
    assert store.exists("a/b") and store.get("a/b") == b"one"
    store.put("a/b", b"")
    assert store.get("a/b") == b""
    assert not store.exists("a")  # a folder is no object
    for get in (
        store.get,
        lambda key: store.get_tail(key, 1),
        lambda key: store.get_range(key, 0, 1),
    ):
        with pytest.raises(KeyError):
            get("a")
    store.delete("a")
    assert store.exists("a/b")
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b") and list(store.list()) == []


def test_get_tail(any_store) -> None:
    any_store.put("k", b"0123456789")
    any_store.put("empty", b"")
    for length in (0, 1, 4, 10, 11, 10_000):
        assert any_store.get_tail("k", length) == b"0123456789"[10 - min(length, 10) :]
        assert any_store.get_tail("empty", length) == b""
        with pytest.raises(KeyError, match="none"):
            any_store.get_tail("none", length)


def test_get_range(any_store) -> None:
    any_store.put("k", b"0123456789")
    any_store.put("empty", b"")
    for start, length in itertools.product((0, 1, 9, 10, 11, 10_000), (0, 1, 4, 10, 10**12)):
        assert any_store.get_range("k", start, length) == b"0123456789"[start : start + length]
        assert any_store.get_range("empty", start, length) == b""
        with pytest.raises(KeyError, match="none"):
            any_store.get_range("none", start, length)


def test_identity(any_store) -> None:
    store = any_store
    with pytest.raises(KeyError):
        store.identity("of/k")
    store.put("of/k", b"abc")
    with pytest.raises(KeyError):
        store.identity("of")
    first = store.identity("of/k")
    assert first == store.identity("of/k") and first[0] == 3
    time.sleep(0.02)  # longer than between two ticks of a file system's clock
    store.put("of/k", b"abd")
    assert store.identity("of/k") != first and store.identity("of/k")[0] == 3
    store.put("of/k", b"")
    assert store.identity("of/k")[0] == 0


def test_put_if_absent(any_store) -> None:
    assert any_store.put_if_absent("k", b"one")
    assert not any_store.put_if_absent("k", b"two")
    assert any_store.get("k") == b"one"
    any_store.delete("k")
    assert any_store.put_if_absent("k", b"two") and any_store.get("k") == b"two"
    assert list(any_store.list()) == ["k"]


@pytest.mark.parametrize(
    "key", ["", "..", "../k", "a/../../k", "a/..", "/k", "a//b", "./k", "a/", "a\0b"]
)
def test_keys_stay_below_the_root(any_store, key) -> None:
    for use in (any_store.get, any_store.exists, any_store.delete, any_store.child):
        with pytest.raises(ValueError, match="is not a plain relative path"):
            use(key)
    for write in (any_store.put, any_store.put_if_absent):
        with pytest.raises(ValueError, match="is not a plain relative path"):
            write(key, b"")
    with pytest.raises(ValueError, match="is not a plain relative path"):
        any_store.get_tail(key, 1)
    with pytest.raises(ValueError, match="is not a plain relative path"):
        any_store.get_range(key, 0, 1)
    assert list(any_store.list()) == []


_PARTS = st.one_of(
    st.sampled_from(["a", "b", "ab", "a-1", "a.b", "a0", "z.json"]),
    st.text(st.sampled_from("aZ0 -_.+%&=?#~,:;@$!'()*é中😀"), min_size=1, max_size=4),
).filter(lambda part: part not in (".", ".."))


@given(
    st.sets(st.lists(_PARTS, min_size=1, max_size=3).map("/".join), max_size=8),
    st.one_of(
        st.sampled_from(["", "a", "ab", "a/", "a/b", "b/a-", "nothing/", "a/b/z.json"]), _PARTS
    ),
)
@settings(deadline=None, max_examples=25)
def test_list(new, keys, prefix) -> None:
    store = new()
    # A key can't also be the folder of another one.
    keys = {key for key in keys if not any(other.startswith(key + "/") for other in keys)}
    for key in sorted(keys, reverse=True):
        store.put(key, key.encode())
    found = list(store.list(prefix))
    assert found == sorted(key for key in keys if key.startswith(prefix))
    assert all(store.get(key) == key.encode() for key in found)
    for folder in {"", *(key.partition("/")[0] + "/" for key in keys if "/" in key)}:
        below = [key[len(folder) :] for key in keys if key.startswith(folder)]
        assert store.folders(folder) == sorted({key.split("/")[0] for key in below if "/" in key})


def test_folders(any_store) -> None:
    for key in ("a/k", "b/c/d/k", "b/e/k", "b/f", "g"):
        any_store.put(key, b"")
    assert any_store.folders() == ["a", "b"] and any_store.folders("b/") == ["c", "e"]
    assert any_store.folders("a/") == any_store.folders("none/") == []
    assert any_store.child("b").folders() == ["c", "e"]
    with pytest.raises(ValueError, match="does not end with a slash"):
        any_store.folders("b")


def test_child_is_the_keys_below(any_store) -> None:
    any_store.put("a/b/c", b"1")
    any_store.put("a-b", b"2")
    any_store.put("a/b2", b"3")
    child = any_store.child("a").child("b")
    assert list(child.list()) == ["c"] and child.get("c") == b"1"
    assert child.uri == f"{any_store.uri}/a/b"
    child.put("d", b"3")
    assert list(any_store.list("a/")) == ["a/b/c", "a/b/d", "a/b2"]


def test_stores_travel(any_store) -> None:
    any_store.put("a/k", b"1")
    other = pickle.loads(pickle.dumps(any_store.child("a")))
    assert other.uri == f"{any_store.uri}/a" and other.get("k") == b"1"
    assert repr(other) == repr(any_store.child("a")) and other.uri in repr(other)
    assert list(open_store(other.uri).list()) == ["k"]


# ---- objects in a directory ---------------------------------------------------------------------


def test_of_many_writers_one_wins(store) -> None:
    """Also when all have found the key free before the first one writes."""
    count = 8
    ready, results = threading.Barrier(count), [False] * count
    free = store.exists("x/k")

    class Late(LocalStore):
        def exists(self, key: str) -> bool:
            ready.wait(10)
            return free

    def write(number: int) -> None:
        results[number] = Late(store.root).put_if_absent("x/k", bytes([number]) * 10_000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(True) == 1
    assert store.get("x/k") == bytes([results.index(True)]) * 10_000
    assert files(store) == ["x/k"]


def test_a_reader_sees_the_old_object_or_the_new_one(store) -> None:
    sizes = [10, 200_000]
    store.put("k", b"0" * sizes[0])
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            data = store.get("k")
            seen.add((data[:1], len(data), len(set(data))))

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(30):
        store.put("k", str(number % 2).encode() * sizes[number % 2])
    stop.set()
    thread.join()
    assert seen <= {(b"0", sizes[0], 1), (b"1", sizes[1], 1)}


def test_nothing_is_made_before_something_is_written(store) -> None:
    store.check()
    assert not list(store.list()) and not store.folders() and not store.child("a").folders()
    assert not store.root.exists()


def test_temporary_files_are_no_objects(store) -> None:
    store.put("a/k", b"1")
    (store.root / "a" / ".tmp-k-0123").write_bytes(b"half of someth")
    (store.root / ".tmp-x").write_bytes(b"")
    assert list(store.list()) == ["a/k"] and list(store.list("a/")) == ["a/k"]


# ---- failures -----------------------------------------------------------------------------------


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class HalfWritten:
    """A file whose disk is full after a few bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[:3])
        full_disk()


def open_half(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
    file = open(path, mode, *rest, **more)  # noqa: SIM115
    return HalfWritten(file) if "w" in mode else file


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("put", "write"),
        ("put", "fsync"),
        ("put", "replace"),
        ("put_if_absent", "write"),
        ("put_if_absent", "fsync"),
        ("put_if_absent", "link"),
    ],
)
def test_a_failed_write_leaves_nothing_behind(store, monkeypatch, method, step) -> None:
    store.put("a/old", b"old")
    with monkeypatch.context() as patched:
        if step == "write":
            patched.setattr("sbi_dist.store.local.open", open_half, raising=False)
        else:
            patched.setattr(os, step, full_disk)
        with pytest.raises(StageError, match=r"a/new can't be written \(No space left"):
            getattr(store, method)("a/new", b"new")
        if method == "put":
            with pytest.raises(StageError, match="what was stored before is kept"):
                store.put("a/old", b"new")
    assert files(store) == ["a/old"] and store.get("a/old") == b"old"
    assert getattr(store, method)("a/new", b"new") in (None, True)  # once there is room
    assert store.get("a/new") == b"new" and files(store) == ["a/new", "a/old"]


def test_a_path_through_a_file(store) -> None:
    store.put("a", b"")
    with pytest.raises(StageError, match="a/b can't be written"):
        store.put("a/b", b"")
    assert store.get("a") == b"" and files(store) == ["a"]


def test_read_errors_are_told_apart_from_absence(store, monkeypatch) -> None:
    store.put("k", b"")

    def broken(*_: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(StageError, match="k can't be read"):
        store.get("k")


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.EIO, StageError, "repair the disk and run"),
        (errno.EDQUOT, StageError, "free space or repair the disk"),
        (errno.EROFS, InputError, "give a directory that you may write"),
        (errno.EACCES, InputError, "give a directory that you may write"),
    ],
)
def test_what_a_failed_write_asks_for(store, monkeypatch, code, kind, words) -> None:
    store.put("k", b"old")

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "unlink", broken)
    with pytest.raises(kind, match=words) as deleted:
        store.delete("k")
    monkeypatch.setattr("sbi_dist.store.local.open", broken, raising=False)
    with pytest.raises(kind, match=words) as written:
        store.put("k", b"new")
    assert ("free space" in str(written.value)) == (code == errno.EDQUOT)
    assert os.strerror(code) in str(deleted.value) and store.get("k") == b"old"


def test_a_folder_that_cannot_be_read_is_not_empty(store, monkeypatch) -> None:
    store.put("a/k", b"")

    def denied(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "scandir", denied)
    for look in (store.list, store.folders):
        with pytest.raises(StageError, match="can't be listed"):
            list(look())


@pytest.mark.parametrize("method", ["put", "put_if_absent"])
def test_a_read_only_directory(store, monkeypatch, method) -> None:
    store.put("k", b"old")
    store.root.chmod(0o500)
    if os.access(store.root, os.W_OK):  # permissions do not bind root

        def denied(*_: Any, **__: Any) -> Any:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("sbi_dist.store.local.open", denied, raising=False)
    try:
        with pytest.raises(InputError, match=r"can't be written .*give a directory that you may"):
            getattr(store, method)("new", b"new")
    finally:
        store.root.chmod(0o700)
    assert files(store) == ["k"]


# ---- open_store ---------------------------------------------------------------------------------


def test_open_store(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "a b"
    assert open_store("runs").uri == str(tmp_path / "runs")
    assert open_store(str(folder)).uri == str(folder)
    assert open_store(f"file://{tmp_path}/a%20b").uri == str(folder)
    assert open_store("~/runs").uri == str(tmp_path / "home" / "runs")
    # A worker in another directory must find the same place.
    assert Path(open_store("runs").uri).is_absolute()
    assert list(tmp_path.iterdir()) == []  # nothing is made before something is written


@pytest.mark.parametrize("uri", ["gs://bucket", "https://host/runs", "hdfs:x"])
def test_other_stores(uri) -> None:
    with pytest.raises(InputError, match=r"allowed is a directory .* or s3://bucket/prefix"):
        open_store(uri)


def test_a_file_is_no_store(tmp_path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="is a file; it must be a directory"):
        open_store(str(tmp_path / "f"))
