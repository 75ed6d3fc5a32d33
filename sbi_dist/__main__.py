"""``python -m sbi_dist`` is ``sbi-dist``."""

from sbi_dist.cli import main

if __name__ == "__main__":
    main()
