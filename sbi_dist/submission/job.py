"""The process of a submitted job: ``python -m sbi_dist.submission.job VERSION STAGE ...``.

Runs the stage as the command line does, after a look at whether it is the version that was meant.
"""

from __future__ import annotations

import sys
from importlib import metadata

from sbi_dist.cli import main

__all__: list[str] = []


if __name__ == "__main__":
    submitted, *arguments = sys.argv[1:]
    here = metadata.version("sbi_dist")
    if here != submitted:
        print(
            f"sbi-dist: the cluster has sbi_dist {here}, and the job was submitted by {submitted}; "
            f"install {submitted} on the cluster, or submit with {here}",
            file=sys.stderr,
        )
        sys.exit(2)
    main(arguments)
