"""Ray job entry point of `sbi-dist tune`; takes the same arguments."""

import sys

from sbi_dist.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
