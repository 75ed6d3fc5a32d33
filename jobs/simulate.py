"""Ray job entry point of `sbi-dist simulate`; takes the same arguments."""

import sys

from sbi_dist.cli import main

if __name__ == "__main__":
    main(["simulate", *sys.argv[1:]])
