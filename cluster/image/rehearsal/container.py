"""Processes in a tree of files as in a container: own processes, mounts and, if asked, network."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Container", "Image"]


@dataclass
class Image:
    """A tree with what the Dockerfile says about processes in it."""

    tree: Path
    environment: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


# The mounts of a container. $1 is the tree; the rest is the command, run with the new root.
_ENTER = r"""
set -e
tree=$1 hardened=$2 binds=$3
shift 3
mount --bind "$tree" "$tree"
[ -z "$hardened" ] || mount -o remount,bind,ro "$tree"
mount -t proc proc "$tree/proc"
mount -t sysfs -o ro sysfs "$tree/sys" 2>/dev/null || mount --bind -o ro /sys "$tree/sys"
mount -t tmpfs -o mode=755 tmpfs "$tree/dev"
mkdir "$tree/dev/shm" "$tree/dev/pts"
mount -t tmpfs -o mode=1777,size=2g tmpfs "$tree/dev/shm"
for device in null zero full random urandom tty; do
    touch "$tree/dev/$device"
    mount --bind "/dev/$device" "$tree/dev/$device"
done
ln -s /proc/self/fd "$tree/dev/fd"
for path in $binds; do
    mount --bind -o ro "$path" "$tree$path"
done
if [ -n "$hardened" ]; then
    mount -t tmpfs -o mode=1777 tmpfs "$tree/tmp"
    mount -t tmpfs -o mode=700,uid=1000,gid=1000 tmpfs "$tree/home/sbi/.ray"
    ip link set lo up
fi
exec chroot "$tree" "$@"
"""


@dataclass
class Container:
    """Commands in an image's tree.

    Args:
        image: what to run in.
        hardened: as a strict pod: no network but its own, root file system read-only but
            for /tmp and ~/.ray, no capabilities, no new privileges. Else as a build step.
        environment: more variables.
        binds: paths of this machine seen at the same place, read-only.
    """

    image: Image
    hardened: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    binds: Sequence[str] = ()

    def start(self, command: Sequence[str], **streams: Any) -> subprocess.Popen[str]:
        """Start a command as the first process; ending the process returned ends all in there."""
        binds = [*self.binds, "/etc/resolv.conf", "/etc/hosts"]
        for path in binds:
            self._place(path)
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        if self.hardened:
            unshare.append("--net")
        enter = [_ENTER, "enter", str(self.image.tree), "1" if self.hardened else ""]
        return subprocess.Popen(
            [*unshare, "sh", "-c", *enter, " ".join(binds), *self._inside(command)],
            text=True,
            **streams,
        )

    def beside(self, first: int, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command beside the one whose process id, as seen from outside, is ``first``."""
        enter = ["nsenter", f"--target={first}", "--mount", "--pid", "--root", "--wd=/"]
        if self.hardened:
            enter.append("--net")
        return subprocess.run(
            [*enter, *self._inside(command)], capture_output=True, text=True, timeout=60
        )

    def _inside(self, command: Sequence[str]) -> list[str]:
        """The command with the image's user, folder and environment."""
        user, _, group = self.image.user.partition(":")
        limits = ["--no-new-privs", "--bounding-set=-all"] if self.hardened else []
        variables = {**self.image.environment, **self.environment}
        return [
            "/usr/bin/env",
            "-i",
            *[f"{name}={value}" for name, value in variables.items()],
            "/usr/bin/setpriv",
            f"--reuid={user}",
            f"--regid={group or user}",
            "--clear-groups",
            *limits,
            "/bin/sh",
            "-c",
            f'cd {shlex.quote(self.image.folder)} && exec "$@"',
            "sh",
            *command,
        ]

    def _place(self, path: str) -> None:
        """Make the place in the tree that a path of this machine is mounted at."""
        place = self.image.tree / path.lstrip("/")
        if not place.exists() and not place.is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            if os.path.isdir(path):
                place.mkdir()
            else:
                place.touch()
