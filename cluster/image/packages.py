"""Prints what a project depends on: ``python packages.py pyproject.toml [EXTRA ...]``.

Installed from this list, the packages make a layer of the image that changes only with them.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
lines = list(project["dependencies"])
for extra in sys.argv[2:]:
    lines += project["optional-dependencies"][extra]
print(*lines, sep="\n")
