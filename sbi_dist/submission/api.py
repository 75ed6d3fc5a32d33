"""The HTTP interface of a Ray cluster's job server, as far as it is needed.

https://docs.ray.io/en/latest/cluster/running-applications/job-submission/api.html. Every request
has a time limit, and what goes wrong is an error that says what to do.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from sbi_dist.errors import InputError, StageError
from sbi_dist.submission.access import extra_headers, find_token, shown
from sbi_dist.submission.errors import NoSuchJob, Unreachable

__all__ = ["Job", "JobApi", "persistently"]

_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_SERVER_AWAY = (502, 503, 504)
_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True)
class Job:
    """What the cluster knows of a job.

    Attributes:
        id: its submission id.
        status: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.
        message: why it failed, by the cluster.
        exit_code: of its process, negative for a signal; None where there is none.
        started, ended: in seconds since 1970; None while not.
        entrypoint: its command.
        metadata: what was noted when it was submitted.
    """

    id: str
    status: str
    message: str
    exit_code: int | None
    started: float | None
    ended: float | None
    entrypoint: str
    metadata: dict[str, str]

    @property
    def over(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Job:
        def seconds(key: str) -> float | None:
            return answer[key] / 1000 if answer.get(key) else None

        return cls(
            id=answer.get("submission_id") or answer.get("job_id") or "",
            status=str(answer["status"]),
            message=answer.get("message") or "",
            exit_code=answer.get("driver_exit_code"),
            started=seconds("start_time"),
            ended=seconds("end_time"),
            entrypoint=answer.get("entrypoint") or "",
            metadata=answer.get("metadata") or {},
        )


class JobApi:
    """A cluster's job server.

    Every method raises ``Unreachable`` when the server does not answer, and ``InputError`` when it
    wants another token.

    Args:
        url: see ``access.dashboard_url``.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.headers = extra_headers()
        self._token_from = ""
        if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
            self._add_token()
        self._client = httpx.Client(timeout=_TIMEOUT)

    def _add_token(self) -> bool:
        found = find_token()
        if found is None or self._token_from or "authorization" in map(str.lower, self.headers):
            return False
        self.headers["Authorization"], self._token_from = f"Bearer {found[0]}", found[1]
        return True

    def check(self) -> None:
        """Make first contact.

        Raises:
            InputError: nothing answers there, or no dashboard of Ray's.
        """
        try:
            answer = self._ask("GET", "/api/version")
        except Unreachable as error:
            raise InputError(
                f"--address: {error}; give http://HOST:8265, the address of the cluster's "
                "dashboard, and check that it runs and can be reached from here"
            ) from error
        try:
            answer.json()["ray_version"]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"--address: {shown(self.url)} answers, but not as the dashboard of a Ray cluster "
                f"(HTTP status {answer.status_code} for /api/version); give http://HOST:8265 "
                "without a path, unless a proxy wants one"
            ) from None

    def get(self, job_id: str) -> Job:
        """A job.

        Raises:
            NoSuchJob: there is none of this id.
        """
        return Job.of(self._good("GET", f"/api/jobs/{quote(job_id, safe='')}", job_id).json())

    def jobs(self) -> list[Job]:
        """All jobs that were submitted, the newest first."""
        answers = self._good("GET", "/api/jobs/").json()
        jobs = [Job.of(answer) for answer in answers if answer.get("submission_id")]
        return sorted(jobs, key=lambda job: job.started or 0, reverse=True)

    def submit(
        self, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> bool:
        """Start a job; whether this call started it, rather than one before it.

        Raises:
            StageError: the cluster does not take it; says why.
        """
        content = {
            "submission_id": job_id,
            "entrypoint": entrypoint,
            "runtime_env": runtime_env,
            "metadata": metadata,
        }
        answer = self._ask("POST", "/api/jobs/", json=content)
        if answer.status_code == 200:
            return True
        # The cluster has no code of its own for an id that is taken.
        try:
            self.get(job_id)
        except NoSuchJob:
            raise StageError(f"the cluster does not take the job ({_reason(answer)})") from None
        return False

    def stop(self, job_id: str) -> None:
        """Ask for a job's end, if it runs."""
        self._good("POST", f"/api/jobs/{quote(job_id, safe='')}/stop", job_id)

    def logs(self, job_id: str) -> str:
        """All that a job has written so far."""
        answer = self._good("GET", f"/api/jobs/{quote(job_id, safe='')}/logs", job_id)
        return str(answer.json()["logs"])

    def tail_url(self, job_id: str) -> str:
        """Where a WebSocket gives what a job writes, from its beginning."""
        return f"{self.url}/api/jobs/{quote(job_id, safe='')}/logs/tail"

    def has_package(self, name: str) -> bool:
        """Whether a package of files is there; it then stays for the next minutes."""
        return self._ask("GET", f"/api/packages/gcs/{name}").status_code == 200

    def put_package(self, name: str, content: bytes) -> None:
        self._good("PUT", f"/api/packages/gcs/{name}", content=content)

    def _good(self, method: str, path: str, job_id: str | None = None, **content: Any) -> Any:
        answer = self._ask(method, path, **content)
        if answer.status_code == 404 and job_id is not None:
            raise NoSuchJob(f"the cluster at {shown(self.url)} has no job {job_id!r}")
        if answer.status_code != 200:
            raise StageError(
                f"{shown(self.url)} answers {method} {path} with HTTP status {answer.status_code} "
                f"({_reason(answer)})"
            )
        return answer

    def _ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            answer = self._client.request(method, self.url + path, headers=self.headers, **content)
        except httpx.TransportError as error:
            raise Unreachable(_unreachable(self.url, error)) from error
        except (httpx.InvalidURL, UnicodeError) as error:  # of the host's name, say
            raise InputError(
                f"--address {shown(self.url)!r} can't be used ({error}); give http://HOST:8265, "
                "the address of the cluster's dashboard"
            ) from error
        unset = os.environ.get("RAY_AUTH_MODE") is None
        # Not sent before it is asked for: who answers may not be the cluster that it is for.
        if answer.status_code == 401 and unset and self._add_token():
            return self._ask(method, path, **content)
        if answer.status_code in (401, 403):
            raise InputError(self._refused(answer))
        if answer.status_code in _SERVER_AWAY:
            raise Unreachable(
                f"{shown(self.url)} answers with HTTP status {answer.status_code}, as a proxy does "
                "whose server is away"
            )
        return answer

    def _refused(self, answer: httpx.Response) -> str:
        if self._token_from:
            return (
                f"{shown(self.url)} refuses the token of {self._token_from} (HTTP status "
                f"{answer.status_code}); put the cluster's token there"
            )
        return (
            f"{shown(self.url)} asks for a token (HTTP status {answer.status_code}); set "
            "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it, or put it into "
            "~/.ray/auth_token"
        )


def _unreachable(url: str, error: httpx.TransportError) -> str:
    where, reason = shown(url), str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"nothing answers at {where} ({reason})"
    if isinstance(error, httpx.TimeoutException):
        return f"{where} takes connections, but gives no answer within {_TIMEOUT.read:g} s"
    return f"{where} breaks off, or does not speak HTTP ({reason})"


def _reason(answer: httpx.Response) -> str:
    """The last line of what may be a traceback."""
    lines = [line.strip() for line in answer.text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason given"


def persistently(
    action: Callable[[], _Found],
    patience_s: float,
    note: Callable[[str], None] = lambda text: None,
) -> _Found:
    """Do what may be done twice, until the server answers.

    Raises:
        Unreachable: it does not within the patience.
    """
    end, wait, noted = time.monotonic() + patience_s, 0.5, False
    while True:
        try:
            return action()
        except Unreachable as error:
            if time.monotonic() + wait > end:
                raise
            if not noted:
                note(f"submit: {error}; trying again for up to {patience_s:.0f} s")
                noted = True
        time.sleep(wait)
        wait = min(2 * wait, 5.0)
