"""Ray job entry point of `sbi-dist status`; takes the same arguments."""

import sys

from sbi_dist.cli import main

if __name__ == "__main__":
    main(["status", *sys.argv[1:]])
