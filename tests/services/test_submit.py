"""``sbi-dist submit`` and ``sbi-dist jobs`` on a real Ray cluster that asks for a token.

About 140 s.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from sbi_dist.problem import Problem, load_problem
from sbi_dist.store import LocalStore
from sbi_dist.submission.api import JobApi
from sbi_dist.submission.command import stop
from tests.ray.conftest import (
    ROOT,
    SLOW,
    assert_same,
    calm,
    command,
    read_dataset,
    shard_times,
    wait_until,
    write_experiment,
)
from tests.services.outcome import dataset_name, posterior_draws, run_alone
from tests.services.proxy import Proxy
from tests.services.ray_head import NotStarted, RayHead
from tests.services.served import BUSY

# Says a line at each tenth of a second when it is loaded, and is then done.
TALK = """
import time

from sbi_dist import BoxUniform, Problem

for number in range({lines}):
    print(f"line {{number}} of {{'x' * 50}}", flush=True)
    time.sleep(0.1)
problem = Problem(BoxUniform([0.0], [1.0]), lambda theta: theta)
"""


# Its posterior has two modes, which one epoch does not find.
SQUARED = """
from sbi_dist import BoxUniform, Problem


def simulator(theta, rng):
    return theta[:, :1] ** 2 + 0.05 * rng.standard_normal((len(theta), 1))


problem = Problem(BoxUniform([-1.0], [1.0]), simulator)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    try:
        running = RayHead()
    except NotStarted as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))
    yield running
    running.stop()


class Submitter:
    """A folder that ``sbi-dist`` is run in, with the cluster's dashboard as its address."""

    def __init__(self, head: RayHead, folder: Path) -> None:
        self.head, self.folder = head, folder
        self.store = folder / "runs"

    def arguments(self, *words: str, url: str | None = None) -> list[str]:
        return command(*words, "--address", url or self.head.url)

    def stage(self, stage: str, *words: str) -> list[str]:
        return ["submit", stage, "experiment.yaml", "--store", str(self.store), *words]

    def run(
        self, *words: str, url: str | None = None, **variables: str | None
    ) -> subprocess.CompletedProcess[str]:
        chosen = {**self.head.environment, **variables}
        return subprocess.run(
            self.arguments(*words, url=url),
            cwd=self.folder,
            env={key: value for key, value in chosen.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=150,
        )

    def begin(self, *words: str, url: str | None = None, out: Any = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.arguments(*words, url=url),
            cwd=self.folder,
            env=self.head.environment,
            stdout=out or subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.head.token}"}
        return httpx.get(f"{self.head.url}/api/jobs/{path}", headers=headers).json()

    def talk(self, lines: int) -> None:
        write_experiment(self.folder, TALK.format(lines=lines))


@pytest.fixture
def submitter(head: RayHead, tmp_path: Path) -> Submitter:
    return Submitter(head, tmp_path)


def test_tokens(submitter: Submitter, tmp_path: Path) -> None:
    submitter.talk(0)

    def refused(**variables: str | None) -> str:
        begun = time.monotonic()
        done = submitter.run(*submitter.stage("status"), HOME=str(tmp_path), **variables)
        assert done.returncode == 2 and done.stdout == "" and time.monotonic() - begun < 20
        *_, line = done.stderr.splitlines()
        assert "Traceback" not in done.stderr
        return line

    assert "asks for a token (HTTP status 401); set RAY_AUTH_TOKEN" in refused(RAY_AUTH_TOKEN=None)
    wrong = refused(RAY_AUTH_TOKEN="0" * 64)
    assert "refuses the token of the variable RAY_AUTH_TOKEN (HTTP status 403)" in wrong
    assert "can't be read" in refused(RAY_AUTH_TOKEN=None, RAY_AUTH_TOKEN_PATH="nowhere")
    (tmp_path / "token").write_text(f"{submitter.head.token}\n")
    listed = submitter.run(
        "jobs", "list", RAY_AUTH_TOKEN=None, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")
    )
    assert listed.returncode == 0 and listed.stdout.startswith("job"), listed.stderr


def test_bad_input_is_told_once(submitter: Submitter) -> None:
    write_experiment(submitter.folder, "raise RuntimeError('no data on this machine')")
    (submitter.folder / ".secret").write_text("hidden")
    done = submitter.run(*submitter.stage("status"))
    assert done.returncode == 2
    both = done.stdout + done.stderr
    assert both.count("fails on import (RuntimeError: no data on this machine)") == 1
    assert "failed with exit code 2" in done.stderr and "Traceback" not in both

    # Nothing of it is said twice, nor kept where it should not be.
    found = re.search(r"job (experiment-status-\w{10}-1) is submitted", done.stderr)
    assert found is not None
    job = submitter.ask(found[1])
    assert job["metadata"].items() >= {
        "experiment": "experiment", "stage": "status", "attempt": "1",
        "store": str(submitter.store),
    }.items()  # fmt: skip
    assert set(job["runtime_env"]) == {"env_vars", "working_dir"}
    assert set(job["runtime_env"]["env_vars"]) == {"RAY_JOB_STOP_WAIT_TIME_S"}

    about = yaml.safe_load(submitter.run("jobs", "status", found[1].rpartition("-")[0]).stdout)
    assert about["job"] == found[1] and about["status"] == "FAILED" and about["exit_code"] == 2
    assert f"{found[1]}  failed" in submitter.run("jobs", "list").stdout
    assert submitter.run("jobs", "logs", found[1]).stdout == done.stdout


def test_two_submit_at_once_and_the_network_is_cut(submitter: Submitter, tmp_path: Path) -> None:
    submitter.talk(70)
    proxy = Proxy(int(submitter.head.url.rpartition(":")[2]))
    words = submitter.stage("status")
    logs = [tmp_path / "one.log", tmp_path / "other.log"]
    try:
        with logs[0].open("w") as first, logs[1].open("w") as second:
            one = submitter.begin(*words, out=first)
            other = submitter.begin(*words, url=proxy.endpoint, out=second)
        wait_until(lambda: "line 1 " in logs[1].read_text(), "the log to come")
        for seconds in (1.0, 2.0):
            time.sleep(1.0)
            proxy.down()
            time.sleep(seconds)
            proxy.up()
        ends = [process.communicate(timeout=60)[1] for process in (one, other)]
    finally:
        proxy.down()
    said = "".join(ends)
    assert (one.returncode, other.returncode) == (0, 0), said
    ids = set(re.findall(r"experiment-status-\w+-\d+", said))
    assert len(ids) == 1 and said.count("is submitted") == 1, said
    assert "trying again for up to 600 s" in ends[1] and "answers again" in ends[1]
    assert logs[0].read_text() == logs[1].read_text()
    lines = re.findall(r"^line (\d+) of", logs[0].read_text(), re.MULTILINE)
    assert lines == [str(number) for number in range(70)]

    # And once more, as another attempt.
    more = submitter.run(*words, "--detach")
    again = more.stdout.strip()
    assert again == next(iter(ids))[:-1] + "2" and "this is attempt 2" in more.stderr
    assert submitter.run("jobs", "stop", again).returncode == 0


class Terminal:
    """A process on a pseudo-terminal, with standard output in a file where one is given."""

    def __init__(self, submitter: Submitter, *words: str, out: Path | None = None) -> None:
        pid, self._end = pty.fork()
        if pid == 0:
            if out is not None:
                os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
            os.chdir(submitter.folder)
            os.execve(sys.executable, submitter.arguments(*words), submitter.head.environment)
        self._pid, self.said = pid, ""

    def until(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + 60
        while self.said.count(text) < times:
            assert time.monotonic() < deadline, self.said
            if select.select([self._end], [], [], 0.2)[0]:
                self.said += os.read(self._end, 65536).decode()

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def wait(self) -> int:
        with contextlib.suppress(OSError):  # the terminal ends with its process
            while data := os.read(self._end, 65536):
                self.said += data.decode()
        os.close(self._end)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def test_interrupts(submitter: Submitter, tmp_path: Path) -> None:
    """Ctrl-C asks on a terminal and detaches elsewhere; the job goes on unless it is stopped."""
    submitter.talk(600)
    words = submitter.stage("status")
    terminal = Terminal(submitter, *words)
    terminal.until("line 3 ")
    terminal.type("\x03")
    terminal.until("or [c]ontinue?")
    terminal.type("c\n")
    terminal.until("line 20 ")
    terminal.type("\x03")
    terminal.until("or [c]ontinue?", 2)
    terminal.type("d\n")
    assert terminal.wait() == 130
    found = re.search(r"job (\S+) goes on: .*`(sbi-dist jobs attach [^`]+)`", terminal.said)
    assert found is not None, terminal.said
    job_id, attach = found[1], shlex.split(found[2])[1:]
    assert submitter.ask(job_id)["status"] == "RUNNING"

    for number in (signal.SIGINT, signal.SIGTERM):
        with submitter.begin(*words) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("line 5 "):
                    break
            process.send_signal(number)
            _, err = process.communicate(timeout=20)
        assert process.returncode == 128 + number and f"job {job_id} is running already" in err
        assert f"detached; job {job_id} goes on" in err and "jobs stop" in err
        assert submitter.ask(job_id)["status"] == "RUNNING"

    out = tmp_path / "run.log"
    terminal = Terminal(submitter, *attach[:2], attach[-1], out=out)
    wait_until(lambda: out.exists() and "line 3 " in out.read_text(), "the log in its file")
    terminal.type("\x03")
    terminal.until("or [c]ontinue?")
    terminal.type("s\n")
    assert terminal.wait() == 130 and f"job {job_id} is stopped" in terminal.said
    assert "ontinue?" not in out.read_text()
    assert submitter.ask(job_id)["status"] == "STOPPED"


def at_once(folder: Path) -> Problem:
    """The problem SLOW, whose results do not depend on its time."""
    (folder / "fast").mkdir()
    (folder / "fast/problem.py").write_text(SLOW.replace("time.sleep(0.004)", ""))
    return load_problem("problem.py:problem", folder / "fast")


def test_stop_and_go_on(submitter: Submitter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is stopped in time and keeps its shards; the next one ends with the same dataset."""
    folder = submitter.folder
    write_experiment(folder, SLOW.replace("0.004", "0.03"))
    words = submitter.stage("simulate")
    with submitter.begin(*words) as process:
        wait_until(lambda: len(shard_times(folder)) >= 3, "the first shards")
        found = submitter.run("jobs", "list").stdout
        job_id = found.split("\n")[1].split()[0]
        # In this process, as another one needs seconds before it asks.
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", submitter.head.token)
        before, begun = shard_times(folder), time.monotonic()
        assert stop(JobApi(submitter.head.url), job_id).status == "STOPPED"
        assert time.monotonic() - begun < 3 * BUSY
        assert submitter.run("jobs", "stop", job_id).stdout == f"{job_id}: stopped\n"
        out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and f"job {job_id} was stopped" in err
    # It ended in order, rather than by SIGKILL.
    assert "sbi-dist: stopped; what is finished is kept" in out
    first = shard_times(folder)
    assert before.items() <= first.items() and len(first) < 20

    done = submitter.run(*words)
    assert done.returncode == 0 and "this is attempt 2" in done.stderr, done.stdout
    second = job_id[:-1] + "2"
    # It worked on the cluster that it is a job of.
    assert submitter.ask(second)["driver_info"] is not None
    assert {name: shard_times(folder)[name] for name in first} == first
    assert_same(read_dataset(folder), calm(at_once(folder), 400, 20))
    attached = submitter.run("jobs", "attach", second)
    assert attached.returncode == 0 and attached.stdout == done.stdout


def test_a_model_that_fails_its_calibration_is_exit_code_3(submitter: Submitter) -> None:
    write_experiment(submitter.folder, SQUARED, num_simulations=2000, shard_size=1000)
    short = ("--set", "train.max_epochs=1", "--set", "calibrate.num_simulations=600")
    trained = submitter.run(*submitter.stage("run", *short))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (submitter.store / "experiment/models/promoted.json").is_file()
    judged = submitter.run(*submitter.stage("calibrate", *short))
    both = judged.stdout + judged.stderr
    assert judged.returncode == 3 and "failed with exit code 3" in judged.stderr, both
    assert both.count("failed its calibration (") == 1


def test_without_sbi_dist_on_the_cluster(submitter: Submitter) -> None:
    words = ("submit", "status", "gaussian", "--store", str(submitter.store), "--no-upload")
    done = submitter.run(*words, "--python", "no-such-python")
    assert done.returncode == 127 and "name one with --python" in done.stderr
    done = submitter.run(*words)
    assert done.returncode == 0 and "dataset: " in done.stdout


def test_every_way_gives_the_same(submitter: Submitter) -> None:
    """Also by Ray's own program with the entry points under ``jobs/``, without anything of ours."""
    folder = submitter.folder
    path = write_experiment(folder, SLOW)
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ray")), "job", "submit", "--address",
            submitter.head.url, "--", "python", str(ROOT / "jobs/run.py"), str(path),
            "--store", str(folder / "plain"),
        ],
        env={**submitter.head.environment, "RAY_AUTH_MODE": "token"},
        cwd=folder, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    done = submitter.run(*submitter.stage("run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(read_dataset(folder), calm(at_once(folder), 400, 20))
    alone = run_alone(folder)
    for store in (submitter.store, folder / "plain"):
        other = LocalStore(store / "experiment")
        assert dataset_name(other) == dataset_name(alone)
        assert np.array_equal(posterior_draws(other), posterior_draws(alone))
