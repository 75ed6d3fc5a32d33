"""Ray job entry point of `sbi-dist run`; takes the same arguments."""

import sys

from sbi_dist.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
