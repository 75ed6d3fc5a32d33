"""The data of a training: the same batches from memory, from the store and for any number of ranks.

And what is refused, what ends, and how memory is counted.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.errors import InputError
from sbi_dist.estimation.data import ArraySource, ShardSource, Source, TrainingData, load_data
from sbi_dist.estimation.data.memory import available_bytes
from sbi_dist.estimation.data.prefetch import Prefetch
from sbi_dist.estimation.data.rows import Reader
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.plan import Shard
from sbi_dist.simulation.shard import Simulations, encode_shard
from sbi_dist.store import LocalStore
from tests.unit.samples import about

BOUNDS = np.array([-4.0, 0.0, -math.inf]), np.array([4.0, math.inf, math.inf])
THREADS = ("sbi-dist-prefetch", "sbi-dist-read")


# ---- datasets and ranks -------------------------------------------------------------------------


def simulations(rows: int, x_shape: tuple[int, ...], start: int, fails: float) -> Simulations:
    rng = np.random.default_rng(start)
    theta = rng.uniform(-4, 4, (rows, 3)).astype(np.float32)
    theta[:, 1] = np.abs(theta[:, 1])
    x = np.exp(2 * rng.standard_normal((rows, *x_shape))).astype(np.float32)
    failed = {int(row): ("error", "E") for row in np.flatnonzero(rng.random(rows) < fails)}
    x[list(failed)] = np.nan
    ids = np.arange(start, start + rows)
    return Simulations(ids, theta, x, failed, np.zeros(rows, dtype=np.float32))


def stored(
    folder: Path, sizes: list[int], x_shape: tuple[int, ...] = (5,), fails: float = 0.1
) -> ShardSource:
    dataset = Dataset(LocalStore(folder))
    records = []
    for index, size in enumerate(sizes):
        rows = simulations(size, x_shape, sum(sizes[:index]), fails)
        data, record = encode_shard(rows, about(index, x_shape))
        dataset.store.put(Shard(index, 0, 0).key, data)
        records.append(record)
    return ShardSource(dataset, records)


def in_memory(source: ShardSource) -> ArraySource:
    parts = [source.read(k) for k in range(len(source.counts))]
    return ArraySource(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@dataclasses.dataclass(frozen=True)
class Alone:
    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Rank(Alone):
    """One of several that are threads of this process."""

    def __init__(self, rank: int, count: int, barrier: threading.Barrier, told: list[Any]) -> None:
        super().__init__(rank, count)
        object.__setattr__(self, "_shared", (barrier, told))

    def gather(self, value: Any) -> list[Any]:
        barrier, told = self._shared  # type: ignore[attr-defined]
        told[self.rank] = value
        barrier.wait(30)
        found = list(told)
        barrier.wait(30)
        return found


def together(count: int, work: Callable[[Alone], Any]) -> list[Any]:
    """What ``work`` gives or raises on each of so many ranks."""
    if count == 1:
        return [work(Alone())]
    barrier, told, results = threading.Barrier(count), [None] * count, [None] * count

    def run(rank: int) -> None:
        try:
            results[rank] = work(Rank(rank, count, barrier, told))
        except Exception as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def loaded(
    source: Source, workers: Any, batch_size: int = 48, start: Any = None, **options: Any
) -> TrainingData:
    chosen = TrainOptions(**{"x_scale": "log", **options})
    return load_data(source, BOUNDS, chosen, lambda rows: batch_size, workers, start)


def content(data: TrainingData, epoch: int = 3, first: int = 0) -> dict[str, Any]:
    """All that a rank's loop is given, and what it was made by."""
    batches = [(u.clone(), x.clone()) for u, x in data.batches(epoch, first)]
    held_out = [(u.clone(), x.clone()) for u, x in data.validation_batches()]
    return {
        "mode": data.mode,
        "u": torch.stack([u for u, _ in batches]),
        "x": torch.stack([x for _, x in batches]),
        "held_u": torch.cat([u for u, _ in held_out] or [torch.empty(0, 3)]),
        "held_x": torch.cat([x for _, x in held_out] or [torch.empty(0, *batches[0][1].shape[1:])]),
        "sample": data.sample(),
        "standardization": data.standardization.to_data(),
        "log_dets": (data.log_det, data.validation_log_det),
        "sizes": (data.training, data.validation, data.batch_size, data.steps),
    }


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks are given together; what must be the same on each is checked."""
    whole = dict(parts[0])
    for name in ("standardization", "log_dets", "sizes"):
        assert all(part[name] == whole[name] for part in parts)
    for part in parts:
        assert all(map(torch.equal, part["sample"], whole["sample"]))
    whole["u"], whole["x"] = (torch.cat([part[name] for part in parts], dim=1) for name in "ux")
    for name in ("held_u", "held_x"):
        whole[name] = torch.cat([part[name] for part in parts])
    return whole


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name in ("u", "x", "held_u", "held_x"):
        assert torch.equal(first[name], second[name]), name
    assert all(map(torch.equal, first["sample"], second["sample"]))
    for name in ("standardization", "log_dets", "sizes"):
        assert first[name] == second[name], name


# ---- the same batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["linear", "log", "asinh"])
def test_batches_do_not_depend_on_where_rows_are(tmp_path, scale) -> None:
    source = stored(tmp_path, [301, 1, 97, 500, 203, 64])
    settings = {"shuffle_mb": 0.008, "x_scale": scale}  # groups of 5 of 19 batches
    reference = content(loaded(in_memory(source), Alone(), **settings))
    assert reference["mode"] == "memory" and reference["sizes"][2:] == (48, 19)
    for count, memory_gb in ((1, None), (1, 25e-6), (3, 12e-6), (4, 8e-6), (3, None)):
        parts = together(
            count, lambda w, gb=memory_gb: content(loaded(source, w, memory_gb=gb, **settings))
        )
        modes = [part["mode"] for part in parts]
        # Of three ranks the last one has two of the four lanes, and they do not fit its memory.
        assert modes[-1] == ("streamed" if memory_gb else "memory")
        assert (len(set(modes)) > 1) == (memory_gb == 12e-6)
        assert_same(joined(parts), reference)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 60),
    st.integers(1, 24),
    st.integers(1, 4),
    st.sampled_from([(), (1,), (2, 3)]),
    st.data(),
)
def test_batches_of_odd_sizes(tmp_path_factory, sizes, batch_size, groups, x_shape, data) -> None:
    source = stored(tmp_path_factory.mktemp("odd"), sizes, x_shape)
    row_bytes = 4 * (3 + math.prod(x_shape))
    total = row_bytes * int(source.counts.sum())
    settings = {"batch_size": batch_size, "shuffle_mb": total / groups / 1e6}
    reference = content(loaded(in_memory(source), Alone(), **settings))
    lanes = 1 << (max(1, batch_size // 8).bit_length() - 1)
    count = data.draw(st.integers(1, lanes))
    first = data.draw(st.integers(0, reference["sizes"][3] - 1))
    # Just too little for a rank's rows: a third of it holds a group where there are some groups.
    memory_gb = data.draw(st.sampled_from([None, 0.99 * total / 1e9 / count]))
    if groups < 4:
        memory_gb = None
    parts = together(
        count,
        lambda w: content(loaded(source, w, memory_gb=memory_gb, **settings), first=first),
    )
    if any(isinstance(part, Exception) for part in parts):
        assert memory_gb is not None and "a third of which" in str(parts[0])
        return
    reference["u"], reference["x"] = reference["u"][first:], reference["x"][first:]
    assert_same(joined(parts), reference)


def test_an_epoch_is_found_from_any_step(tmp_path) -> None:
    source = stored(tmp_path, [400, 300, 500])
    for memory_gb in (None, 0.00002):
        data = loaded(source, Alone(), memory_gb=memory_gb, shuffle_mb=0.006)
        whole = content(data, epoch=7)
        for first in (1, 4, 11, data.steps - 1):
            part = content(data, epoch=7, first=first)
            assert torch.equal(part["u"], whole["u"][first:])
            assert torch.equal(part["x"], whole["x"][first:])
        assert list(data.batches(7, data.steps)) == []
        assert not torch.equal(content(data, epoch=8)["u"], whole["u"])


def test_rows_are_those_of_the_dataset(tmp_path) -> None:
    source = stored(tmp_path, [301, 1, 97])
    theta, x = in_memory(source).read(0)
    data = loaded(source, Alone(), batch_size=10, memory_gb=0.000009, shuffle_mb=0.001)
    given = content(data)
    u, log_det = data.standardization.u(torch.from_numpy(theta))
    x = data.standardization.x(torch.from_numpy(x))
    rows = torch.cat([u, x], dim=1)
    number = {row.numpy().tobytes(): k for k, row in enumerate(rows)}
    assert len(number) == len(rows)

    def numbers(u: torch.Tensor, x: torch.Tensor) -> list[int]:
        here = torch.cat([u.reshape(-1, 3), x.reshape(-1, 5)], dim=1)
        return [number[row.numpy().tobytes()] for row in here]

    trained, held_out = numbers(given["u"], given["x"]), numbers(given["held_u"], given["held_x"])
    assert held_out == sorted(held_out) and not set(trained) & set(held_out)
    assert len(set(trained)) == len(trained) > data.training - 10
    assert len(held_out) == data.validation == len(rows) - data.training
    others = np.setdiff1d(np.arange(len(rows)), held_out)
    assert data.log_det == pytest.approx(float(log_det[others].mean()), rel=1e-12)
    assert data.validation_log_det == pytest.approx(float(log_det[held_out].mean()), rel=1e-12)
    # The sample of so few rows is all of them.
    assert sorted(numbers(*given["sample"])) == others.tolist() == numbers(*data.sample())
    fitted = Standardization.fit(
        theta[others], in_memory(source).read(0)[1][others], *BOUNDS, "log"
    )
    # Added up in another order.
    for name in ("x_mean", "x_sd", "theta_mean", "theta_sd"):
        ours, theirs = getattr(data.standardization, name), getattr(fitted, name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert data.standardization.bijection.to_data() == fitted.bijection.to_data()


def test_a_given_standardization(tmp_path) -> None:
    source = stored(tmp_path, [400, 300])
    start = loaded(source, Alone(), validation_fraction=0.3).standardization
    parts = [
        content(loaded(source, Alone(), start=start, memory_gb=gb, shuffle_mb=0.004))
        for gb in (None, 0.000015)
    ]
    assert parts[0]["standardization"] == start.to_data()
    assert [part["mode"] for part in parts] == ["memory", "streamed"]
    assert_same(*parts)


def test_streaming_the_held_out_rows(tmp_path) -> None:
    source = stored(tmp_path, [400, 300, 500])
    settings = {"validation_fraction": 0.6, "shuffle_mb": 0.001, "batch_size": 20}
    reference = content(loaded(source, Alone(), **settings))
    streamed = content(loaded(source, Alone(), memory_gb=0.000025, **settings))
    assert streamed["mode"] == "streamed"
    assert_same(streamed, reference)


# ---- sources ------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_shape", [(), (1,), (2, 3)], ids=str)
def test_rows_of_shards(tmp_path, x_shape) -> None:
    sizes = [50, 1, 33]
    source = stored(tmp_path / "a", sizes, x_shape, fails=0.3)
    assert source.theta_size == 3 and source.x_shape == x_shape and source.at_once == 1
    foreign = stored(tmp_path / "b", sizes, x_shape, fails=0.3)
    for path in sorted((tmp_path / "b").glob("shard-*")):
        # Written anew by another tool: no note of the layout to go by.
        sink = io.BytesIO()
        pq.write_table(pq.read_table(path), sink, compression="zstd")
        path.write_bytes(sink.getvalue())
    for k, size in enumerate(sizes):
        rows = simulations(size, x_shape, sum(sizes[:k]), 0.3)
        theta, x = rows.theta[rows.ok], rows.x[rows.ok]
        assert source.counts[k] == len(theta)
        for each in (source, ShardSource(source._dataset, source._records), foreign):
            for start, stop in ((0, len(theta)), (3, 4), (len(theta) // 2, len(theta)), (2, 2)):
                start = min(start, stop := min(stop, len(theta)))
                found = each.read_rows(k, start, stop)
                np.testing.assert_array_equal(found[0], theta[start:stop])
                np.testing.assert_array_equal(found[1], x[start:stop])
            np.testing.assert_array_equal(each.read(k)[1], x)


def test_few_bytes_are_read_for_few_rows(tmp_path, monkeypatch) -> None:
    source = stored(tmp_path, [20_000], fails=0.0)
    read: list[int] = []
    whole = LocalStore.get

    def get_range(store: LocalStore, key: str, start: int, length: int) -> bytes:
        read.append(length)
        return whole(store, key)[start : start + length]

    monkeypatch.setattr(LocalStore, "get_range", get_range)
    source.read_rows(0, 11_000, 11_100)
    assert read == [100 * 3 * 4, 100 * 5 * 4]


def test_several_reads_at_a_time(tmp_path) -> None:
    source = stored(tmp_path, [400, 300, 500])
    settings = {"memory_gb": 0.00002, "shuffle_mb": 0.006}
    reference = content(loaded(source, Alone(), **settings))
    source.at_once = 5
    data = loaded(source, Alone(), **settings)
    assert_same(content(data), reference)
    data.close()
    assert_no_threads()


def test_a_reader_keeps_the_order_and_passes_errors_on() -> None:
    def slow(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        if item == 40:
            raise InputError("forty")
        return item

    reader = Reader(4)
    assert list(reader.read(slow, range(30))) == list(range(30))
    with pytest.raises(InputError, match="forty"):
        list(reader.read(slow, range(30, 60)))
    reader.close()


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("memory_gb", [None, 0.00001])
def test_a_damaged_shard_is_told_on_all_ranks(tmp_path, memory_gb) -> None:
    source = stored(tmp_path, [400, 300, 500])
    path = tmp_path / "shard-000002.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    errors = together(
        4, lambda w: loaded(source, w, memory_gb=memory_gb, shuffle_mb=0.004, batch_size=48)
    )
    assert all(isinstance(error, InputError) for error in errors)
    assert all("shard-000002.parquet is damaged" in str(error) for error in errors)
    path.unlink()
    for error in together(4, lambda w: loaded(source, w, memory_gb=memory_gb, shuffle_mb=0.004)):
        assert isinstance(error, InputError) and "shard-000002.parquet is missing" in str(error)


def test_another_shard_than_the_listed_one(tmp_path) -> None:
    source = stored(tmp_path, [60, 60])
    data, _ = encode_shard(simulations(60, (5,), 999, 0.1), about(1, (5,)))
    (tmp_path / "shard-000001.parquet").write_bytes(data)
    with pytest.raises(InputError, match=r"shard-000001\.parquet is damaged: it is not the one"):
        loaded(source, Alone())


def test_errors_in_the_thread_reach_the_caller(tmp_path) -> None:
    source = stored(tmp_path, [400, 300, 500])
    data = loaded(source, Alone(), memory_gb=0.00002, shuffle_mb=0.006)
    assert data.mode == "streamed"
    (tmp_path / "shard-000001.parquet").unlink()
    with pytest.raises(InputError, match=r"shard-000001\.parquet is missing"):
        list(data.batches(1))
    assert_no_threads()


def test_what_is_too_little(tmp_path) -> None:
    source = stored(tmp_path, [400, 300, 500])
    with pytest.raises(InputError) as told:
        loaded(source, Alone(), memory_gb=0.00002)
    for words in ("train.memory_gb is 2e-05", "train.shuffle_mb (it is 64)", "0.03"):
        assert words in str(told.value)
    # What the message says is enough.
    assert loaded(source, Alone(), memory_gb=0.105 * 1e-3).mode == "memory"
    with pytest.raises(InputError, match=r"of a batch; raise .* lower train\.batch_size"):
        loaded(source, Alone(), memory_gb=0.00002, batch_size=500, shuffle_mb=0.001)
    with pytest.raises(InputError, match="train: 15 usable simulations are too few"):
        loaded(ArraySource(np.zeros((15, 3)), np.zeros((15, 1))), Alone())
    with pytest.raises(InputError, match=r"train\.workers is 5, more than the 4 shares"):
        loaded(source, Alone(0, 5))


# ---- threads ------------------------------------------------------------------------------------


def assert_no_threads() -> None:
    """Of ours; those of a pool that was closed may need a moment."""
    gc.collect()
    until = time.monotonic() + 10
    while any(thread.name.startswith(THREADS) for thread in threading.enumerate()):
        assert time.monotonic() < until, threading.enumerate()
        time.sleep(0.01)


def test_an_iterator_that_is_left_ends_its_thread(tmp_path) -> None:
    data = loaded(stored(tmp_path, [400, 300, 500]), Alone(), memory_gb=0.00002, shuffle_mb=0.006)
    for number, _ in enumerate(data.batches(1)):
        if number == 3:
            break
    assert_no_threads()
    batches = data.batches(1)
    next(batches)
    assert any(thread.name.startswith(THREADS) for thread in threading.enumerate())
    data.close()
    assert_no_threads()


def test_two_items_are_alive() -> None:
    made: list[int] = []

    def make(look: Callable[[], None]) -> Iterator[int]:
        for item in range(6):
            look()
            made.append(item)
            yield item

    prefetch = Prefetch(make)
    for item in range(6):
        assert next(prefetch) == item
        time.sleep(0.05)  # time for the thread to make more than it may
        assert made == list(range(min(item + 2, 6)))
        prefetch.let_go()
    assert list(prefetch) == []
    prefetch.close()


def test_a_thread_ends_in_the_middle_of_an_item() -> None:
    begun = threading.Event()

    def make(look: Callable[[], None]) -> Iterator[int]:
        while True:
            begun.set()
            look()
            time.sleep(0.001)
        yield 0

    prefetch = Prefetch(make)
    assert begun.wait(10)
    prefetch.close()
    assert list(prefetch) == []
    del prefetch
    assert_no_threads()


def test_the_wait_is_counted(tmp_path, monkeypatch) -> None:
    data = loaded(stored(tmp_path, [400, 300, 500]), Alone(), memory_gb=0.00002, shuffle_mb=0.006)
    assert data.input_wait_s == 0.0
    began = time.perf_counter()
    for _ in data.batches(1):
        time.sleep(0.002)
    spent = time.perf_counter() - began
    assert 0 < data.input_wait_s <= spent - 0.002 * data.steps


# ---- memory -------------------------------------------------------------------------------------


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_available_memory(tmp_path) -> None:
    assert available_bytes(tmp_path / "nothing") is None
    meminfo = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n"}
    assert available_bytes(written(tmp_path / "a", meminfo)) == 5000 * 1024
    second = {
        **meminfo,
        "proc/self/cgroup": "0::/pod/box\n",
        "sys/fs/cgroup/pod/box/memory.max": "max\n",
        "sys/fs/cgroup/pod/box/memory.current": "1000\n",
        "sys/fs/cgroup/pod/memory.max": "100000\n",
        "sys/fs/cgroup/pod/memory.current": "30000\n",
        "sys/fs/cgroup/pod/memory.stat": "anon 5\ninactive_file 20000\n",
    }
    assert available_bytes(written(tmp_path / "b", second)) == 90_000
    first = {
        **meminfo,
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "7000\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "9000\n",
    }
    assert available_bytes(written(tmp_path / "c", first)) == 0
    here = available_bytes()
    assert here is None or here > 0


def test_descriptions(tmp_path) -> None:
    source = stored(tmp_path, [400, 300, 500], fails=0.0)
    data = loaded(source, Alone(), memory_gb=1.0)
    assert data.describe() == (
        "1,080 of 1,080 training simulations are in memory (0.0384 MB with those held out; up to "
        "1,000 MB are allowed)"
    )
    data = loaded(source, Alone(), memory_gb=0.00002, shuffle_mb=0.006)
    assert data.describe().startswith("1,080 of 1,080 training simulations are streamed")
