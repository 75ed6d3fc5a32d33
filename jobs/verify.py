"""Ray job entry point of `sbi-dist verify`; takes the same arguments."""

import sys

from sbi_dist.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
