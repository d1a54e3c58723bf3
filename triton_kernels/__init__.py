"""Triton kernels, installed as ``hvprune.triton_kernels``: one file per op, its launcher named like it."""
