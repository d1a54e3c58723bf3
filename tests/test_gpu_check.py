"""make gpu-check where there is no GPU, and how it records its steps."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu_check
import sanitized
from hvprune.testing import Backend

SCRIPT = Path(gpu_check.__file__)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_says_that_there_is_no_gpu():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(f"gpu-check: needs an NVIDIA GPU, and torch {torch.__version__} of ")


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    monkeypatch.setattr(gpu_check, "START", time.monotonic())
    (tmp_path / "results").mkdir()
    return gpu_check.Check(tmp_path / "results")


def test_records_every_step(check, capfd):
    assert check.step("good", 60, ["echo", "all is well"])
    assert check.step("clean", 60, ["printf", "SUMMARY: 0 errors\nbye\n"], passed="SUMMARY: 0 errors")
    assert check.step("told", 60, ["sh", "-c", "echo $COLOUR"], passed="^blue", COLOUR="blue")
    assert check.step("silent", 60, ["true"])
    check.record("absent", "not run", 0, "no such tool")
    assert check.summarise(["a header"]) == 0
    assert not check.step("bad", 60, ["sh", "-c", "echo why; exit 3"])
    assert not check.step("dirty", 60, ["echo", "SUMMARY: 1 error"], passed="SUMMARY: 0 errors")
    assert not check.step("missing", 60, ["false"], passed="anything")
    assert check.summarise(["a header"]) == 1
    rows = [line.split() for line in (check.results / "summary.txt").read_text().splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [
        ("good", "passed"), ("clean", "passed"), ("told", "passed"), ("silent", "passed"),
        ("absent", "not"),
        ("bad", "FAILED"), ("dirty", "FAILED"), ("missing", "FAILED"),
    ]  # fmt: skip
    assert rows[0][-3:] == ["all", "is", "well"] and rows[1][-1] == "errors"
    assert "----- end of bad:\nwhy\n-----" in capfd.readouterr().out
    assert "##### bad: sh -c echo why; exit 3\nwhy\n" in check.log.read_text()


def test_step_is_stopped_with_all_it_started(check, tmp_path):
    left = tmp_path / "left"
    begin = time.monotonic()
    slow = f"(sleep 7; touch {left}) & echo started; sleep 60"
    assert not check.step("slow", 0, ["sh", "-c", slow])  # five seconds are always given
    assert 4 < time.monotonic() - begin < 20
    assert "timed out" in check.rows[-1] and "started" in check.rows[-1]
    time.sleep(3)
    assert not left.exists()


def test_environment_sees_the_packages_below(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    code = "import sys, torch, setuptools; print(sys.prefix)"
    result = subprocess.run([gpu_check.make_environment(), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == str(tmp_path / "venv"), result.stderr


def test_tools_are_found(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer" / "hvprune-tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.find_tool("hvprune-tool") is None  # it cannot be run
    os.chmod(tool, 0o755)
    assert gpu_check.find_tool("hvprune-tool") == str(tool)


def test_what_the_sanitizers_watch_is_right(capsys):
    sanitized.run(Backend("cpu", "cpu"))
    assert {line.split()[3].rstrip(":") for line in capsys.readouterr().out.splitlines()} == set(sanitized.CASES)
