"""Builds the dashboards: ``python cluster/grafana/build.py`` writes ``dashboards/*.json``.

Another folder can be given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline import PIPELINE
from serve import SERVE

folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "dashboards"
for name, content in {"pipeline": PIPELINE, "serve": SERVE}.items():
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
