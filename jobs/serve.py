"""Ray job entry point of `sbi-dist serve`; takes the same arguments."""

import sys

from sbi_dist.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
