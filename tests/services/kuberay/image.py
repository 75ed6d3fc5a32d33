"""What pods see as their image: this machine's files, read-only, with the project's environment.

No image is run: in place of /opt/venv there is the environment that the tests run in, and this
machine's programs are those of the image. User, home, folder and variables are the Dockerfile's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster.image.rehearsal.dockerfile import Dockerfile, pairs

__all__ = ["Image"]

ROOT = Path(__file__).resolve().parents[3]
_USERS = "root:x:0:0:root:/root:/bin/sh\nsbi:x:1000:1000::/home/sbi:/bin/bash\n"


class Image:
    """A layer over this machine's root.

    Args:
        folder: where the layer is made; every pod can read it.
        places: where pods mount volumes.

    Attributes:
        environment: variables that every process of the image has.
        needed: folders with the code and the environment, which a volume may be in front of.
        binds: folders on other file systems, which the pods see at the same place.
    """

    home = "/home/sbi"

    def __init__(self, folder: Path, places: set[str]) -> None:
        self.folder = folder
        for place in {*places, f"{self.home}/.ray"}:
            (folder / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
        os.chown(folder / f"{self.home}/.ray".lstrip("/"), 1000, 1000)
        self.needed = [ROOT, Path(sys.prefix), Path(sys.base_prefix).resolve()]
        for path in self.needed:
            self._let_others_pass(path)
        root = Path("/").stat().st_dev
        self.binds = [path for path in self.needed if path.stat().st_dev != root]
        files = {
            "etc/passwd": _USERS,
            "etc/group": "root:x:0:\nsbi:x:1000:\n",
            # No server: names are in the hosts file.
            "etc/resolv.conf": "search sbi-dist.svc.cluster.local svc.cluster.local\n",
            "etc/hosts": "127.0.0.1 localhost\n",
        }
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        said = Dockerfile.parse((ROOT / "cluster/image/Dockerfile").read_text())
        self.environment: dict[str, str] = {}
        for stage in (said.stages[0], said.stages[-1]):
            for each in stage.instructions:
                if each.keyword == "ENV":
                    self.environment |= pairs(each.text)
        programs = str(Path(sys.executable).parent)
        path_variable = self.environment["PATH"]
        self.environment["PATH"] = path_variable.replace("/opt/venv/bin", programs)

    def _let_others_pass(self, path: Path) -> None:
        """Folders on the way to a path may be closed to the image's user, as /root is."""
        for parent in path.parents:
            if not parent.stat().st_mode & 0o001:
                (self.folder / str(parent).lstrip("/")).mkdir(parents=True, exist_ok=True)

    def write_hosts(self, hosts: dict[str, str]) -> None:
        """Names and their addresses, in all pods at once."""
        lines = ["127.0.0.1 localhost"]
        lines += [f"{address} {name}" for name, address in hosts.items()]
        # In place, as pods have the file itself mounted.
        with (self.folder / "etc/hosts").open("r+") as file:
            file.write("\n".join(lines) + "\n")
            file.truncate()
