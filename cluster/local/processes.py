"""What runs: processes that outlive the command that started them, noted in a file.

A process is known by its id and the time of its start, as ids are used again. All of them, and what
they start, have the cluster's mark in their environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sbi_dist.errors import InputError, StageError

__all__ = ["Processes"]

MARK = "SBI_LOCAL_CLUSTER"
# Names of Ray's sockets, up to 65 bytes below it, have to fit into 107.
LONGEST = 40


class Processes:
    """The processes of the cluster whose files are in a folder.

    Args:
        folder: the folder, which is this user's alone.

    Raises:
        InputError: the folder can't be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        if len(str(self.folder)) > LONGEST:
            raise InputError(
                f"--folder {self.folder} has {len(str(self.folder))} characters; at most {LONGEST} "
                "leave room for the names of Ray's sockets"
            )
        self._file = self.folder / "cluster.json"

    def exist(self) -> bool:
        """Whether a cluster was started here and not ended.

        Raises:
            InputError: the folder is another user's.
        """
        try:
            self._require_own()
        except FileNotFoundError:
            return False
        return self._file.exists()

    def _require_own(self) -> None:
        """Check the folder before anything in it is trusted: in /tmp anyone may have made it."""
        status = self.folder.lstat()
        if (
            not stat.S_ISDIR(status.st_mode)
            or status.st_uid != os.getuid()
            or status.st_mode & 0o077
        ):
            raise InputError(
                f"--folder {self.folder} is no directory of yours alone; give one that is not "
                "there yet"
            )

    def begin(self) -> None:
        """Make the folder.

        Raises:
            InputError: it is another user's, or there is something in it.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._require_own()
            if any(self.folder.iterdir()):
                raise InputError(f"--folder {self.folder} is not empty; give an empty or a new one")
            (self.folder / "log").mkdir()
        except OSError as error:
            raise InputError(f"--folder {self.folder} can't be made ({error.strerror})") from error
        self._write({"mark": secrets.token_hex(8), "processes": [], "exports": {}, "urls": {}})

    def start(
        self, name: str, command: list[str], environment: dict[str, str], end_at_once: bool = False
    ) -> None:
        """Start a process in a session of its own. What it says is in ``log/<name>``.

        Args:
            name: what it is called here.
            command: the program and its arguments.
            environment: its environment, to which the mark is added.
            end_at_once: kill it in the end, where it would take long to stop in order.
        """
        content = self._read()
        with open(self.folder / "log" / name, "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**environment, MARK: content["mark"]},
                start_new_session=True,
            )
        content["processes"].append(
            {
                "name": name,
                "pid": process.pid,
                "began": _began(process.pid),
                "end_at_once": end_at_once,
            }
        )
        self._write(content)

    def wait_for(self, name: str, met: Iterator[bool], patience_s: float = 60.0) -> None:
        """Wait until a process is ready.

        Raises:
            StageError: it has ended, or is not ready in time; with the end of its log.
        """
        until = time.monotonic() + patience_s
        while not next(met):
            alive = dict(self.states())[name] is not None
            if not alive or time.monotonic() > until:
                log = (self.folder / "log" / name).read_text(errors="replace").split("\n")[-8:]
                what = "is not ready" if alive else "has ended"
                raise StageError(f"{name} {what}: {' '.join(log)}")
            time.sleep(0.1)

    def publish(self, exports: dict[str, str], urls: dict[str, str]) -> None:
        """Keep what users of the cluster need: variables, and addresses of its pages."""
        self._write({**self._read(), "exports": exports, "urls": urls})

    def published(self) -> tuple[dict[str, str], dict[str, str]]:
        content = self._read()
        return content["exports"], content["urls"]

    def states(self) -> list[tuple[str, int | None]]:
        """Each process's name, and its id while it runs."""
        return [
            (each["name"], None if _ended(each["pid"], each["began"]) else each["pid"])
            for each in self._read()["processes"]
        ]

    def end(self) -> list[int]:
        """End all processes, the last first, and what they left; ids that had to be killed."""
        content = self._read()
        mark = f"{MARK}={content['mark']}".encode()
        killed = []
        for each in reversed(content["processes"]):
            process = each["pid"], each["began"]
            if _ended(*process):
                continue
            _signal(each["pid"], signal.SIGKILL if each["end_at_once"] else signal.SIGTERM)
            # Ray ends its own processes in this time.
            if not _within(20.0, partial(_ended, *process)):
                _signal(each["pid"], signal.SIGKILL)
                killed.append(each["pid"])
        # Workers of Ray see by themselves that their node is gone.
        if not _within(10.0, lambda: not list(_marked(mark))):
            for pid in _marked(mark):
                _signal(pid, signal.SIGKILL)
                killed.append(pid)
            _within(10.0, lambda: not list(_marked(mark)))
        return killed

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text())
        except ValueError:
            content = None
        if (
            not isinstance(content, dict)
            or not content.keys() >= {"mark", "processes", "exports", "urls"}
            # What a shell evaluates is the values quoted, and the names as they are.
            or not all(re.fullmatch("[A-Z][A-Z0-9_]*", name) for name in content["exports"])
        ):
            raise InputError(
                f"--folder: {self._file} is damaged, as after a crash of the machine; end what "
                f"still runs of the cluster (`grep -l {MARK}= /proc/[0-9]*/environ` finds it), and "
                f"remove {self.folder}"
            )
        return content

    def _write(self, content: dict[str, Any]) -> None:
        temporary = self._file.with_suffix(".new")
        temporary.touch(mode=0o600)  # as keys of the S3 server are in it
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(self._file)


def _began(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; None where it has ended."""
    try:
        # Behind its name, which may have anything in it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _ended(pid: int, began: int | None) -> bool:
    return began is None or _began(pid) != began


def _marked(mark: bytes) -> Iterator[int]:
    """Processes with an entry in their environment."""
    # A file's name in the pattern would be looked up outside of the suppression.
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes().split(b"\0"):
                yield int(path.name)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _within(seconds: float, met: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not met():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
