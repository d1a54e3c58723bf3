"""The benchmarks, installed as ``hvprune.benchmarks``: ``hvprune bench`` runs them, so does ``pytest benchmarks``."""
