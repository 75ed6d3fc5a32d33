"""Ray job entry point of `sbi-dist train`; takes the same arguments."""

import sys

from sbi_dist.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
