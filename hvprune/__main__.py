"""``python -m hvprune``: the same as the ``hvprune`` command."""

import sys

from .cli import main

sys.exit(main())
