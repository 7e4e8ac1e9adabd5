"""Entry point of `python -m sdkit`."""

import sys

from sdkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
