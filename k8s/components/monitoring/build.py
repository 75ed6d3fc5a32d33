"""Writes rules.yaml, the rules and alerts of cluster/prometheus/rules as a PrometheusRule.

``python k8s/components/monitoring/build.py [FILE]``; a test compares what it writes to what is
there.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parents[2] / "cluster/prometheus/rules/sbi_dist.rules.yml"

HEADER = """\
# Made by build.py of {source}. Do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: sbi-dist
  labels:
    release: prometheus # what the Prometheus of kube-prometheus-stack takes, if that is its name
spec:
"""


def build() -> str:
    """The resource as text, which keeps the comments and the layout of the rules."""
    text = RULES.read_text()
    body = text[text.index("groups:") :]
    source = RULES.relative_to(HERE.parents[2])
    return HEADER.format(source=source) + textwrap.indent(body, "  ")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "rules.yaml"
    target.write_text(build())
