"""Submitting a stage, following its job, and ending it: what the commands do."""

from __future__ import annotations

import queue
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from sbi_dist.errors import InputError, StageError
from sbi_dist.progress import say
from sbi_dist.submission.access import shown
from sbi_dist.submission.api import Job, JobApi, persistently
from sbi_dist.submission.errors import Ended, NoSuchJob, Unreachable
from sbi_dist.submission.follow import Follower, News
from sbi_dist.submission.request import STOP_S, Request

__all__ = ["find", "follow", "start", "stop"]

_ANSWERS = {"d": "detach", "s": "stop", "c": "continue"}


def start(api: JobApi, request: Request, patience_s: float) -> str:
    """Start a request's job, unless it runs; its id.

    Ids are the request's and the number of the attempt. Where the newest attempt is over, there is
    a next one, as every stage goes on where it was. Of two that start it at once, one does.

    Raises:
        InputError: no such cluster, or it takes no such files.
        StageError: the cluster does not take the job.
    """
    api.check()
    before = _newest(persistently(api.jobs, patience_s, say), request.id)
    attempt = 1
    if before is not None:
        if not before.over:
            say(f"submit: job {before.id} is {before.status.lower()} already")
            return before.id
        attempt = _attempt(before.id, request.id) + 1
        say(f"submit: job {before.id} is over ({before.status.lower()}); this is attempt {attempt}")
    if request.package is not None:
        name = request.package_name
        if not persistently(lambda: api.has_package(name), patience_s, say):
            content = request.package.zipped()
            persistently(lambda: api.put_package(name, content), patience_s, say)
    job_id = f"{request.id}-{attempt}"
    # Done again where the answer was lost, which then finds its own job.
    began = persistently(
        lambda: api.submit(
            job_id, request.entrypoint(), request.runtime_env(), request.metadata(attempt)
        ),
        patience_s,
        say,
    )
    say(f"submit: job {job_id} is {'submitted' if began else 'there already'}")
    return job_id


def _attempt(job_id: str, base: str) -> int:
    number = job_id.removeprefix(f"{base}-")
    return int(number) if number != job_id and number.isdecimal() else 0


def _newest(jobs: list[Job], base: str) -> Job | None:
    """The attempt with the highest number."""
    found = [job for job in jobs if _attempt(job.id, base)]
    return max(found, key=lambda job: _attempt(job.id, base), default=None)


def find(api: JobApi, name: str) -> Job:
    """The job of an id, or the newest attempt of an id without its number.

    Raises:
        NoSuchJob: there is neither.
    """
    try:
        return api.get(name)
    except NoSuchJob:
        newest = _newest(api.jobs(), name)
        if newest is None:
            raise
        return newest


def follow(api: JobApi, job_id: str, patience_s: float) -> None:
    """Print a job's log until it is over; returns where it succeeded.

    Ctrl-C on a terminal asks whether to stop the job; elsewhere, and at SIGTERM, only following
    ends.

    Raises:
        Ended: with the job's exit code, or 130 or 143 where following was interrupted.
        StageError: the cluster is out of reach for too long, or has lost the job.
    """
    follower, tail = Follower(api, job_id, patience_s), ""
    with _signals() as received:
        while True:
            if received:
                _interrupted(api, job_id, received)
            try:
                news = follower.news.get(timeout=0.2)
            except queue.Empty:
                continue
            if news.text:
                tail = (tail + news.text)[-4000:]
                sys.stdout.write(news.text)
                sys.stdout.flush()
            if news.note:
                say(f"submit: {news.note}")
            if news.error is not None:
                raise _lost(api, job_id, news.error)
            if news.job is not None:
                if tail and not tail.endswith("\n"):
                    sys.stdout.write("\n")
                    sys.stdout.flush()
                _outcome(news, tail)
                return


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals are noted rather than raised, so that none breaks off a request."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(api: JobApi, job_id: str, received: list[int]) -> None:
    """Ask what was meant; returns where following goes on."""
    number = received[0]
    received.clear()
    answer = "detach"
    if number == signal.SIGINT and sys.stdin.isatty() and sys.stderr.isatty():
        answer = _ask()
    if answer == "continue":
        return
    if answer == "stop":
        job = stop(api, job_id)
        if job.status == "STOPPED":
            raise Ended(
                f"job {job_id} is stopped; what is finished is kept, submit it again to go on",
                128 + number,
            )
        say(f"submit: job {job_id} was over before that")
        _outcome(News(job=job), "")
        raise Ended(f"job {job_id} succeeded", 128 + number)
    raise Ended(f"detached; job {job_id} goes on: {_how(api, job_id)}", 128 + number)


def _ask() -> str:
    # A second Ctrl-C is an answer too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while True:
            # Standard output has the job's log, perhaps in a file.
            click.echo(
                "\n[d]etach and leave the job running, [s]top it, or [c]ontinue? ",
                nl=False,
                err=True,
            )
            text = input()
            for letter, answer in _ANSWERS.items():
                if text.strip().lower() in (letter, answer):
                    return answer
    except (KeyboardInterrupt, EOFError):
        click.echo(err=True)
        return "detach"
    finally:
        signal.signal(signal.SIGINT, before)


def _how(api: JobApi, job_id: str) -> str:
    where = f"--address {shown(api.url)} {job_id}"
    return (
        f"follow it with `sbi-dist jobs attach {where}`, stop it with `sbi-dist jobs stop {where}`"
    )


def stop(api: JobApi, job_id: str) -> Job:
    """End a job and wait until it has; the job.

    Its stage gets SIGTERM, and time to write what it has.

    Raises:
        StageError: it does not end.
    """
    asked, deadline = 0.0, time.monotonic() + 2 * STOP_S
    while True:
        job = persistently(lambda: api.get(job_id), STOP_S, say)
        if job.over:
            return job
        if time.monotonic() > deadline:
            raise StageError(
                f"job {job_id} is {job.status.lower()} {2 * STOP_S} s after it was asked to stop; "
                "look at the dashboard for the reason"
            )
        # Again, as one whose process is being started does not hear it.
        if time.monotonic() - asked > 5:
            persistently(lambda: api.stop(job_id), STOP_S, say)
            asked = time.monotonic()
        time.sleep(0.3)


def _lost(api: JobApi, job_id: str, error: Exception) -> Exception:
    if isinstance(error, Unreachable):
        return StageError(f"{error}; job {job_id} may go on: {_how(api, job_id)}")
    if isinstance(error, NoSuchJob):
        return StageError(
            f"{error} any more, as after a restart of its head; submit again to go on"
        )
    return error


def _outcome(news: News, tail: str) -> None:
    """Tell how a job ended.

    Raises:
        Ended: unless it succeeded.
    """
    job = news.job
    assert job is not None
    if job.status == "SUCCEEDED":
        say(f"submit: job {job.id} succeeded")
        return
    if job.status == "STOPPED":
        raise Ended(
            f"job {job.id} was stopped; what is finished is kept, submit it again to go on",
            128 + signal.SIGTERM,
        )
    if job.exit_code:
        code = job.exit_code if job.exit_code > 0 else 128 - job.exit_code
        raise Ended(f"job {job.id} failed with exit code {code}{_hint(code, tail)}", code)
    reason = " ".join(job.message.split())[:1000] or "the cluster gives no reason"
    raise Ended(f"job {job.id} failed ({reason})", 1)


def _hint(code: int, tail: str) -> str:
    if "No module named 'sbi_dist" in tail or "No module named sbi_dist" in tail:
        return (
            "; this version of sbi_dist is not installed for the cluster's `python`: install it "
            "there, or name the interpreter that has it with --python"
        )
    if code == 127:
        return "; the cluster has no such interpreter: name one with --python"
    return ""


def describe(job: Job) -> dict[str, object]:
    """A job as fields to print."""
    fields: dict[str, object] = {"job": job.id, "status": job.status, **job.metadata}
    if job.started:
        fields["started"] = _time(job.started)
    if job.ended:
        fields["ended"] = _time(job.ended)
    if job.exit_code is not None:
        fields["exit_code"] = job.exit_code
    fields["command"] = job.entrypoint
    if job.over and job.status != "SUCCEEDED":
        fields["message"] = job.message
    return fields


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def table(jobs: list[Job]) -> str:
    """Jobs as lines."""
    rows = [("job", "status", "exit", "started")]
    for job in jobs:
        code = "" if job.exit_code is None else str(job.exit_code)
        rows.append((job.id, job.status.lower(), code, _time(job.started or 0)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def require_stage(stage: str, stages: tuple[str, ...]) -> None:
    """Check the name of a stage.

    Raises:
        InputError: there is none of this name, or it is nothing to submit.
    """
    from sbi_dist.options import nearest

    if stage in stages:
        return
    if stage == "serve":
        raise InputError(
            "STAGE is 'serve', which is no job with an end; give `sbi-dist serve EXPERIMENT "
            "--address HOST:6379 --detach`"
        )
    near = nearest(stage, stages)
    raise InputError(
        f"STAGE is {stage!r}; it must be one of {', '.join(stages)}"
        + (f" (did you mean {near!r}?)" if near else "")
    )
