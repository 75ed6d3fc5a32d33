"""Ray job entry point of `sbi-dist benchmark`; takes the same arguments."""

import sys

from sbi_dist.cli import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
