"""Simulators that crash, hang or eat memory: one row is lost, and nothing else."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from sbi_dist.simulation.isolation import (
    Crashed,
    IsolatedCall,
    TimedOut,
    forked,
    resident_bytes,
)
from sbi_dist.simulation.plan import Shard
from sbi_dist.simulation.rows import InProcess, simulate_theta
from sbi_dist.simulation.shard import Simulations
from sbi_dist.simulator import SimulatorForm

ROWS = 12
FORM = SimulatorForm(False, "numpy", False, (2,))
BATCH = SimulatorForm(True, "numpy", False, (2,))
OK, RAISE, CRASH, SEGFAULT, KILLED, MIDWAY, HANG, EXIT, ALLOCATE, LEAK = range(10)
# A row of a test takes no time worth counting, but a process of a loaded machine may wait for long.
TIMEOUT_S = 2.0
MEGABYTE = 1 << 20
SPARE = 60 * MEGABYTE  # memory that the simulator may take


def misbehave(theta: np.ndarray) -> np.ndarray:
    """theta[0] says what happens; x is theta[1], noise and the process id, as far as it goes."""
    rows = np.atleast_2d(theta)
    for what in rows[:, 0].astype(int).tolist():
        if what == RAISE:
            raise ValueError(f"no {np.random.random()}")
        if what == CRASH:
            os._exit(7)
        if what == EXIT:
            sys.exit("gave up")
        if what in (SEGFAULT, KILLED):
            os.kill(os.getpid(), signal.SIGSEGV if what == SEGFAULT else signal.SIGKILL)
        if what == MIDWAY:  # ends in the middle of its answer
            frame = sys._getframe()
            while not isinstance(pipe := frame.f_locals.get("pipe"), Connection):
                frame = frame.f_back
            os.write(pipe.fileno(), struct.pack("!i", 1000) + b"x" * 10)
            os._exit(3)
        if what == HANG:
            time.sleep(60)
        if what == ALLOCATE:
            taken = np.ones(2 * SPARE // 8)
            time.sleep(60)
            taken.sum()
        if what == LEAK:
            misbehave.__dict__.setdefault("kept", []).append(np.ones(SPARE // 4 // 8))
    x = np.stack([rows[:, 1], np.random.random(len(rows))], axis=1)
    return x if theta.ndim > 1 else x[0]


def pid(theta: np.ndarray) -> np.ndarray:
    return np.array([os.getpid(), resident_bytes() / MEGABYTE])


@pytest.fixture(scope="module")
def orphan() -> Iterator[subprocess.Popen]:
    """A process with a hung simulator beside it, whose process id it tells; begun at once."""
    script = """
        import os, time
        import numpy as np
        from ray import cloudpickle
        from sbi_dist.simulation.isolation import IsolatedCall
        from sbi_dist.simulator import SimulatorForm

        def hang(theta):
            import os, time
            os.write(1, f"{os.getpid()}\\n".encode())
            time.sleep(300)

        call = IsolatedCall(cloudpickle.dumps(hang), None)
        form = SimulatorForm(False, "numpy", False, ())
        zeros = np.zeros((1, 2), np.float32), np.zeros((1, 2), np.uint64)
        call.rows(form, *zeros, lambda *row: True)
    """
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, cwd=root
    )
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture(scope="module")
def isolated(orphan) -> Iterator[IsolatedCall]:
    # By value: the child could not import this module.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    call = IsolatedCall(cloudpickle.dumps(misbehave), TIMEOUT_S)
    yield call
    call.close()


@pytest.fixture(scope="module")
def limited(isolated) -> Iterator[IsolatedCall]:
    """One that may hold a little more than it does at rest, and take its time for it."""
    plain = IsolatedCall(cloudpickle.dumps(pid), None)
    held = int(run(plain).x[:, 1].max()) * MEGABYTE
    plain.close()
    call = IsolatedCall(cloudpickle.dumps(misbehave), 60.0, held + SPARE)
    yield call
    call.close()


def run(call: Any, *bad: tuple[int, int], form: SimulatorForm = FORM, **more: Any) -> Simulations:
    theta = np.stack([np.zeros(ROWS), np.arange(ROWS)], axis=1).astype(np.float32)
    for row, what in bad:
        theta[row, 0] = what
    streams = tuple(Shard(0, 0, ROWS).streams(0)[1:])
    return simulate_theta(theta, form, streams, call, **more)


@pytest.fixture(scope="module")
def undisturbed() -> Simulations:
    """The rows as they come out in this process, without any that misbehaves."""
    result = run(InProcess(misbehave))
    assert result.ok.all() and len(np.unique(result.x)) == 2 * ROWS
    return result


def gone(process: int, within_s: float = 5.0) -> bool:
    """Whether a process ends; one that nobody waited for yet has ended too."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


# ---- rows ---------------------------------------------------------------------------------------


FAULTS = [
    (RAISE, "error", "ValueError: no 0."),
    (EXIT, "error", "SystemExit: gave up"),
    (CRASH, "crashed", "the simulator's process ended (exit code 7)"),
    (SEGFAULT, "crashed", "the simulator's process ended (SIGSEGV)"),
    (KILLED, "crashed", "the simulator's process ended (SIGKILL)"),
    (MIDWAY, "crashed", "the simulator's process ended (exit code 3)"),
    (HANG, "timeout", f"took longer than timeout_s={TIMEOUT_S:g} s"),
]
NAMES = "raise exit crash segfault killed midway hang".split()


def test_rows_are_those_of_this_process(isolated, undisturbed) -> None:
    result = run(isolated)
    assert result.x.tobytes() == undisturbed.x.tobytes() and not result.failed
    assert (result.duration_s < TIMEOUT_S).all()


@pytest.mark.parametrize(("what", "status", "message"), FAULTS, ids=NAMES)
def test_a_bad_row_costs_one_row(isolated, undisturbed, what, status, message) -> None:
    """The rows after it come out as without it."""
    bad = {0, 4, 5, ROWS - 1} if what in (RAISE, CRASH) else {4}
    result = run(isolated, *((row, what) for row in bad))
    assert result.failed.keys() == bad and len(result) == ROWS
    for found in result.failed.values():
        assert found[0] == status and found[1].startswith(message)
    assert np.isnan(result.x[list(bad)]).all()
    good = result.ok
    assert result.x[good].tobytes() == undisturbed.x[good].tobytes()
    if what == HANG:
        # It was killed in time, and it is known how long it took.
        assert TIMEOUT_S <= result.duration_s[4] < TIMEOUT_S + 2


@pytest.mark.parametrize("row", [0, 4])
def test_a_row_that_takes_too_much_memory_costs_one_row(limited, undisturbed, row) -> None:
    """At fault is one that does in a process of its own; it is not tried for ever."""
    result = run(limited, (row, ALLOCATE))
    assert result.failed.keys() == {row}
    status, message = result.failed[row]
    assert status == "crashed" and message.startswith("the simulator's process held 0.")
    assert message.endswith(" GB (simulate.memory_per_actor_gb)")
    assert result.x[result.ok].tobytes() == undisturbed.x[result.ok].tobytes()


@pytest.mark.parametrize("look_every_s", [0.0, 0.03])
def test_a_slow_leak_fails_no_row(limited, undisturbed, monkeypatch, look_every_s) -> None:
    """Each row leaves a quarter of the spare memory: the process is replaced, nobody to blame."""
    monkeypatch.setattr("sbi_dist.simulation.isolation._LOOK_EVERY_S", look_every_s)
    started = []
    genuine = limited._started
    monkeypatch.setattr(
        limited, "_started", lambda: (started.append(limited._pipe is None), genuine())[1]
    )
    limited.close()
    result = run(limited, *((row, LEAK) for row in range(ROWS)))
    assert not result.failed
    assert look_every_s or sum(started) > 1
    assert result.x.tobytes() == undisturbed.x.tobytes()


def test_an_interrupted_range_ends_its_process(isolated, undisturbed, monkeypatch) -> None:
    """Which is at work on the next row, and may be for long."""
    monkeypatch.setattr("sbi_dist.simulation.rows._LOOK_EVERY_S", 0.0)
    looks = iter(range(100))
    began = time.monotonic()
    result = run(isolated, (3, HANG), interrupted=lambda: next(looks) >= 2)
    assert len(result) == 3 and time.monotonic() - began < 2
    assert result.x.tobytes() == undisturbed.x[:3].tobytes()
    assert not run(isolated).failed


# ---- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "status", "message"), FAULTS[2::4], ids=NAMES[2::4])
def test_a_bad_row_of_a_batch_costs_one_row(isolated, what, status, message) -> None:
    good = run(InProcess(misbehave), form=BATCH, batch_size=6)
    result = run(isolated, (2, what), form=BATCH, batch_size=6)
    assert result.failed.keys() == {2}
    assert result.failed[2][0] == status and result.failed[2][1].startswith(message)
    # The other batch comes out as it would have; the rows of its own one by one.
    assert result.x[6:].tobytes() == good.x[6:].tobytes()
    assert result.x[result.ok, 0].tolist() == [row for row in range(ROWS) if row != 2]
    by_itself = run(InProcess(misbehave), (2, RAISE), form=BATCH, batch_size=6)
    assert result.x[result.ok].tobytes() == by_itself.x[result.ok].tobytes()


# ---- the child ----------------------------------------------------------------------------------


def test_the_child_is_gone_after_close() -> None:
    call = IsolatedCall(cloudpickle.dumps(pid), None)
    children = [run(call).x[:, 0].astype(int).tolist() for _ in range(2)]
    (child,) = {*children[0], *children[1]}  # one for all rows and calls
    assert child != os.getpid() and Path(f"/proc/{child}").exists()
    began = time.monotonic()
    call.close()
    assert gone(child) and time.monotonic() - began < 2
    call.close()
    other = int(run(call).x[0, 0])  # and may be called again
    assert other != child
    call.close()
    assert gone(other)


def test_a_simulator_that_can_not_be_loaded_is_an_error() -> None:
    call = IsolatedCall(b"no pickle", None)
    with pytest.raises(RuntimeError, match="ended while it was loaded"):
        run(call)
    call.close()


def test_the_child_dies_with_its_parent(orphan) -> None:
    child = int(orphan.stdout.readline())
    assert not gone(child, within_s=0.05)
    orphan.kill()  # without a chance to clean up
    orphan.wait()
    assert gone(child)


def test_resident_bytes() -> None:
    before = resident_bytes()
    taken = np.ones(100 * MEGABYTE // 8)
    assert 0.9 < (resident_bytes(os.getpid()) - before) / taken.nbytes < 1.2
    assert resident_bytes(2**22 + 1) == 0  # above the largest process id


# ---- a fork -------------------------------------------------------------------------------------

with_threads = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@with_threads
def test_a_fork_gives_what_the_function_gives() -> None:
    kept = []
    value = forked(lambda: (kept.append(1), os.getpid(), {"a": np.arange(10**6)})[1:])
    assert value[0] != os.getpid() and value[1]["a"].sum() == 499999500000
    assert kept == [] and gone(value[0])
    assert forked(lambda: None, 5.0) is None


@with_threads
def test_what_a_fork_raises_is_raised() -> None:
    with pytest.raises(KeyError, match="'k'"):
        forked(lambda: {}["k"])


@with_threads
@pytest.mark.parametrize(
    ("function", "how"),
    [
        (lambda: os._exit(7), "exit code 7"),
        # Without pytest's report of it.
        (lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGSEGV)), "SIGSEGV"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "SIGTERM"),
    ],
    ids=["exit", "segfault", "terminated"],
)
def test_a_fork_may_crash(function, how) -> None:
    with pytest.raises(Crashed, match=re.escape(f"the process ended ({how})")):
        forked(function)


@with_threads
def test_a_fork_may_take_too_long(tmp_path) -> None:
    def hang() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(TimedOut, match=r"took longer than 0\.3 s"):
        forked(hang, 0.3)
    assert 0.3 <= time.monotonic() - began < 3
    assert gone(int((tmp_path / "pid").read_text()))
