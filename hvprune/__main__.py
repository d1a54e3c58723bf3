"""``python -m hvprune``: the same as the ``hvprune`` command."""

import sys

from .cli import main

if __name__ == "__main__":  # not in the processes of a benchmark, which import this file
    sys.exit(main())
