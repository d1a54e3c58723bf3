"""hvprune: fused kernels for visual token pruning (HIVTP and VisPruner)."""

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
