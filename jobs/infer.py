"""Ray job entry point of `sbi-dist infer`; takes the same arguments."""

import sys

from sbi_dist.cli import main

if __name__ == "__main__":
    main(["infer", *sys.argv[1:]])
