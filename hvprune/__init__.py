"""hvprune: fused kernels for visual token pruning (HIVTP and VisPruner)."""

import warnings

with warnings.catch_warnings():
    # torch says so once, where its operator registry loads; nothing here needs NumPy.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    from . import ops, reference
from ._registry import BackendUnavailable
from .integrations import HIVTP, VisPruner, attach
from .selection import Selection

__version__ = "0.1.0"

__all__ = [
    "HIVTP",
    "BackendUnavailable",
    "Selection",
    "VisPruner",
    "__version__",
    "attach",
    "ops",
    "reference",
]
