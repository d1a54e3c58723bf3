"""Every Triton kernel compiles and is launched for GPUs that are not here, and keeps its values in registers."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from hvprune import ops
from resource_table import record

SCRIPT = Path(__file__).with_name("triton_compile.py")
# Compiled by two processes at once.
HALVES = (("sm_80", "sm_100"), ("sm_90", "gfx942"))
CUDA = ("sm_80", "sm_90", "sm_100")
PIPELINES = ("hivtp_select", "vispruner_select")  # kernels of other ops only
# Kernels that multiply matrices; on sm_90 half inputs reach its tensor cores through wgmma.
PRODUCTS = ("_similarity_kernel", "_single_pass_kernel", "_two_pass_kernel")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, SCRIPT, *targets], env=environment, **pipes) for targets in HALVES]
    rows = []
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        rows += csv.DictReader(output.splitlines())
    usage = ("registers", "shared", "stack", "local")
    names = ({"arch": row["target"], "kernel": f"{row['kernel']}<{row['case']}>"} for row in rows)
    record("triton", [name | {key: row[key] for key in usage} for name, row in zip(names, rows, strict=True)])
    return rows


def test_every_op_compiles_for_every_target(table):
    compiled = {(row["case"].split("-")[0], row["target"]) for row in table}
    expected = {(op, target) for op in ops.__all__ if op not in PIPELINES for target in sum(HALVES, ())}
    assert compiled == expected


def test_nothing_spills_on_cuda(table):
    spilled = [row for row in table if row["target"] in CUDA and (row["stack"], row["local"]) != ("0", "0")]
    assert not spilled


def test_half_products_use_wgmma_on_sm_90(table):
    products = [row for row in table if row["target"] == "sm_90" and row["kernel"] in PRODUCTS]
    half = [row for row in products if "fp32" not in row["case"]]
    assert {row["kernel"] for row in half} == set(PRODUCTS)
    assert [row for row in half if row["wgmma"] == "0"] == []
