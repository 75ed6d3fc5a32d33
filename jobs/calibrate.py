"""Ray job entry point of `sbi-dist calibrate`; takes the same arguments."""

import sys

from sbi_dist.cli import main

if __name__ == "__main__":
    main(["calibrate", *sys.argv[1:]])
