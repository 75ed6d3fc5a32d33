"""The process of a program and its scratch directory, from their start to their end.

Knows bytes and files, not what they mean, which is in ``formats.py``. For the case that this
process is killed meanwhile, see ``watch.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from sbi_dist.program.watch import MARK, WATCH

__all__ = [
    "ProgramCrashed",
    "ProgramError",
    "ProgramFailed",
    "ProgramTimeout",
    "execute",
    "scratch_directory",
    "write_file",
]

_TAIL_BYTES = 4000  # kept of what is printed and not the result
_TAIL_CHARACTERS = 1000  # of that, in a message
_MOST_PRINTED = 2**28  # bytes of a result on standard output
_MOST_KEPT = 10  # scratch directories of failed runs, a process
_KEPT = itertools.count(1)


class ProgramError(RuntimeError):
    """A run of a program gave no x. ``status`` is the status of its row."""

    status = "error"


class ProgramTimeout(ProgramError):
    """The program took longer than its time limit and was killed."""

    status = "timeout"


class ProgramCrashed(ProgramError):
    """The program was ended by a signal."""

    status = "crashed"


class ProgramFailed(ProgramError):
    """The program could not be started, reported a failure, or left no x that can be read."""


# ---- the scratch directory -----------------------------------------------------------------------


@contextlib.contextmanager
def scratch_directory(folder: str | None, keep_failed: str | None, about: str) -> Iterator[str]:
    """A new directory in ``folder``, removed at the end; after a failure ``keep_failed`` gets it.

    ``about`` is kept with it.
    """
    folder = os.path.realpath(folder or tempfile.gettempdir())
    os.makedirs(folder, exist_ok=True)
    # Known to the watcher before it exists, unlike one of mkdtemp.
    scratch = f"{folder}/sbi_dist-{secrets.token_hex(8)}"
    try:
        WATCH.begin(scratch)
        os.mkdir(scratch, 0o700)
        yield scratch
    except ProgramError as error:
        if keep_failed is not None and (number := next(_KEPT)) <= _MOST_KEPT:
            name = f"failed-{socket.gethostname()}-{os.getpid()}-{number}"
            _keep(scratch, Path(keep_failed, name), f"{about}\n{error}\n")
        raise
    finally:
        _remove(scratch)
        WATCH.end(scratch)


def write_file(path: str, content: bytes, executable: bool = False) -> None:
    """Write a file of a program, and the folders that it is in."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with WATCH.lock if executable else contextlib.nullcontext(), open(path, "wb") as file:
        file.write(content)
        if executable:
            os.fchmod(file.fileno(), 0o755)


def _keep(scratch: str, target: Path, about: str) -> None:
    """Copy the scratch directory of a failed run; never raises."""

    def not_files(folder: str, names: list[str]) -> list[str]:
        """What can't be copied: a pipe would be read for ever."""
        modes = {name: os.lstat(os.path.join(folder, name)).st_mode for name in names}
        kinds = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
        return [name for name, mode in modes.items() if stat.S_IFMT(mode) not in kinds]

    with contextlib.suppress(OSError):  # shutil.Error is one
        shutil.copytree(scratch, target, symlinks=True, ignore=not_files)
        Path(target, "sbi_dist-failure.txt").write_text(about, errors="replace")


def _remove(scratch: str) -> None:
    """Remove a scratch directory; never raises."""
    for wait in (0.0, 0.01, 0.1):
        shutil.rmtree(scratch, ignore_errors=True)
        if not os.path.lexists(scratch):
            return
        # A folder without permissions, or a killed process that is not quite gone.
        with contextlib.suppress(OSError):
            os.chmod(scratch, 0o700)
            for folder, names, _ in os.walk(scratch):
                for path in (os.path.join(folder, name) for name in names):
                    if not os.path.islink(path):
                        os.chmod(path, 0o700)
        time.sleep(wait)
    shutil.rmtree(scratch, ignore_errors=True)


# ---- the process ---------------------------------------------------------------------------------


class _Tail:
    """What a program printed: all of it up to ``most`` bytes, or without ``most`` only its end."""

    def __init__(self, most: int | None = None) -> None:
        self.data, self.too_long, self._most = bytearray(), False, most

    def take(self, pipe: int) -> bool:
        """Take what is in the pipe; whether there was anything."""
        try:
            data = os.read(pipe, 2**16)
        except BlockingIOError:
            return False
        self.data += data
        if self._most is not None:
            self.too_long = len(self.data) > self._most
        elif len(self.data) > 2**18:
            del self.data[:-_TAIL_BYTES]
        return bool(data)

    def last_lines(self, scratch: str) -> str:
        """As one line, the same for runs that say the same."""
        text = bytes(self.data[-_TAIL_BYTES:]).decode(errors="replace").replace(scratch, ".")
        text = " | ".join(line.strip() for line in text.splitlines() if line.strip())
        return text if len(text) <= _TAIL_CHARACTERS else "..." + text[3 - _TAIL_CHARACTERS :]


def execute(
    arguments: list[str],
    scratch: str,
    environment: dict[str, str],
    *,
    feed: bytes | None,
    prints_x: bool,
    timeout_s: float | None,
    success_codes: Collection[int],
) -> tuple[bytes, str]:
    """Run a program to its end, with ``feed`` on its standard input.

    Returns:
        What it printed, of use with ``prints_x`` alone, and an ending for messages about x.

    Raises:
        ProgramError: it did not start, or did not end well.
    """
    process = _start(arguments, scratch, {**environment, MARK: scratch}, feed is not None)
    printed, errors = _Tail(_MOST_PRINTED if prints_x else None), _Tail()
    try:
        intime = _attend(process, feed or b"", printed, errors, timeout_s)
    finally:
        _end(process)

    said = ""
    if text := errors.last_lines(scratch):
        said = f"; stderr: {text}"
    elif text := printed.last_lines(scratch):
        said = f"; stdout: {text}"
    if printed.too_long:
        raise ProgramFailed(
            f"printed more than {_MOST_PRINTED:,} bytes; write x to a file such as {{output}}{said}"
        )
    if not intime:
        raise ProgramTimeout(f"took longer than timeout_s={timeout_s:g} s{said}")
    code = process.returncode
    if code < 0:
        raise ProgramCrashed(f"ended by {_signal(-code)}{said}")
    if code not in success_codes:
        # A shell's way to say that its command was ended by a signal.
        of = f" ({_signal(code - 128)} of a command of it)" if 128 < code < 160 else ""
        raise ProgramFailed(f"ended with exit code {code}{of}{said}")
    return bytes(printed.data), said


def _signal(number: int) -> str:
    name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
    return f"{name} (out of memory?)" if number == signal.SIGKILL else name


def _start(
    arguments: list[str], scratch: str, environment: dict[str, str], fed: bool
) -> subprocess.Popen[bytes]:
    # No preexec_fn: it would take a fork in place of a vfork, which costs more with each GB of
    # this process and may hang where there are threads.
    try:
        with WATCH.lock:
            return subprocess.Popen(
                arguments,
                bufsize=0,
                cwd=scratch,
                env=environment,
                stdin=subprocess.PIPE if fed else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if os.path.isfile(arguments[0]) and not isinstance(error, PermissionError):
            reason += "; a script must begin with a #! line, whose interpreter must be installed"
        name = arguments[0].removeprefix(f"{scratch}/")
        raise ProgramFailed(f"{name!r} can't be started ({reason})") from None


def _attend(
    process: subprocess.Popen[bytes],
    feed: bytes,
    printed: _Tail,
    errors: _Tail,
    timeout_s: float | None,
) -> bool:
    """Feed a program and take what it prints until it ends; False where it ran out of time.

    One loop over all its pipes, so that neither side waits for the other, in which no more than
    the tails is kept. The program's own end counts, not that of what it left running.
    """
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    assert process.stdout is not None and process.stderr is not None
    tails = {process.stdout.fileno(): printed, process.stderr.fileno(): errors}
    poll = select.poll()
    for pipe in tails:
        os.set_blocking(pipe, False)
        poll.register(pipe, select.POLLIN)
    if process.stdin is not None:
        os.set_blocking(process.stdin.fileno(), False)
        poll.register(process.stdin, select.POLLOUT)
    rest = memoryview(feed)
    try:
        ended, longest = os.pidfd_open(process.pid), math.inf
        poll.register(ended, select.POLLIN)
    except OSError:  # before Linux 5.3
        ended, longest = -1, 0.005
    try:
        while not _has_ended(process.pid):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            left = min(left, longest)
            for pipe, _ in poll.poll(None if left == math.inf else math.ceil(left * 1000)):
                if pipe in tails:
                    if not tails[pipe].take(pipe):
                        poll.unregister(pipe)
                elif pipe != ended:
                    assert process.stdin is not None
                    try:
                        rest = rest[os.write(pipe, rest[: 2**16]) :]
                    except BrokenPipeError:  # a program may do without its input
                        rest = rest[:0]
                    if not rest:
                        poll.unregister(pipe)
                        process.stdin.close()
            if printed.too_long:
                return True
    finally:
        if ended >= 0:
            os.close(ended)
    for pipe, tail in tails.items():
        # What is in the pipe and no more: others may still be writing.
        for _ in range(64):
            if tail.too_long or not tail.take(pipe):
                break
    return True


def _has_ended(pid: int) -> bool:
    """Whether a program has ended; it is not reaped, see :func:`_end`."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # reaped elsewhere
        return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a program's process group, and reap it."""
    # Before the program is reaped: until then its number can't belong to another group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
