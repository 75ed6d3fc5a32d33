"""The store: whole objects or none, whatever fails while they are written."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.errors import InputError, StageError
from sbi_dist.store import LocalStore, open_store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def files(store: LocalStore) -> list[str]:
    return sorted(
        p.relative_to(store.root).as_posix() for p in store.root.rglob("*") if p.is_file()
    )


# ---- objects ------------------------------------------------------------------------------------


def test_put_get_delete(store) -> None:
    assert list(store.list()) == [] and not store.exists("a/b")
    with pytest.raises(KeyError, match="a/b"):
        store.get("a/b")
    store.put("a/b", b"one")
    assert store.exists("a/b") and store.get("a/b") == b"one"
    store.put("a/b", b"")
    assert store.get("a/b") == b""
    assert not store.exists("a")  # a folder is no object
    with pytest.raises(KeyError):
        store.get("a")
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b") and files(store) == []


def test_put_if_absent(store) -> None:
    assert store.put_if_absent("k", b"one")
    assert not store.put_if_absent("k", b"two")
    assert store.get("k") == b"one"
    store.delete("k")
    assert store.put_if_absent("k", b"two") and store.get("k") == b"two"
    assert files(store) == ["k"]


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


@pytest.mark.parametrize("key", ["", "..", "../k", "a/../../k", "a/..", "/k", "a//b", "./k", "a/"])
def test_keys_stay_below_the_root(store, key) -> None:
    for use in (store.get, store.exists, store.delete, store.child):
        with pytest.raises(ValueError, match="is not a plain relative path"):
            use(key)
    for use in (store.put, store.put_if_absent):
        with pytest.raises(ValueError, match="is not a plain relative path"):
            use(key, b"")
    assert not store.root.exists()


# ---- listing ------------------------------------------------------------------------------------


@given(
    st.sets(
        st.lists(st.sampled_from(["a", "b", "ab", "a-1", "z.json"]), min_size=1, max_size=3).map(
            "/".join
        ),
        max_size=6,
    ),
    st.sampled_from(["", "a", "ab", "a/", "a/b", "b/a-", "nothing/", "a/b/z.json"]),
)
@settings(deadline=None, max_examples=30)
def test_list(tmp_path_factory, keys, prefix) -> None:
    store = LocalStore(tmp_path_factory.mktemp("store"))
    # A key can't also be the folder of another one.
    keys = {key for key in keys if not any(other.startswith(key + "/") for other in keys)}
    for key in sorted(keys, reverse=True):
        store.put(key, key.encode())
    found = list(store.list(prefix))
    assert found == sorted(key for key in keys if key.startswith(prefix))
    assert all(store.get(key) == key.encode() for key in found)


def test_child_is_the_keys_below(store) -> None:
    store.put("a/b/c", b"1")
    store.put("a-b", b"2")
    child = store.child("a").child("b")
    assert list(child.list()) == ["c"] and child.get("c") == b"1"
    assert child.uri == f"{store.uri}/a/b"
    child.put("d", b"3")
    assert list(store.list("a/")) == ["a/b/c", "a/b/d"]


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
            patched.setattr("sbi_dist.store.open", open_half, raising=False)
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


@pytest.mark.parametrize("method", ["put", "put_if_absent"])
def test_a_read_only_directory(store, monkeypatch, method) -> None:
    store.put("k", b"old")
    store.root.chmod(0o500)
    if os.access(store.root, os.W_OK):  # permissions do not bind root

        def denied(*_: Any, **__: Any) -> Any:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("sbi_dist.store.open", denied, raising=False)
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


@pytest.mark.parametrize("uri", ["s3://bucket/runs", "gs://bucket", "https://host/runs", "hdfs:x"])
def test_other_stores(uri) -> None:
    with pytest.raises(InputError, match="allowed is a directory"):
        open_store(uri)


def test_a_file_is_no_store(tmp_path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="is a file; it must be a directory"):
        open_store(str(tmp_path / "f"))
