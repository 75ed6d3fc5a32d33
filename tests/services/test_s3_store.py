"""Stores in buckets of a real server: the contract, refusals, and failing servers and networks."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sbi_dist.errors import InputError, StageError
from sbi_dist.store import S3Store, open_store, s3, s3_retry


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    """Shorter waits, so that a test notices soon that a server is back."""
    monkeypatch.setattr(s3_retry, "CAP_S", 1.0)


def test_the_contract(store) -> None:
    store.check()
    assert list(store.list()) == [] == store.folders() and not store.exists("a/b")
    with pytest.raises(KeyError):
        store.get("a/b")
    store.put("a/b", b"one")
    assert store.get("a/b") == b"one" and store.exists("a/b") and not store.exists("a")
    assert [store.put_if_absent("a/b", b"two"), store.put_if_absent("c", b"")] == [False, True]
    assert [store.get_tail("a/b", length) for length in (0, 2, 3, 9)] == [
        b"",
        b"ne",
        b"one",
        b"one",
    ]
    assert store.get_tail("c", 5) == b"" == store.get("c")
    for get in (store.get, lambda key: store.get_tail(key, 1)):
        with pytest.raises(KeyError):
            get("none")
    keys = ["a/b", "a-b", "a.b/c", "a0", "c", "d/e/f", "ä b+c%20&=?#é", "😀/~!'()*"]
    for key in keys:
        store.put(key, key.encode())
    assert list(store.list()) == sorted(keys) and list(store.list("a")) == sorted(keys)[:4]
    assert store.folders() == ["a", "a.b", "d", "😀"] and store.folders("d/") == ["e"]
    assert [store.get(key).decode() for key in keys] == keys
    assert list(store.child("d").list()) == ["e/f"]
    for _ in range(2):
        store.delete("c")
    assert not store.exists("c") and "c" not in list(store.list())


def test_large_objects(store, s3_server, monkeypatch) -> None:
    data = os.urandom(1 << 20) * 70
    store.put("big", data)
    assert store.get("big") == data and store.get_tail("big", 1000) == data[-1000:]
    assert not store.put_if_absent("big", data)
    head = s3_server.client().head_object(Bucket=store.bucket, Key=f"{store.prefix}/big")
    assert head["ETag"].endswith('-5"')  # of as many parts
    monkeypatch.setattr(s3, "MULTIPART_BYTES", 6 * 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(S3Store, "exists", lambda *_: False)  # so that all come to the end
    with ThreadPoolExecutor(4) as pool:
        parts = [os.urandom(7 * 2**20) for _ in range(4)]
        wrote = list(pool.map(lambda part: store.put_if_absent("race", part), parts))
    # S3 lets one of them win. This server looks at the condition before it joins the parts, so that
    # now and then two pass it; the object is whole, and that of one who was told to have won.
    won = [part for part, true in zip(parts, wrote, strict=True) if true]
    assert 1 <= len(won) < 4 and store.get("race") in won
    assert not store.put_if_absent("race", parts[0])
    left = s3_server.client().list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    assert not left.get("Uploads")


def test_of_many_writers_one_wins(store) -> None:
    with ThreadPoolExecutor(16) as pool:
        for number in range(4):
            together = threading.Barrier(16)

            def write(writer: int, key: str = f"k{number}", start: threading.Barrier = together):
                start.wait(20)
                return store.put_if_absent(key, bytes([writer]) * 1000)

            wrote = list(pool.map(write, range(16)))
            assert wrote.count(True) == 1
            assert store.get(f"k{number}") == bytes([wrote.index(True)]) * 1000


def test_many_keys(store) -> None:
    keys = [f"{number % 7}/shard-{number:06d}" for number in range(5_100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert list(store.list()) == sorted(keys)
    assert list(store.list("3/")) == sorted(key for key in keys if key.startswith("3/"))
    assert store.folders() == [str(number) for number in range(7)]
    started = time.monotonic()
    assert next(store.list("0/")) == "0/shard-000000" and store.folders("0/") == []
    assert time.monotonic() - started < 2


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", ["wrong secret", "unknown"])
def test_wrong_keys(store, become, identity, s3_server) -> None:
    become(identity)
    words = {
        "wrong secret": "the secret key does not belong to the access key",
        "unknown": "the server does not know the access key",
    }[identity]
    for call in (
        store.check,
        lambda: store.get("k"),
        lambda: store.exists("k"),
        lambda: store.put("k", b""),
        lambda: store.put_if_absent("k", b""),
        lambda: list(store.list()),
        lambda: store.delete("k"),
    ):
        started = time.monotonic()
        with pytest.raises(InputError, match=f"{words}.*check AWS_ACCESS_KEY_ID") as caught:
            call()
        assert time.monotonic() - started < 5
        environment = s3_server.environment_of(identity)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert environment[name] not in str(caught.value)


def test_a_missing_bucket(become) -> None:
    store = open_store("s3://no-such-bucket/runs")
    for call in (
        store.check,
        lambda: store.get("k"),
        lambda: store.exists("k"),
        lambda: store.put("k", b""),
        lambda: list(store.list()),
    ):
        with pytest.raises(InputError, match=r"no bucket 'no-such-bucket' at http://127.0.0.1"):
            call()


def test_a_key_that_may_only_read(store, become) -> None:
    store.put("k", b"1")
    become("reader")
    store.check()
    assert store.get("k") == b"1" and list(store.list()) == ["k"] and store.exists("k")
    for call in (lambda: store.put("k", b"2"), lambda: store.put_if_absent("new", b"2")):
        with pytest.raises(InputError, match=r"may read but not write .*needs s3:PutObject on b"):
            call()
    with pytest.raises(InputError, match=r"may read but not delete .*needs s3:DeleteObject"):
        store.delete("k")
    become("admin")
    assert store.get("k") == b"1"


# ---- other processes ----------------------------------------------------------------------------


def test_a_store_in_another_process(store, s3_server) -> None:
    """It brings the endpoint, but no credentials."""
    store.put("k", b"1")
    code = (
        "import pickle, sys; store = pickle.loads(sys.stdin.buffer.read());"
        "store.put('from', store.get('k'))"
    )
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    keys = {name: s3_server.environment[name] for name in names}
    others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    others["AWS_EC2_METADATA_DISABLED"] = "true"
    for given, good in ((keys, True), ({}, False)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps(store),
            env={**others, **given},
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode == 0) == good, done.stderr
    assert store.get("from") == b"1" and b"no S3 credentials are set" in done.stderr


# ---- servers and networks that fail -------------------------------------------------------------


def write_many(
    store: S3Store, count: int, progress: list[int], failed: list[BaseException]
) -> None:
    try:
        for number in range(count):
            data = f"{number} ".encode() * (40_000 if number % 20 == 0 else 50)
            if number % 2:
                store.put(f"o/{number:04d}", data)
            else:
                assert store.put_if_absent(f"o/{number:04d}", data)
            progress.append(number)
    except BaseException as error:
        failed.append(error)


def is_whole(store: S3Store, count: int) -> bool:
    keys = [f"o/{number:04d}" for number in range(count)]
    return list(store.list()) == keys and all(
        store.get(key) == f"{number} ".encode() * (40_000 if number % 20 == 0 else 50)
        for number, key in enumerate(keys)
    )


def test_a_server_that_is_killed(store, s3_server, capfd) -> None:
    progress: list[int] = []
    failed: list[BaseException] = []
    writer = threading.Thread(target=write_many, args=(store, 200, progress, failed))
    writer.start()
    until = time.monotonic() + 30
    while len(progress) < 60 and time.monotonic() < until:
        time.sleep(0.005)
    s3_server.kill()
    reached = len(progress)
    time.sleep(3)
    assert 60 <= reached < 200 and len(progress) <= reached + 1
    s3_server.restart()
    writer.join(60)
    assert not failed and len(progress) == 200 and is_whole(store, 200)
    said = capfd.readouterr().err
    assert said.count("does not answer (Connection refused); waiting up to 60 s for it") == 1
    assert said.count("answers again after") == 1


def test_a_network_that_fails(store, proxy, become) -> None:
    become("admin", proxy.endpoint)
    proxy.latency_s, proxy.reset_probability = 0.002, 0.05
    proxy.cut_probability, proxy.cut_after = 0.2, 200
    progress: list[int] = []
    failed: list[BaseException] = []
    write_many(store, 120, progress, failed)
    assert not failed and is_whole(store, 120)
    with ThreadPoolExecutor(8) as pool:  # also who wins is told right where answers are lost
        for number in range(5):
            wrote = list(
                pool.map(
                    lambda writer, key=f"race/{number}": store.put_if_absent(key, bytes([writer])),
                    range(8),
                )
            )
            assert wrote.count(True) == 1
            assert store.get(f"race/{number}") == bytes([wrote.index(True)])
    assert proxy.faults > 30


def test_parts_through_a_network_that_fails(store, proxy, become, monkeypatch) -> None:
    monkeypatch.setattr(s3, "MULTIPART_BYTES", 6 * 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    become("admin", proxy.endpoint)
    proxy.reset_probability = 0.002  # of each 64 KiB
    data = os.urandom(12 * 2**20)
    for number in range(3):
        assert store.put_if_absent(f"big-{number}", data)
    proxy.reset_probability = 0.0
    assert all(store.get(f"big-{number}") == data for number in range(3))
    assert proxy.faults


def test_a_network_that_is_away(store, proxy, become) -> None:
    become("admin", proxy.endpoint)
    store.put("k", b"1")
    proxy.down()
    back = threading.Timer(1.0, proxy.up)
    back.start()
    assert store.get("k") == b"1"  # waits until it is there again
    back.join()
    proxy.down()
    store.patience_s = 1.5
    started = time.monotonic()
    with pytest.raises(StageError, match=r"does not answer for 1.5 s \(.*what was stored before"):
        store.put("k", b"2")
    assert 1 < time.monotonic() - started < 10
    started = time.monotonic()
    with pytest.raises(InputError, match=f"{proxy.endpoint} does not answer .*AWS_ENDPOINT_URL_S3"):
        store.check()
    assert time.monotonic() - started < 15
    proxy.up()
    store.check()
    assert store.get("k") == b"1"
