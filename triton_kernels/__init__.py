"""Triton kernels, installed as ``hvprune.triton_kernels``: one file per op. This version has none yet."""
