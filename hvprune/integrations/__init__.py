"""Pruned LLaVA models in transformers. transformers itself is imported by :func:`attach`, not before."""

from .attach import attach
from .methods import HIVTP, VisPruner

__all__ = ["HIVTP", "VisPruner", "attach"]
