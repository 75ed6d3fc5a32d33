"""What ends programs when the process that runs them is killed.

A process of its own, the watcher, reads which scratch directories are in use. When this process
ends, by whatever cause, it kills the programs in them and removes them. The usual end of a run is
in ``process.py``.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import threading

__all__ = ["MARK", "WATCH"]

# Names the scratch directory in the environment of a program and of all that it starts.
MARK = "SBI_DIST_SCRATCH"

# It finds programs by their environment, so that grandchildren are found too, in any session
# (PR_SET_PDEATHSIG would end the program alone, and needs a preexec_fn). What it can't find: a
# process that dropped the variable and left its process group, or that runs as another user.
_WATCHER = """
import os, shutil, sys, time
running = set()
for line in sys.stdin.buffer:
    path = bytes.fromhex(line[1:].decode())
    (running.add if line[:1] == b"+" else running.discard)(path)
marks = {MARK + b"=" + path for path in running}
for attempt in range(3 if running else 0):
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    found = not marks.isdisjoint(file.read().split(bytes(1)))
                if found:
                    os.killpg(os.getpgid(int(name)), 9)
            except OSError:
                pass
    for path in running:
        shutil.rmtree(path, ignore_errors=True)
    time.sleep(0.05)
""".replace("MARK", repr(MARK.encode()))


class _Watch:
    """Tells the watcher which scratch directories are in use; starts it when first needed.

    ``lock`` is also to be held while a program starts and while an executable is written: a
    program started in between would inherit the open file for a moment, in which the executable
    is "text file busy".
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: set[str] = set()
        self.watcher: subprocess.Popen[bytes] | None = None

    def begin(self, scratch: str) -> None:
        with self.lock:
            self.running.add(scratch)
            if not self._tell(b"+", scratch):
                self.close()
                self._start()

    def end(self, scratch: str) -> None:
        with self.lock:
            self.running.discard(scratch)
            self._tell(b"-", scratch)  # where it was killed, the next run replaces it

    def _start(self) -> None:
        self.watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHER],
            bufsize=0,
            cwd="/",
            # Not marked itself, should this process be part of a program.
            env={key: value for key, value in os.environ.items() if key != MARK},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.watcher.stdin is not None
        os.set_blocking(self.watcher.stdin.fileno(), False)
        for path in self.running:
            self._tell(b"+", path)

    def _tell(self, sign: bytes, scratch: str) -> bool:
        """Whether there is a watcher to tell it to."""
        if self.watcher is None or self.watcher.stdin is None:
            return False
        try:
            line = sign + os.fsencode(scratch).hex().encode() + b"\n"
            os.write(self.watcher.stdin.fileno(), line)
        except BlockingIOError:  # it is stopped; the programs must not wait for it
            pass
        except BrokenPipeError:  # it was killed
            return False
        return True

    def close(self) -> None:
        """End the watcher, which then does its work if there is any."""
        if self.watcher is not None and self.watcher.stdin is not None:
            self.watcher.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.watcher.wait(5)
        self.watcher = None

    def forget(self) -> None:
        """After a fork: leave the watcher to the parent, whose threads may have held the lock."""
        if self.watcher is not None and self.watcher.stdin is not None:
            self.watcher.stdin.close()
            self.watcher.returncode = 0  # not this process's child, so not to be waited for
        self.__init__()  # type: ignore[misc]


WATCH = _Watch()
atexit.register(WATCH.close)
os.register_at_fork(after_in_child=WATCH.forget)
