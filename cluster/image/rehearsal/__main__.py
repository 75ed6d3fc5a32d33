"""``python -m cluster.image.rehearsal``: see the package; as root, from the repository's root."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from cluster.image.rehearsal.build import Builder, Failed
from cluster.image.rehearsal.checks import check
from cluster.image.rehearsal.dockerfile import Dockerfile

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
parser.add_argument("--work", type=Path, help="a folder for the trees, kept; some GB")
parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="of Debian")
parser.add_argument(
    "--env", action="append", default=[], metavar="NAME", help="a variable that RUN gets too"
)
parser.add_argument(
    "--bind", action="append", default=[], metavar="PATH", help="a path that RUN sees, read-only"
)
given = parser.parse_args()
if os.geteuid() != 0:
    sys.exit("rehearsal: chroots need root")

here = Path(__file__).parents[1]
context = here.parents[1]
began = time.monotonic()
with tempfile.TemporaryDirectory(prefix="rehearsal-") as scratch:
    builder = Builder(
        Dockerfile.parse((here / "Dockerfile").read_text()),
        context,
        (here / "Dockerfile.dockerignore").read_text().splitlines(),
        given.work or Path(scratch),
        given.mirror,
        dict(each.split("=", 1) for each in given.build_arg),
        {name: os.environ[name] for name in given.env},
        given.bind,
    )
    version = tomllib.loads((context / "pyproject.toml").read_text())["project"]["version"]
    try:
        image = builder.build()
        print(f"built in {time.monotonic() - began:.0f} s", flush=True)
        check(image, version)
    except Failed as error:
        sys.exit(f"rehearsal: {error}")
print(f"the image builds and starts ({time.monotonic() - began:.0f} s)")
