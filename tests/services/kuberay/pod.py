"""A pod as processes of this machine: a host name, network, processes and mounts of its own."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.services.kuberay.image import Image
from tests.services.kuberay.network import Network, wait_for_namespace

__all__ = ["Mount", "Pod", "Process"]


@dataclass(frozen=True)
class Mount:
    """A volume in a container: a folder of this machine, or one in memory."""

    path: str
    source: Path | None
    size: str = ""
    read_only: bool = False


@dataclass(frozen=True)
class Process:
    """What a container runs: as a user and group, without capabilities."""

    command: Sequence[str]
    environment: Mapping[str, str]
    user: tuple[int, int]
    mounts: Sequence[Mount] = ()


class Container:
    """A process, and all that it starts, with files of its own and the pod's network and name."""

    def __init__(self, image: Image, folder: Path, join: int | None, script: str) -> None:
        """Begin.

        Args:
            folder: for its script, its root and its log.
            join: a process of the pod; None for the pod's first container.
            script: what ends with the container's process.
        """
        self._image, self.log = image, folder / "log"
        file = folder / "script"
        file.touch(mode=0o600)  # there are secrets in it
        file.write_text(script)
        # However this process ends, the kernel ends the container.
        command = ["setpriv", "--pdeathsig=KILL"]
        new = ["--mount", "--pid"]
        if join is None:
            new += ["--net", "--uts", "--ipc"]
        else:
            command += ["nsenter", f"--target={join}", "--net", "--uts", "--ipc"]
        command += ["unshare", *new, "--fork", "--kill-child=KILL", "bash", str(file)]
        with self.log.open("wb") as log:
            self.outer = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/"
            )

    def go(self) -> None:
        """Let it run its process, once what it needs is there."""
        assert self.outer.stdin is not None
        self.outer.stdin.write(b"go\n")
        self.outer.stdin.close()

    def begun(self) -> bool:
        """Whether its process runs, and no init container."""
        try:
            return os.readlink(f"/proc/{self.first()}/root") != "/"
        except (IndexError, OSError):
            return False

    def kill(self) -> None:
        """End all its processes at once."""
        with contextlib.suppress(IndexError, OSError):
            os.kill(self.first(), signal.SIGKILL)
        self.outer.kill()
        self.outer.wait()

    def first(self) -> int:
        """Its first process, as seen from outside."""
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children")
        return int(children.read_text().split()[0])


class Pod:
    """Containers that share a network and a host name.

    Args:
        name: its host name too.
        image: what containers see as their root, which they can't write to.
        network: what it is connected to.
        folder: of its own, for scripts and logs.
        before: init containers, which end before the first container begins.
        containers: the first is the pod's, the others are beside it.

    Attributes:
        address: in the network.
        told: whether the containers were told to run.
    """

    def __init__(
        self,
        name: str,
        image: Image,
        network: Network,
        folder: Path,
        before: Sequence[Process],
        containers: Sequence[Process],
    ) -> None:
        self.name, self._image, self._main = name, image, containers[0]
        self.told = False
        self._containers: list[Container] = []
        try:
            for index, each in enumerate(containers):
                place = folder / str(index)
                (place / "root").mkdir(parents=True)
                earlier = before if index == 0 else ()
                script = self._script(place / "root", earlier, each)
                join = self.pid if self._containers else None
                self._containers.append(Container(image, place, join, script))
                if join is None:
                    wait_for_namespace(self._containers[0].outer)
                    self.address = network.attach(self.pid)
        except (AssertionError, OSError) as error:
            self.kill()
            raise AssertionError(f"{name} does not start: {self.said()}") from error

    def go(self) -> None:
        """Let the containers run, once the network lets them."""
        self.told = True
        for each in self._containers:
            each.go()

    @property
    def pid(self) -> int:
        """A process that is in the pod's network."""
        return self._containers[0].outer.pid

    @property
    def code(self) -> int | None:
        """The first container's exit code; None while it runs."""
        return self._containers[0].outer.poll()

    @property
    def begun(self) -> bool:
        """Whether the first container runs, and no init container."""
        return self._containers[0].begun()

    def codes(self) -> list[int | None]:
        """The exit codes of all containers."""
        return [each.outer.poll() for each in self._containers]

    def kill(self) -> None:
        """End all its processes at once."""
        for each in reversed(self._containers):
            each.kill()

    def execute(
        self, command: Sequence[str], timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the first container, as ``kubectl exec`` does."""
        until = time.monotonic() + timeout_s
        while not self.begun and time.monotonic() < until:
            time.sleep(0.01)
        enter = ["nsenter", f"--target={self._containers[0].first()}", "--mount", "--net", "--uts"]
        enter += ["--ipc", "--pid", "--root", "--wd=/", *_as(self._main.user)]
        return subprocess.run(
            [*enter, "env", f"--chdir={self._image.home}", *command],
            env={**self._main.environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def said(self, container: int = 0) -> str:
        """What a container printed, and its init containers."""
        return self._containers[container].log.read_text(errors="replace")

    def _script(self, root: Path, before: Sequence[Process], main: Process) -> str:
        layers, root = root, root / "root"
        lines = [
            "set -e",
            "mount --make-rprivate /",
            # Layers may not be within each other: the upper one goes to a file system of its own.
            f"mount -t tmpfs -o mode=755 tmpfs {layers}",
            f"mkdir {layers}/layer {root}",
            f"cp -a {self._image.folder}/. {layers}/layer",
            f"mount -t overlay overlay -o ro,lowerdir={layers}/layer:/ {root}",
            f"mount --bind {self._image.folder}/etc/hosts {root}/etc/hosts",
            *(f"mount --bind {path} {root}{path}" for path in self._image.binds),
            f"mount -t proc proc {root}/proc",
            f"mount -t sysfs -o ro sysfs {root}/sys",
            f"mount --rbind /dev {root}/dev",
        ]
        for each in sorted(main.mounts, key=lambda mount: mount.path):
            place = f"{root}{each.path}"
            lines.append(f"mkdir -p {place}")
            if each.source is None:
                size = f"size={each.size}," if each.size else ""
                lines.append(f"mount -t tmpfs -o {size}mode=1777 tmpfs {place}")
            else:
                lines.append(f"mount --bind {'-o ro ' * each.read_only}{each.source} {place}")
        places = [Path(each.path) for each in main.mounts]
        for path in self._image.needed:  # as in a checkout in /tmp
            if any(path.is_relative_to(place) for place in places):
                lines.append(f"mkdir -p {root}{path}")
                lines.append(f"mount --bind -o ro {path} {root}{path}")
        lines += [f"hostname {self.name}", "read -r _ <&0", "exec </dev/null"]
        for process in (*before, main):
            command = [*_as(process.user), *_with(process, self._image.home)]
            run = shlex.join(["chroot", str(root), *command])
            lines.append(f"exec {run}" if process is main else run)
        return "\n".join(lines) + "\n"


def _as(user: tuple[int, int]) -> list[str]:
    """The start of a command that is run as a user, without capabilities."""
    who = [f"--reuid={user[0]}", f"--regid={user[1]}", "--clear-groups"]
    # What ends a process with the one that made it is forgotten when it becomes another user.
    return [
        "setpriv",
        *who,
        "--pdeathsig=KILL",
        "--no-new-privs",
        "--bounding-set=-all",
        "--inh-caps=-all",
    ]


def _with(process: Process, folder: str) -> list[str]:
    """A process's command with its variables and no others, in a folder."""
    variables = [f"{name}={value}" for name, value in process.environment.items()]
    return ["env", "-i", f"--chdir={folder}", *variables, *process.command]
