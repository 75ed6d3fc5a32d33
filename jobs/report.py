"""Ray job entry point of `sbi-dist report`; takes the same arguments."""

import sys

from sbi_dist.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
